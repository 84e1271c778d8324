"""What can end a run on purpose, and what the end of any run is called: exit code and one line."""

import errno
from collections.abc import Iterator

SAVED = 143  # exit code of SIGTERM, and of the warnings SIGUSR1 and SIGUSR2: it may go on
STOPPED = (130, SAVED)  # and of Ctrl-C
PIPE = 141  # of a command whose output nobody reads to its end, as the shell has it for SIGPIPE
OUT_OF_MEMORY = ("can't allocate memory", "CUDA out of memory")  # torch's words
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, for this file or this user
# the same in the words of libraries that hide the number: torch's writer of archives, safetensors
FULL_WORDS = ("PytorchStreamWriter failed", "unexpected pos", "(os error 28)", "(os error 122)")


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


class CannotWrite(RuntimeError):
    """The disk has no room; the message names the file and what is safe. Exit 1."""


# kinds whose message is the one line, and the exit code
MEANT = {UserError: 2, CannotWrite: 1, Lost: 1, BrokenPipeError: PIPE}


def is_full(error: BaseException) -> bool:
    """Whether it says that a disk has no room for a file."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL:
            return True
        if any(words in str(seen) for words in FULL_WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory for it, of the host or of a GPU."""
    return isinstance(error, MemoryError) or any(mark in str(error) for mark in OUT_OF_MEMORY)


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
        for kind, code in MEANT.items():
            if isinstance(cause, kind):
                return code, " ".join(str(cause).split())
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    text = str(error).splitlines()[0] if str(error) else ""
    if is_out_of_memory(error):
        return 1, f"out of memory: lower micro_batch_size or the model's size ({text})"
    if is_full(error):
        return 1, f"cannot write: {text}"
    return 1, text if isinstance(error, Diverged) else f"{type(error).__name__}: {text}"


def is_bug(error: BaseException) -> bool:
    """Whether its traceback is worth showing."""
    code, line = verdict(error)
    meant = any(isinstance(cause, CannotWrite | Lost) for cause in chain(error))
    told = isinstance(error, Diverged) or meant
    return code == 1 and not told and not line.startswith(("out of memory", "cannot write"))
