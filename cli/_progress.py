"""Progress on stderr: a bar on a terminal, at most one plain line a minute elsewhere, nothing with --quiet."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from types import TracebackType
from typing import Any

INTERVAL = 60.0  # seconds between plain lines


def _terminal() -> bool:
    try:
        return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    except ValueError:
        return False


class Progress:
    """Counts `unit`s of work up to `total` (None: unknown)."""

    def __init__(self, tool: str, *, total: int | None, unit: str, quiet: bool) -> None:
        self.tool, self.total, self.unit = tool, total, unit
        self.done, self.said = 0, time.monotonic()
        self.plain = not quiet and not _terminal()
        self.bar: Any = None if quiet or self.plain else self._bar()

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
        self.task = bar.add_task(self.tool, total=self.total, note="")
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
            of = "" if self.total is None else f" of {self.total}"
            with contextlib.suppress(OSError, ValueError):
                print(f"{self.tool}: {self.done}{of} {self.unit} {note}".rstrip(), file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
