"""Where Hydra looks for plugins: modules of the namespace ``hydra_plugins``. No more than that."""

from collections.abc import Sequence
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin

from spo_lightning.errors import UserError
from spo_lightning.sweep import SWEEPS
from spo_lightning.sweep.composing import yamls_before_schemas
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


class SubmititLauncher(Launcher):
    """``hydra/launcher=submitit_slurm`` and ``submitit_local``: a submission per job."""

    def __init__(self, **keys: Any):
        try:
            from spo_lightning.sweep.cluster import Submitted
        except ModuleNotFoundError as error:
            raise UserError(
                f"hydra/launcher=submitit_{keys['cluster']} needs {error.name}: "
                'pip install "spo-lightning[submitit]"'
            ) from error
        self.submitted = Submitted(**keys)

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        how = {"task_function": task_function, "config": config}
        self.submitted.setup(hydra_context=hydra_context, **how)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        return self.submitted.launch(job_overrides, initial_job_idx)


class Questions(SearchPathPlugin):
    """Lets ``--config-name`` find the sweeps of the package, from a wheel too."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("spo_lightning", f"file://{SWEEPS}")
        yamls_before_schemas()
