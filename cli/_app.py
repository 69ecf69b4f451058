"""What every command shares: one wrapper that owns the standard streams, signals, messages and the exit status."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import stat
import sys
from collections.abc import Callable
from typing import Any

import typer

from rbkit.cli import __version__, _log
from rbkit.cli._errors import Failure, Memory, Output, Stopped, Terminated, reason
from rbkit.cli._log import note
from rbkit.cli._pulse import ASKING, Pulse

__all__ = ["command_of", "note", "program"]

UNALLOCATED = ("CUDA out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory")  # torch's
SPINS, SPINS_IN_PIPES = 1000, 3000  # some tens of microseconds; a hundred, about what lies between two operations
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


def program(
    name: str, function: Callable[..., Any], *, alone: bool = False, resumable: bool = False
) -> Callable[[], None]:
    """The entry point of a console script: runs `function` and ends the process with the right status.

    alone: whether it works only once its input has ended, so that no neighbour in a pipe computes at the same time.
    resumable: whether the same command goes on where it was stopped: signals of schedulers then end it with the status
    that says so. To other commands SIGUSR1 and SIGUSR2 are a question for a status line.
    """

    def main() -> None:
        _own_descriptors()
        _share_cpus(alone=alone)
        pulse = Pulse(name, asking=() if resumable else ASKING)
        _log.catch_warnings(name)
        _trap(TRAPPED + ASKING if resumable else TRAPPED)
        status, why, killer = 1, None, None
        try:
            with pulse:
                status, why = _run(name, function)
        except Terminated as stop:
            if resumable and stop.signum != signal.SIGINT:
                status, why = Stopped.status, _unstarted(stop.signum)
            else:
                killer = stop.signum
        except KeyboardInterrupt:
            killer = signal.SIGINT
        except BrokenPipeError:
            killer = signal.SIGPIPE
        if killer is not None:
            _die(name, killer)
        _log.end(name, status, why)
        # Skip the interpreter's own flush at exit: all is written or reported, and a closed pipe would print a message.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)

    main.__doc__ = function.__doc__
    main.command = lambda: command_of(name, function)  # type: ignore[attr-defined]
    return main


def _share_cpus(*, alone: bool) -> None:
    """In a pipe, and under make -j, let threads that wait soon sleep: where two programs spin on the same CPUs, both crawl.

    Read by OpenMP when torch is loaded. Where the neighbours are idle, threads that sleep at once cost a quarter; most
    waits end within the short spin that libgomp is told here.
    """
    spins = SPINS if "jobserver" in os.environ.get("MAKEFLAGS", "") else None
    if spins is None and not alone:
        with contextlib.suppress(OSError):
            spins = SPINS_IN_PIPES if any(stat.S_ISFIFO(os.fstat(fd).st_mode) for fd in (0, 1)) else None
    if spins is not None and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", str(spins))


Ending = tuple[int, str | None]  # the status, and why it is not 0


def _run(name: str, function: Callable[..., Any]) -> Ending:
    given: dict[str, Any] = {}

    @functools.wraps(function)
    def call(**options: Any) -> Any:
        given.update(options)
        return function(**options)

    try:
        status = command_of(name, call)(args=_arguments(), prog_name=name, standalone_mode=False)
        _flush_stdout()
        return status if isinstance(status, int) else 0, None
    except Failure as failure:
        return _failed(name, failure, failure.status)
    except (BrokenPipeError, KeyboardInterrupt, Terminated):
        raise
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # typer ends with status 1 where a reader went away
            raise end.__context__ from None
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in UNALLOCATED):
            return _failed(name, Memory(_smaller(given)), Memory.status, error)
        return _other(name, error)


def _arguments() -> list[str]:
    """The command line; bytes that are not UTF-8 stay as they are in file names."""
    return sys.argv[1:]


def _smaller(given: dict[str, Any]) -> str:
    """What to try where memory was not enough, by the options given: a block is a multiple of 32."""
    block, batch = given.get("block") or 0, given.get("batch") or 0
    if block > 32:
        return f"out of memory at --block {block}; try --block {max(32, block // 64 * 32)}"
    if batch > 2:
        return f"out of memory at --batch {batch}; try --batch {batch // 2}, or --micro {batch // 2}"
    return "out of memory; try fewer rows, or smaller images"


def _other(name: str, error: Exception) -> Ending:
    if isinstance(error, RuntimeError) and "does not require grad" in str(error):
        text = (
            "the model's output has no gradient by its input (detached, or rounded on the way); "
            "try what needs none: rb-attack --attack square, rb-saliency --method occlusion"
        )
        return _failed(name, RuntimeError(text), 3, error)
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):
        if _follows():
            return int(error.exit_code), None
        hint = f"; try '{name} --help'" if error.exit_code == 2 else ""
        text = error.format_message().rstrip(".") + hint
        return _failed(name, RuntimeError(text), 2)
    if isinstance(error, OSError) and error.errno in UNWRITTEN and error.filename is None:  # --help > /dev/full
        return _failed(name, OSError(f"standard output: write error: {error.strerror}"), 4)
    if type(error).__name__ in ("Exit", "Abort"):
        return int(getattr(error, "exit_code", 1)), None
    return _failed(
        name, RuntimeError(f"internal error: {type(error).__name__}: {reason(error)}; RB_DEBUG=1 shows where"), 1, error
    )


def _follows() -> bool:
    """Whether this is one of several processes with one command line, of which the first complains for all."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


def _failed(name: str, error: BaseException, status: int, cause: BaseException | None = None) -> Ending:
    if os.environ.get("RB_DEBUG"):
        import traceback

        for line in "".join(traceback.format_exception(cause or error)).splitlines():
            if _log.as_json():
                _log.emit(name, "traceback", level="error", text=line)
            else:
                _log.write(line)
    return status, reason(error)


def _flush_stdout() -> None:
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


def _unstarted(signum: int) -> str:
    return f"stopped by {signal.Signals(signum).name} before training began; run the same command with --resume"


def _trap(signums: tuple[signal.Signals, ...]) -> None:
    def stop(signum: int, _: Any) -> None:
        raise Terminated(signum)

    for signum in signums:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, stop)


def _die(name: str, signum: int) -> None:
    """Really die by the signal, so that shells, make and schedulers see it; half-written outputs go."""
    if "rbkit.formats.atomic" in sys.modules:
        sys.modules["rbkit.formats.atomic"].forget_unfinished()
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    if _log.as_json():
        _log.end(name, 128 + signum, signal.Signals(signum).name)
    signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signum])
    os.kill(os.getpid(), signum)
