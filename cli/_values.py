"""Texts of the command line as values; each refusal is a usage failure that names the option."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from rbkit.cli._errors import Usage

NORMS = ("l2", "linf")
LAST_ITERATES = ("judged", "unjudged")


def number(text: str, *, option: str, low: float = 0.0, high: float = math.inf) -> float:
    """A decimal number or a fraction like 8/255, in [low, high]."""
    try:
        value = float(Fraction(text.strip().replace(" ", ""))) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        raise Usage(f"{option}: got {text!r}, expected a number such as 0.5 or 8/255") from None
    if not math.isfinite(value) or not low <= value <= high:
        raise Usage(f"{option}: got {text}, expected a number from {low:g} to {high:g}")
    return value


def numbers(text: str, *, option: str, low: float = 0.0, high: float = math.inf) -> list[float]:
    """Numbers separated by commas."""
    return [number(part, option=option, low=low, high=high) for part in text.split(",")]


def counts(text: str, *, option: str) -> tuple[int, int, int]:
    """TRAIN,VAL,TEST, such as 600,50,60, not all of them 0."""
    parts = text.split(",")
    if len(parts) != 3 or not all(p.isdecimal() for p in parts) or not any(map(int, parts)):
        raise Usage(f"{option}: got {text!r}, expected three counts such as 600,50,60")
    train, val, test = map(int, parts)
    return train, val, test


def choice(text: str, allowed: Sequence[str], *, option: str) -> str:
    """One of `allowed`."""
    if text not in allowed:
        raise Usage(f"{option}: got {text!r}, expected one of {', '.join(allowed)}")
    return text


def choices(options: Mapping[str, Any], **allowed: Sequence[str]) -> None:
    """Of each option that is named and given (not None), one of what is allowed."""
    for name, values in allowed.items():
        if options[name] is not None:
            choice(options[name], values, option=f"--{name.replace('_', '-')}")


def shard(text: str | None) -> tuple[int, int] | None:
    """K/N with 1 <= K <= N; `slurm/N` takes K, and `slurm` both, from the task of a Slurm array."""
    if text is None:
        return None
    left, slash, right = (_of_slurm(text) if text.startswith("slurm") else text).partition("/")
    if not (slash and left.isdecimal() and right.isdecimal() and 1 <= int(left) <= int(right)):
        raise Usage(f"--shard: got {text!r}, expected K/N with 1 <= K <= N, such as 1/4")
    return int(left), int(right)


def _of_slurm(text: str) -> str:
    """K/N for the array task that this is. An array of some shards alone does not tell how many there are."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if task is None:
        raise Usage(f"--shard {text}: no SLURM_ARRAY_TASK_ID here, expected a task of sbatch --array=1-N")
    if text != "slurm":
        return f"{task}{text.removeprefix('slurm')}"
    low, high = os.environ.get("SLURM_ARRAY_TASK_MIN"), os.environ.get("SLURM_ARRAY_TASK_MAX")
    count = os.environ.get("SLURM_ARRAY_TASK_COUNT")
    if low != "1" or high != count:
        raise Usage(f"--shard slurm: an array of {count} tasks from {low} to {high}, expected 1-N; try --shard slurm/N")
    return f"{task}/{count}"


def size(text: str, *, option: str) -> tuple[int, int, int]:
    """CxHxW, such as 3x32x32."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(p.isdecimal() and int(p) for p in parts):
        raise Usage(f"{option}: got {text!r}, expected CxHxW such as 3x32x32")
    channels, height, width = map(int, parts)
    return channels, height, width


def grid(text: str, *, option: str) -> tuple[int, int]:
    """N or RxC, such as 8 or 3x4: blocks down and across."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdecimal() and int(p) for p in parts):
        raise Usage(f"{option}: got {text!r}, expected N or RxC such as 8 or 3x4")
    return int(parts[0]), int(parts[-1])


def block(value: int | None) -> None:
    """Refuse a block that is no multiple of 32."""
    if value is not None and value % 32:
        raise Usage(f"--block: got {value}, expected a multiple of 32")
