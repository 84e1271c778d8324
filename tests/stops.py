"""What a study tells of its steps, and ends of it at one of them."""

from collections.abc import Callable


class Killed(BaseException):
    """As a SIGKILL: nothing more is written."""


def nowhere(*args, **how):
    """An ``advance`` that nobody looks at."""


def ending(error: BaseException, at: int) -> Callable[..., None]:
    """An ``advance`` whose call of that number raises the error."""
    calls = 0

    def advance(*args, **how):
        nonlocal calls
        calls += 1
        if calls == at:
            raise error

    return advance
