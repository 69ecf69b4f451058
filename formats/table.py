"""Records as JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rbkit.formats.document import strict_json
from rbkit.formats.errors import FormatError, printable


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises: FormatError naming the line, OSError."""
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        shown = f"{printable(str(path), limit=200)}: line {number}"
        record = strict_json(line, what=shown)
        if not isinstance(record, dict):
            raise FormatError(f"{shown}: expected an object")
        records.append(record)
    return records
