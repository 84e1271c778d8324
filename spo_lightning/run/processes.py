"""The processes of a run, begun before its first stage: by torchrun, by srun, or here.

Outside there is one run: the first process has the command line, the directory and the terminal.
The others are handed its work, and end with it. Whoever begins them, they find one another as
torchrun's do, by RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, TypeVar

from spo_lightning.errors import Lost, UserError, verdict
from spo_lightning.world import World

if TYPE_CHECKING:
    from omegaconf import DictConfig

Value = TypeVar("Value")
Work = Callable[[World], Value]

WAIT = timedelta(days=7)  # for the others: a warm start may take long, and a dead one is noticed
LAST_WORD = 5.0  # seconds in which a process that has ended may still have said why
GRACE = 20.0  # seconds after which one that waits for a dead one in vain is ended


def follows() -> bool:
    """Whether this process is one of several that something else began, and not the first."""
    return int(_told().get("RANK", 0)) > 0


def refuse_sweep() -> None:
    """Processes that something else began walk one run: a sweep has its jobs begin their own, or
    submitit begin them."""
    if _told() and "SUBMITIT_EXECUTOR" not in os.environ:
        raise UserError(
            "a sweep's jobs begin their own processes: hardware.devices=N, not torchrun"
        )


def together(work: Work, hardware: "DictConfig") -> Any:
    """Do the work in every process; what it gave in this one, the first. Picklable work only."""
    if _told():
        return _joined(_told(), work, hardware, _another)
    if hardware.devices == 1:
        return work(World(place=partial(_place, hardware, 0)))
    return _begun(work, hardware)


def follow() -> int:
    """What a process does that is not the first: the work it is handed. Its exit code."""
    warnings.simplefilter("ignore")
    try:
        _joined(_told())
    except BaseException as error:
        code, line = verdict(error)
        if code != 1 or not _of_the_wire(error):  # else another ended first, and says why
            print(f"process {_told()['RANK']}: {line}", file=sys.stderr)
        return code
    return 0


def _told() -> Mapping[str, str]:
    """Where this process stands among those that torchrun or srun began; nothing, if alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ:
        return os.environ
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        hosts, job = os.environ["SLURM_NODELIST"], os.environ["SLURM_JOB_ID"]
        root = SLURMEnvironment.resolve_root_node_address(hosts)
        port = str(15_000 + int(job[-4:]))  # jobs that share a machine have one each
        size, nodes = (int(os.environ[f"SLURM_STEP_NUM_{n}"]) for n in ("TASKS", "NODES"))
        return {
            "RANK": os.environ["SLURM_PROCID"],
            "LOCAL_RANK": os.environ["SLURM_LOCALID"],
            "GROUP_RANK": os.environ["SLURM_NODEID"],
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size // nodes),
            "MASTER_ADDR": os.environ.get("MASTER_ADDR", root),
            "MASTER_PORT": os.environ.get("MASTER_PORT", port),
        }
    return {}


def _joined(
    told: Mapping[str, str],
    work: Work | None = None,
    hardware: Any = None,
    reason: Callable[[BaseException], BaseException] = lambda error: error,
    share: int = 1,
) -> Any:
    """Join the others, take the first one's work, and do it, on a ``share``-th of the threads."""
    rank, local = int(told["RANK"]), int(told["LOCAL_RANK"])
    if rank:
        logging.getLogger().addHandler(logging.NullHandler())  # the first has the terminal
    with _group(told) as group:
        bare = World(rank, int(told["WORLD_SIZE"]), group=group)
        work, hardware = bare.once(lambda: (work, hardware))
        here = int(told["LOCAL_WORLD_SIZE"])
        if hardware.devices not in (1, here):
            raise UserError(
                f"hardware.devices={hardware.devices}, and {here} processes were begun on this "
                "machine: leave it out"
            )
        assert work is not None  # the first has one
        world = World(rank, bare.size, partial(_place, hardware, local, share), group, reason)
        try:
            return work(world)
        except Exception as error:
            ended = reason(error)
            if ended is error:
                raise
            raise ended from error


def _another(error: BaseException) -> BaseException:
    """Where the processes were begun by something else, which says itself how each ended."""
    told = "another process of this run has ended, and the run cannot go on without it"
    return Lost(told) if _of_the_wire(error) else error


def _place(hardware: Any, local_rank: int, share: int = 1) -> Any:
    """The device of a process, which takes its share of the machine's threads."""
    from spo_lightning.models.device import device_of, set_threads

    set_threads(hardware, share)
    return device_of(hardware, local_rank)


@contextmanager
def _group(told: Mapping[str, str]) -> Iterator[Any]:
    """torch's process group of all, and one over the CPU for what is told between stages."""
    import torch
    import torch.distributed as dist

    before = {name: os.environ.get(name) for name in told} if told is not os.environ else {}
    os.environ.update(told)
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    if gpus and int(told["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(told["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=WAIT)
    try:
        yield dist.new_group(backend="gloo", timeout=WAIT)
    finally:
        dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


# -- processes begun here: the first is this one


def _begun(work: Work, hardware: "DictConfig") -> Any:
    size, context = hardware.devices, multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": "0"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    others: dict[Any, Connection] = {}
    for rank in range(1, size):
        heard, said = context.Pipe(duplex=False)
        told = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        other = context.Process(target=_other, args=(told, said), name=f"process {rank}")
        other.start()
        said.close()
        others[other] = heard
    over = threading.Event()
    threading.Thread(target=_watch, args=([*others], over), daemon=True).start()
    try:
        mine = {**shared, "RANK": "0", "LOCAL_RANK": "0"}
        return _joined(mine, work, hardware, partial(_reason, others), size)
    finally:
        over.set()
        for other in others:
            other.join(LAST_WORD)
            other.kill()


def _other(told: dict[str, str], said: Connection) -> None:
    """Another process of a run that this package began."""
    os.environ.update(told)
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    warnings.simplefilter("ignore")
    try:
        _joined(told, share=int(told["WORLD_SIZE"]))
    except BaseException as error:
        code, line = verdict(error)
        if not _of_the_wire(error):
            said.send((code, line))
        os._exit(code)


def _end_with_the_first() -> None:
    first = multiprocessing.parent_process()
    assert first is not None
    first.join()
    time.sleep(LAST_WORD)  # it may be about to end by itself
    os._exit(1)


def _watch(others: list[Any], over: threading.Event) -> None:
    """End a first process that waits in vain; most often the broken connection does it before."""
    _ended(others)
    if not over.wait(GRACE):
        print(f"error: {_lost(others)}", file=sys.stderr, flush=True)
        os._exit(1)


def _ended(others: Any, seconds: float | None = None) -> None:
    """Wait until one of them has ended and can be asked how."""
    pipes = wait([other.sentinel for other in others], seconds)
    for other in others:
        if other.sentinel in pipes:
            other.join(LAST_WORD)  # the kernel closes a process's pipes before it has an exit code


def _lost(others: Any) -> str:
    ended = [(o.name, o.exitcode) for o in others if o.exitcode not in (None, 0)]
    name, code = ended[0] if ended else ("a process", None)
    how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else "has ended"
    return f"{name} of this run {how}, by hand or for its memory: the run cannot go on without it"


def _reason(others: "dict[Any, Connection]", error: BaseException) -> BaseException:
    """What another process ended of, where this one only lost its connection."""
    if not _of_the_wire(error):
        return error
    _ended(others, LAST_WORD)
    for other, heard in others.items():
        if heard.poll():
            try:
                code, line = heard.recv()
            except EOFError:
                continue
            return UserError(line) if code == 2 else Lost(f"{other.name}: {line}")
    return Lost(_lost(others)) if any(o.exitcode for o in others) else error


def _of_the_wire(error: BaseException) -> bool:
    """Whether it is a broken connection between processes, the trace of another one's end."""
    words = ("gloo", "connection closed", "connection reset", "socket", "nccl")
    return isinstance(error, RuntimeError | OSError) and any(
        word in str(error).lower() for word in words
    )
