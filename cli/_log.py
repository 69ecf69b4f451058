"""What is said on standard error: lines for people or, with RB_LOG=json, events for programs (rbkit(7), LOGS).

An event is one JSON object on one line, written at once and shorter than a pipe's atomic write, so that the lines of
many processes do not mix. Nothing here may change a result: a stderr that is closed or full is no failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import warnings
from datetime import UTC, datetime
from typing import Any

from rbkit.formats.errors import printable

LONGEST = 900  # characters of a text; at 4 bytes each, and with the rest of an event, below the 4096 bytes of PIPE_BUF


def as_json() -> bool:
    """Whether programs read along."""
    return os.environ.get("RB_LOG") == "json"


def note(tool: str, text: str) -> None:
    """A message: one line."""
    if as_json():
        emit(tool, "note", text=text)
        return
    with contextlib.suppress(OSError, ValueError):
        line = printable(f"{tool}: {text}", limit=sys.maxsize)
        print(line if _is_utf8() else line.encode("ascii", "backslashreplace").decode(), file=sys.stderr)
        sys.stderr.flush()


def end(tool: str, status: int, reason: str | None) -> None:
    """The last thing that is said: why the command failed, or, to programs, also that it is done."""
    if as_json():
        emit(tool, "exit", level="error" if status else "info", code=status, reason=reason or "done")
    elif reason is not None:
        note(tool, reason)


def emit(tool: str, event: str, *, level: str = "info", **fields: Any) -> None:
    """Write an event."""
    moment = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    told = {"t": moment, "lvl": level, "tool": tool, **_place(), "ev": event, **fields}
    short = {key: printable(value, limit=LONGEST) if isinstance(value, str) else value for key, value in told.items()}
    write(json.dumps(short, ensure_ascii=False, separators=(",", ":")))


def write(line: str) -> None:
    """A line in one system call: whole, and safe in a handler of signals, where Python's own streams are not."""
    with contextlib.suppress(OSError):
        os.write(2, line.encode("utf-8", "backslashreplace") + b"\n")


def catch_warnings(tool: str) -> None:
    """Let warnings of libraries be events too."""
    if as_json():
        warnings.showwarning = lambda message, category, *_, **__: emit(
            tool, "warning", level="warning", text=f"{category.__name__}: {message}"
        )


def _place() -> dict[str, Any]:
    """Which of many jobs, processes and attempts this is, where Slurm or torchrun say so."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    place = {
        "job": f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID"),
        "rank": _number(os.environ.get("RANK")),
        "restart": _number(os.environ.get("SLURM_RESTART_COUNT")),
    }
    return {key: value for key, value in place.items() if value is not None}


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,9}", text) else None


def _is_utf8() -> bool:
    encoding = getattr(sys.stderr, "encoding", None) or "ascii"
    return encoding.lower().replace("-", "") in ("utf8", "utf16", "utf32")
