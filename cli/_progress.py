"""How far a command is, on stderr: a bar on a terminal, at most one plain line a minute elsewhere, nothing with --quiet.

Who asks, and programs that read along, are told by `_pulse` in any case.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from types import TracebackType
from typing import Any, ClassVar

from rbkit.cli import _log

INTERVAL = 60.0  # seconds between plain lines


def _terminal() -> bool:
    try:
        return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    except ValueError:
        return False


class Progress:
    """Counts `unit`s of work from `done` up to `total` (None: unknown)."""

    current: ClassVar[Progress | None] = None  # the work that a status line tells of

    def __init__(self, tool: str, *, total: int | None, unit: str, quiet: bool, done: int = 0) -> None:
        self.tool, self.total, self.unit = tool, total, unit
        self.done, self.before = done, done
        self.begun = self.said = time.monotonic()
        silent = quiet or _log.as_json()
        self.plain = not silent and not _terminal()
        self.bar: Any = None if silent or self.plain else self._bar()
        Progress.current = self

    def _bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self.task = bar.add_task(self.tool, total=self.total, completed=self.done, note="")
        return bar

    def expect(self, total: object) -> None:
        """Tell how much there will be, once a stream has told it; anything but a number leaves it unknown."""
        if self.total is None and isinstance(total, int):
            self.total = total
            if self.bar is not None:
                self.bar.update(self.task, total=total)

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Count more work; `note` is shown beside it."""
        self.done += count
        if self.bar is not None:
            self.bar.update(self.task, advance=count, **({"note": note} if note else {}))
        elif self.plain and time.monotonic() - self.said >= INTERVAL:
            self.said = time.monotonic()
            with contextlib.suppress(OSError, ValueError):
                print(f"{self.tool}: {self.count()} {note}".rstrip(), file=sys.stderr, flush=True)

    def count(self) -> str:
        """`17 of 40 images`."""
        of = "" if self.total is None else f" of {self.total}"
        return f"{self.done}{of} {self.unit}"

    def state(self) -> dict[str, Any]:
        """What is done, of how much, in how many seconds, and how much of it per second."""
        seconds = time.monotonic() - self.begun
        rate = (self.done - self.before) / max(seconds, 1e-6)
        known = {} if self.total is None else {"total": self.total}
        return {"done": self.done, **known, "unit": self.unit, "seconds": round(seconds, 3), "rate": round(rate, 3)}

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
