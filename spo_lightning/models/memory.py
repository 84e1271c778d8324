"""A device in, the memory that is free there and what was in use at the peak out, in bytes."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
# folder below it, mark of its line in /proc/self/cgroup; limit, use, and what of that no process
# holds: of the second version and of the first
VERSIONS = (
    ("", "0::", "memory.max", "memory.current", "inactive_file "),
    (
        "memory",
        ":memory:",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file ",
    ),
)


def free(device: torch.device) -> int:
    """What may still be taken: of a GPU with what torch keeps for itself, of the host as far as
    its own and every cgroup's limit lets us."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    import psutil

    return min([psutil.virtual_memory().available, *_below_limits()])


def in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil

    return psutil.Process(os.getpid()).memory_info().rss


def forget(device: torch.device) -> None:
    """The peak begins anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak()


def peak(device: torch.device) -> int:
    """The most that was in use since it was forgotten."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return highest_resident()


def forget_peak() -> bool:
    """Start the peak of this process anew; False where the system does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): the peak
    except OSError:
        return False
    return True


def highest_resident() -> int:
    """Bytes of this process in memory, at most since the peak was forgotten."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _below_limits() -> Iterator[int]:
    """What every cgroup around this process leaves, a scheduler's or a container's."""
    with suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
        for folder, mark, limit, use, files in VERSIONS:
            named = [line.partition(mark)[2] for line in lines if mark in line]
            for place in {Path(name.strip("/")) for name in named} | {Path()}:
                for group in (place, *place.parents):
                    yield from _left(CGROUPS / folder / group, limit, use, files)


def _left(group: Path, limit: str, use: str, files: str) -> Iterator[int]:
    """Nothing of a group without a limit, or that cannot be seen from inside a container."""
    with suppress(OSError, ValueError):
        most, taken = (int((group / name).read_text("ascii")) for name in (limit, use))
        stat = (group / "memory.stat").read_text("ascii").splitlines()
        unread = sum(int(line.split()[1]) for line in stat if line.startswith(files))
        yield max(0, most - taken + unread)
