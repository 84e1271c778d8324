"""Where Hydra looks for plugins: modules of the namespace ``hydra_plugins``. No more than that."""

from collections.abc import Sequence
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin

from spo_lightning.sweep import SWEEPS
from spo_lightning.sweep.launcher import Processes


class ProcessLauncher(Launcher):
    """``hydra/launcher=process``: a process per job."""

    def __init__(
        self, *, parallel: int, resume: str | None, table: str | None, numbers: Sequence[str]
    ):
        self.processes = Processes(parallel, resume, table, numbers)

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.processes.setup(hydra_context, task_function, config)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        return self.processes.launch(job_overrides, initial_job_idx)


class Questions(SearchPathPlugin):
    """Lets ``--config-name`` find the sweeps of the package, from a wheel too."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("spo_lightning", f"file://{SWEEPS}")
