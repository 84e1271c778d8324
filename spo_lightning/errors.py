"""What can end a run on purpose: the user's error, and a stop asked for by a signal."""


class UserError(ValueError):
    """Bad input. The message is one line naming the file, row or key and what to do; exit 2."""


class Interrupted(Exception):
    """A signal asked the run to stop and it has saved; ``code`` is the exit code, 130 or 143."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


class Diverged(RuntimeError):
    """A loss or gradient is not finite; the message names the rows of the batch. Exit 1."""
