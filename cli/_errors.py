"""Failures and their exit status: the table of rbkit(7), once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Failure(Exception):
    """A run that ends with one line on stderr and `status`."""

    status = 1


class Usage(Failure):
    """Option, value or combination; binary to a terminal; input is output."""

    status = 2


class Input(Failure):
    """Missing, unreadable, truncated, corrupt, or wrong for the model."""

    status = 3


class Output(Failure):
    """Cannot be created, write error, disk full."""

    status = 4


class Numbers(Failure):
    """NaN or infinite loss; an attack that left its ball."""

    status = 5


class Memory(Failure):
    """Out of memory, on the host or the device."""

    status = 6


class Partial(Failure):
    """Something failed under --keep-going; the rest is done."""

    status = 7


class CheckFailed(Failure):
    """A check that the user asked for does not hold."""

    status = 8


class Inconclusive(Failure):
    """A gate with too few images to tell."""

    status = 9


class Stopped(Failure):
    """Stopped on request after saving, or because another process of the run was lost; the same command goes on."""

    status = 75


class Lost(Stopped):
    """Another process of the run ended early; what was saved before stands."""


class Terminated(BaseException):
    """Raised by the handler of SIGTERM, SIGHUP or SIGINT, so that outputs are cleaned up on the way out."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def reason(error: BaseException) -> str:
    """What went wrong, on one line."""
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        folder = isinstance(error, IsADirectoryError)
        return f"{name}{'is a folder, expected a file' if folder else error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def blame(kind: type[Failure], *errors: type[BaseException], prefix: str = "") -> Iterator[None]:
    """Turn the given errors raised inside into a `kind` of failure."""
    caught = errors or (ValueError,)
    try:
        yield
    except Failure:
        raise
    except caught as error:
        text = reason(error)  # which may begin with the name of the file already
        raise kind(text if prefix and text.startswith(prefix) else prefix + text) from error
