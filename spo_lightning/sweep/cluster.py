"""A sweeper's jobs in, submissions to a scheduler out: ``hydra/launcher=submitit_slurm``.

submitit and hydra-submitit-launcher do the work. Beside it here: a job that is told to stop has
saved, is queued again, and goes on; its tasks are the processes of one run; bad keys are one line.
"""

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import submitit
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher
from submitit.helpers import TorchDistributedEnvironment
from submitit.slurm.slurm import SlurmExecutor

from spo_lightning.config.studies import goes_on
from spo_lightning.errors import SAVED, STOPPED, UserError, verdict
from spo_lightning.records.progress import WARNINGS
from spo_lightning.run import processes

AGAIN = "ckpt_path=last"
# keys, and the least that each may be
LEAST: dict[str, int] = {
    **dict.fromkeys(("nodes", "tasks_per_node", "timeout_min", "array_parallelism"), 1),
    **dict.fromkeys(("cpus_per_task", "gpus_per_node", "mem_gb"), 1),
    **dict.fromkeys(("signal_delay_s", "max_num_timeout"), 0),
}


class Submitted(BaseSubmititLauncher):
    """The engine's launcher. It travels to the job itself, which calls it with its words."""

    def __init__(self, *, cluster: str, dry_run: bool = False, **keys: Any):
        super().__init__(**keys)
        self._EXECUTOR, self.dry_run = cluster, dry_run
        if not isinstance(dry_run, bool):
            raise UserError(f"hydra.launcher.dry_run={dry_run}: it must be true or false")
        for key in [key for key in LEAST if keys.get(key) is not None]:
            if not isinstance(keys[key], int) or keys[key] < LEAST[key]:
                told = f"it must be a whole number, at least {LEAST[key]}"
                raise UserError(f"hydra.launcher.{key}={keys[key]}: {told}")
        if cluster == "local" and keys["nodes"] > 1:
            raise UserError(
                f"hydra.launcher.nodes={keys['nodes']}: submitit_local is this machine alone: "
                "leave it out, or take hydra/launcher=submitit_slurm"
            )

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        script = self._script(len(job_overrides)) if self._EXECUTOR == "slurm" else ""
        if self.dry_run:
            print(script)
            return []
        if script and SlurmExecutor.affinity() < 0:
            raise UserError(
                "hydra/launcher=submitit_slurm: there is no srun here: submit where SLURM is, or "
                "look at the batch script with hydra.launcher.dry_run=true"
            )
        return super().launch(job_overrides, initial_job_idx)

    def _script(self, count: int) -> str:
        """What sbatch is given for so many jobs."""
        aside = ("submitit_folder", "max_num_timeout")
        keys = {k: v for k, v in self.params.items() if v is not None and k not in aside}
        executor = Shown(self.params["submitit_folder"])
        executor.update_parameters(**executor._convert_parameters(keys))
        if count > 1:
            executor.parameters["map_count"] = count
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    # -- in the job

    def __call__(self, sweep_overrides: list[str], *rest: Any) -> JobReturn:
        task = submitit.JobEnvironment()
        requeue = getattr(signal, f"SIG{task.USR_SIG}")
        for number in (signal.SIGTERM, *WARNINGS):  # until the run itself takes them over
            signal.signal(number, signal.getsignal(requeue))
        if task.num_tasks > 1:
            _tell_of_the_others(task)
        if task.global_rank:
            return _followed()
        Singleton.set_state(rest[-1])  # Hydra's, to compose with
        setup_globals()
        if int(os.environ.get("SLURM_RESTART_COUNT", 0)):  # by SLURM, after a node's failure too
            sweep_overrides = self._going_on(sweep_overrides)
        done = super().__call__(sweep_overrides, *rest)
        if done.status == JobStatus.FAILED and verdict(done._return_value)[0] == SAVED:
            signal.raise_signal(requeue)  # submitit asks checkpoint(), queues again and exits
        return done

    def checkpoint(self, sweep_overrides: list[str], *rest: Any) -> Any:
        """The same job again, which goes on."""
        return super().checkpoint(self._going_on(sweep_overrides), *rest)

    def _going_on(self, words: list[str]) -> list[str]:
        """What cannot go on, as some studies and what is no run, begins again."""
        assert self.hydra_context is not None and self.config is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, words)
        may = "ckpt_path" in config and goes_on(config) and AGAIN not in words
        return [*words, AGAIN] if may else words


class Shown(SlurmExecutor):
    """Makes the script of a submission, on a machine without SLURM too."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def _tell_of_the_others(task: Any) -> None:
    """As torchrun would; ``run/processes.py`` listens."""
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    os.environ["GROUP_RANK"] = str(task.node)


def _followed() -> Any:
    """What a task does that is not the first: it is handed the run's work and nothing else."""
    code = processes.follow()
    if code in STOPPED:
        sys.exit(0)  # the first queues the job again; an ill end here could end it before
    return code
