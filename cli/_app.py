"""What every command shares: one wrapper that owns the standard streams, signals, messages and the exit status."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import sys
from collections.abc import Callable
from typing import Any

import typer

from rbkit.cli import __version__
from rbkit.cli._errors import Failure, Terminated, reason

UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF, errno.EIO)
TRAPPED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # not KeyboardInterrupt: typer would end it with status 0


def command_of(name: str, function: Callable[..., Any]) -> Any:
    """The command object of a function: what parses, and what man pages and completions are made from."""
    app = typer.Typer(name=name, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    app.command()(function)
    command = typer.main.get_command(app)
    command.params.append(_version_option(name))
    return command


def _version_option(name: str) -> Any:
    def show(context: Any, _: Any, value: bool) -> None:
        if value and not context.resilient_parsing:
            typer.echo(f"{name} (rbkit) {__version__}")
            raise typer.Exit()

    holder = typer.Typer(rich_markup_mode=None, add_completion=False)

    @holder.command()
    def hold(
        version: bool = typer.Option(False, "--version", help="Show the version and exit.", is_eager=True),
    ) -> None: ...

    option = typer.main.get_command(holder).params[0]
    option.callback, option.expose_value = show, False
    return option


def program(name: str, function: Callable[..., Any], *, alone: bool = False) -> Callable[[], None]:
    """The entry point of a console script: runs `function` and ends the process with the right status.

    alone: whether it works only once its input has ended, so that no neighbour in a pipe computes at the same time.
    """

    def main() -> None:
        _own_descriptors()
        _share_cpus(alone=alone)
        _trap()
        status = 1
        try:
            status = _run(name, function)
        except Terminated as stop:
            _die(stop.signum)
        except KeyboardInterrupt:
            _die(signal.SIGINT)
        except BrokenPipeError:
            _die(signal.SIGPIPE)
        # Skip the interpreter's own flush at exit: all is written or reported, and a closed pipe would print a message.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)

    main.__doc__ = function.__doc__
    main.command = lambda: command_of(name, function)  # type: ignore[attr-defined]
    return main


def _share_cpus(*, alone: bool) -> None:
    """In a pipe, and under make -j, let threads that wait sleep: where two programs spin on the same CPUs, both crawl.

    Read by libgomp when torch is loaded. Without neighbours, spinning is faster by about a quarter.
    """
    shared = "jobserver" in os.environ.get("MAKEFLAGS", "")
    if not alone:
        with contextlib.suppress(OSError):
            shared = shared or any(stat.S_ISFIFO(os.fstat(fd).st_mode) for fd in (0, 1))
    if shared:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _run(name: str, function: Callable[..., Any]) -> int:
    try:
        status = command_of(name, function)(args=_arguments(), prog_name=name, standalone_mode=False)
        _flush_stdout()
        return status if isinstance(status, int) else 0
    except Failure as failure:
        return _report(name, failure, failure.status)
    except (BrokenPipeError, KeyboardInterrupt, Terminated):
        raise
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # typer ends with status 1 where a reader went away
            raise end.__context__ from None
        raise
    except MemoryError:
        return _report(name, MemoryError("out of memory; try a smaller --block or fewer rows"), 6)
    except Exception as error:
        return _other(name, error)


def _arguments() -> list[str]:
    """The command line; bytes that are not UTF-8 stay as they are in file names."""
    return sys.argv[1:]


def _other(name: str, error: Exception) -> int:
    if type(error).__name__ in ("OutOfMemoryError",) or "not enough memory" in str(error):
        return _report(name, RuntimeError("out of memory on the device; try a smaller --block"), 6)
    if isinstance(error, RuntimeError) and "does not require grad" in str(error):
        text = "the model's output has no gradient by its input (detached, or rounded on the way); try rb-score --flags"
        return _report(name, RuntimeError(text), 3, error)
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):
        if _follows():
            return int(error.exit_code)
        hint = f"; try '{name} --help'" if error.exit_code == 2 else ""
        text = error.format_message().rstrip(".") + hint
        return _report(name, RuntimeError(text), 2)
    if isinstance(error, OSError) and error.errno in UNWRITTEN and error.filename is None:  # --help > /dev/full
        return _report(name, OSError(f"standard output: write error: {error.strerror}"), 4)
    if type(error).__name__ in ("Exit", "Abort"):
        return int(getattr(error, "exit_code", 1))
    return _report(
        name, RuntimeError(f"internal error: {type(error).__name__}: {reason(error)}; RB_DEBUG=1 shows where"), 1, error
    )


def _follows() -> bool:
    """Whether this is one of several processes with one command line, of which the first complains for all."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


def _report(name: str, error: BaseException, status: int, cause: BaseException | None = None) -> int:
    if os.environ.get("RB_DEBUG"):
        import traceback

        traceback.print_exception(cause or error)
    note(name, reason(error))
    return status


def note(name: str, text: str) -> None:
    """One line on stderr; a stderr that is closed or full changes nothing."""
    with contextlib.suppress(OSError, ValueError):
        safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in f"{name}: {text}")
        print(
            safe.encode("utf-8", "backslashreplace").decode("ascii", "backslashreplace") if _ascii() else safe,
            file=sys.stderr,
        )
        sys.stderr.flush()


def _ascii() -> bool:
    encoding = getattr(sys.stderr, "encoding", None) or "ascii"
    return encoding.lower().replace("-", "") not in ("utf8", "utf16", "utf32")


def _flush_stdout() -> None:
    from rbkit.cli._errors import Output

    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Output(f"standard output: {reason(error)}") from error


def _own_descriptors() -> None:
    """Keep a data file from becoming descriptor 0, 1 or 2 where the caller closed them.

    A closed output is opened read-only, so that writing to it fails as it should.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if fd else os.O_WRONLY)
    for name, fd in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w", closefd=False))  # noqa: SIM115
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115


def _trap() -> None:
    def stop(signum: int, _: Any) -> None:
        raise Terminated(signum)

    for signum in TRAPPED:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, stop)


def _die(signum: int) -> None:
    """Really die by the signal, so that shells, make and schedulers see it; half-written outputs go."""
    if "rbkit.formats.atomic" in sys.modules:
        sys.modules["rbkit.formats.atomic"].forget_unfinished()
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signum])
    os.kill(os.getpid(), signum)
