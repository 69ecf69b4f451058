"""Which shards make a whole: they must cover every row once and agree in all but their place."""

from __future__ import annotations

from typing import Any

from rbkit.formats.document import canonical
from rbkit.formats.errors import FormatError, printable

LOCAL = ("file", "rows", "first", "tensors", "sha256")


def order_shards(parts: list[tuple[str, list[dict[str, Any]]]]) -> list[list[str]]:
    """For each stream that the files hold, in turn, their names in the order of its rows.

    parts: per file its streams, each a record with at least rows, first and total; several where an attack has several radii.
    Raises: FormatError naming the rows, and as a Slurm array the shards, that are missing.
    """
    name, records = parts[0]
    for other, its in parts[1:]:
        if len(its) != len(records):
            raise FormatError(
                f"{printable(other)}: holds {_streams(its)}, expected {_streams(records)} as in {printable(name)}"
            )
    return [_ordered([(name, records[place]) for name, records in parts]) for place in range(len(records))]


def _streams(records: list[dict[str, Any]]) -> str:
    return f"{len(records)} stream{'s' * (len(records) != 1)}"


def _ordered(shards: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Names of the files in the order of the rows of one stream, of which each holds a shard."""
    shards = sorted(shards, key=lambda shard: (shard[1]["first"], shard[1]["rows"], shard[0]))
    (first, reference), *others = shards
    for name, record in others:
        if _common(record) != _common(reference):
            raise FormatError(f"{printable(name)}: made by other steps or options than {printable(first)}")
    _check_cover([(record["first"], record["rows"], name) for name, record in shards], reference.get("total"))
    return [name for name, _ in shards]


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
