"""What can end a run on purpose, and what the end of any run is called: exit code and one line."""

from collections.abc import Iterator

STOPPED = (130, 143)  # exit codes of Ctrl-C and SIGTERM
OUT_OF_MEMORY = ("can't allocate memory", "CUDA out of memory")  # torch's words


class UserError(ValueError):
    """Bad input. The message is one line naming the file, row or key and what to do; exit 2."""


class Interrupted(Exception):
    """A signal asked the run to stop and it has saved; ``code`` is the exit code, 130 or 143."""

    def __init__(self, code: int, message: str):
        super().__init__(code, message)  # both, so that it travels between processes
        self.code = code

    def __str__(self) -> str:
        return self.args[1]


class Diverged(RuntimeError):
    """A loss or gradient is not finite; the message names the rows of the batch. Exit 1."""


class Lost(RuntimeError):
    """Another process of the run has ended; the message says which, and how. Exit 1."""


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and one line for what ended the work."""
    for cause in chain(error):
        if isinstance(cause, Interrupted):
            return cause.code, str(cause)
        if isinstance(cause, UserError):
            return 2, " ".join(str(cause).split())
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, MemoryError) or any(mark in text for mark in OUT_OF_MEMORY):
        return 1, f"out of memory: lower micro_batch_size or the model's size ({text})"
    return 1, text if isinstance(error, Diverged | Lost) else f"{type(error).__name__}: {text}"


def is_bug(error: BaseException) -> bool:
    """Whether its traceback is worth showing."""
    code, line = verdict(error)
    told = isinstance(error, Diverged | Lost) or line.startswith("out of memory")
    return code == 1 and not told
