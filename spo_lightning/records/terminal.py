"""Standard output and error that cannot end a run: what nobody reads any more is dropped."""

import io
import os
import sys

from spo_lightning.errors import CannotWrite


class Terminal(io.RawIOBase):
    """A descriptor until it fails (its reader has gone, its disk is full), then nothing.

    A run's files are what counts, so no line for the terminal may end it, nor print a traceback
    where it cannot be shown. ``error`` is what failed, for a command whose product is its output.
    """

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, data) -> int | None:
        try:
            return os.write(self.descriptor, data)
        except BlockingIOError:
            return None
        except OSError as error:
            self.error = error
            # for what writes past Python too; a job that is given a file of its own has it again
            _drop(self.descriptor)
            return len(data)


def guard() -> None:
    """Put it under print, logging and the exit's last flush; once per process."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):  # a test or a notebook has its own
            continue
        if stream is None:  # closed from the start: the next file opened would get its number
            _drop(descriptor)
        else:
            stream.flush()
        raw = Terminal(descriptor)
        guarded = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding="utf-8" if stream is None else stream.encoding,
            errors="backslashreplace" if stream is None else stream.errors,
            line_buffering=descriptor == 2 or raw.isatty(),
        )
        setattr(sys, name, guarded)


def check() -> None:
    """Raise where standard output does not hold all that was printed."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, Terminal) else None
    if isinstance(error, BrokenPipeError):
        raise error
    if error is not None:
        raise CannotWrite(f"cannot write to standard output: {error.strerror}") from error


def _drop(descriptor: int) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    if nothing != descriptor:
        os.dup2(nothing, descriptor)
        os.close(nothing)
