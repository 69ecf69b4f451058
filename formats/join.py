"""Which shards make a whole: they must cover every row once and agree in all but their place."""

from __future__ import annotations

from typing import Any

from rbkit.formats.document import canonical
from rbkit.formats.errors import FormatError, printable

LOCAL = ("file", "rows", "first", "tensors", "sha256")


def order_shards(parts: list[tuple[str, list[dict[str, Any]]]]) -> list[str]:
    """File names in the order of their rows.

    parts: per file its streams, each a record with at least rows, first and total.
    Raises: FormatError naming the rows, and as a Slurm array the shards, that are missing.
    """
    streams = []
    for name, records in parts:
        if len(records) != 1:
            raise FormatError(f"{printable(name)}: holds {len(records)} streams, expected one shard")
        streams.append((records[0]["first"], records[0]["rows"], name, records[0]))
    streams.sort(key=lambda item: item[:2])
    reference = _common(streams[0][3])
    for _, _, name, record in streams[1:]:
        if _common(record) != reference:
            raise FormatError(f"{printable(name)}: made by other steps or options than {printable(streams[0][2])}")
    _check_cover([(first, rows, name) for first, rows, name, _ in streams], streams[0][3].get("total"))
    return [name for _, _, name, _ in streams]


def _common(record: dict[str, Any]) -> str:
    return canonical({key: value for key, value in record.items() if key not in LOCAL})


def _check_cover(spans: list[tuple[int, int, str]], total: Any) -> None:
    missing: list[tuple[int, int]] = []
    position = 0
    for first, rows, name in spans:
        if first < position:
            raise FormatError(f"{printable(name)}: repeats rows from {first}; they came before")
        if first > position:
            missing.append((position, first))
        position = first + rows
    if isinstance(total, int) and position < total:
        missing.append((position, total))
    if missing:
        gaps = ", ".join(f"{a} to {b - 1}" for a, b in missing)
        whole = f" of {total}" if isinstance(total, int) else ""
        raise FormatError(f"rows {gaps}{whole} are missing{_as_array(spans, missing, total)}")


def _as_array(spans: list[tuple[int, int, str]], missing: list[tuple[int, int]], total: Any) -> str:
    """`; sbatch --array=3,7-9` where the shards at hand tell how many there were."""
    shards = _shard_count(spans, total)
    if shards is None:
        return ""
    starts = {k: (k - 1) * total // shards for k in range(1, shards + 2)}
    lost = [
        k for k in range(1, shards + 1) if starts[k] < starts[k + 1] and any(a <= starts[k] < b for a, b in missing)
    ]
    return f" (shards of {shards}); try sbatch --array={ranges(lost)}"


def _shard_count(spans: list[tuple[int, int, str]], total: Any) -> int | None:
    """The smallest number of shards whose borders explain every span."""
    if not isinstance(total, int) or not total:
        return None
    for shards in range(len(spans) + 1, 4097):
        borders = {(k - 1) * total // shards: k * total // shards for k in range(1, shards + 1)}
        if all(borders.get(first) == first + rows for first, rows, _ in spans if rows):
            return shards
    return None


def ranges(numbers: list[int]) -> str:
    """Sorted numbers as Slurm writes an array: 3,7-9."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
