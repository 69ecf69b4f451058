"""Gates of rb-score: `--expect 'robust_accuracy >= 0.60'`, judged by a one-sided 95 % interval."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rbkit.cli._errors import CheckFailed, Inconclusive, Usage

PATTERN = re.compile(r"\s*([a-z_]+)\s*(>=|<=|>|<)\s*([-+0-9.eE]+)\s*")
CONFIDENCE = 0.90  # two-sided: each side is a one-sided 95 % bound


@dataclass(frozen=True)
class Gate:
    """A metric, a direction and a bound."""

    metric: str
    above: bool
    bound: float
    text: str

    def verdict(self, record: dict[str, Any]) -> str:
        """holds, fails or inconclusive for a record with interval bounds at CONFIDENCE."""
        low, high = record["low"], record["high"]
        if low is None or high is None:
            return "inconclusive"
        holds, fails = (low >= self.bound, high < self.bound) if self.above else (high <= self.bound, low > self.bound)
        if fails:
            return "fails"
        return "holds" if holds and record.get("complete", True) else "inconclusive"


def parse(texts: list[str] | None) -> list[Gate]:
    """Gates of the command line. Raises: Usage."""
    gates = []
    for text in texts or []:
        match = PATTERN.fullmatch(text)
        try:
            bound = float(match[3]) if match else None
        except ValueError:
            bound = None
        if match is None or bound is None:
            raise Usage(f"--expect: got {text!r}, expected METRIC >= NUMBER or METRIC <= NUMBER")
        gates.append(Gate(match[1], match[2].startswith(">"), bound, text.strip()))
    return gates


def judge(gates: list[Gate], records: list[dict[str, Any]]) -> None:
    """Raise CheckFailed or Inconclusive unless all matching records hold; Usage where none matches."""
    undecided = []
    for gate in gates:
        matching = [r for r in records if r["metric"] == gate.metric]
        if not matching:
            names = ", ".join(sorted({r["metric"] for r in records}))
            raise Usage(f"--expect {gate.text!r}: no such metric here; there are {names}")
        for record in matching:
            verdict = gate.verdict(record)
            shown = f"{gate.text}: {verdict}: {_shown(record)}"
            if verdict == "fails":
                raise CheckFailed(shown)
            if verdict == "inconclusive":
                undecided.append(shown)
    if undecided:
        raise Inconclusive(undecided[0] + "; more images would tell")


def _shown(record: dict[str, Any]) -> str:
    if record["value"] is None or record["low"] is None:
        return f"got no interval (n = {record['n']})"
    rows = "" if record.get("complete", True) else ", not all rows are here"
    return (
        f"got {record['value']:.4g}, 90 % interval {record['low']:.4g} to {record['high']:.4g}, n = {record['n']}{rows}"
    )
