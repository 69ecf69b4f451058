"""rb-score --flags: a small sample of each attacked pool is gathered, checked at the end, and judged as a gate."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rbkit.cli._errors import CheckFailed, Inconclusive, Input, Usage, blame

if TYPE_CHECKING:
    from rbkit.tools.batch import Batch
    from rbkit.tools.flags import Flag
    from rbkit.tools.models import Evaluation
    from rbkit.tools.pool import Pools
    from rbkit.tools.trial import Sample


@dataclass
class _Subject:
    """A pool of one model and attack, and the rows that speak for it."""

    about: dict[str, Any]
    evaluation: Evaluation
    sample: Sample


class Flags:
    """Samples by what they are about."""

    def __init__(self) -> None:
        self.subjects: dict[str, _Subject] = {}

    def add(self, batch: Batch, about: dict[str, Any]) -> None:
        """Take in the rows of a chunk; of all that came only those stay that the sample draws. Raises: Input."""
        from rbkit.tools.trial import Sample

        if batch.adversarial is None or batch.label is None or about.get("eps") == 0:
            return  # nothing was attacked
        rows = Sample(batch.ids, batch.image, batch.adversarial, batch.label, batch.attack_target)
        key = json.dumps(about, sort_keys=True)
        known = self.subjects.get(key)
        with blame(Input, ValueError):
            joined = rows if known is None else known.sample.joined(rows)
        self.subjects[key] = _Subject(about, batch.evaluation, joined.drawn())

    def records(self, pools: Pools) -> list[dict[str, Any]]:
        """A record per check and pool. Raises: Usage where nothing can be checked."""
        from rbkit.tools.flags import flags

        if not self.subjects:
            raise Usage("--flags: no attacked rows here, expected a stream of rb-attack of eps above 0")
        found = []
        for subject in self.subjects.values():
            about = subject.about
            if about.get("eps") is None:
                raise Usage("--flags: the attack has no eps, expected one in a ball; try rb-attack --eps")
            complete = pools.of(about).complete
            with blame(Usage, ValueError, prefix="--flags: "):
                checks = flags(subject.evaluation, subject.sample, norm=about["norm"], eps=about["eps"])
            found += [_record(flag) | {"complete": complete, **about} for flag in checks]
        return found


def _record(flag: Flag) -> dict[str, Any]:
    from rbkit.tools.flags import FLAGS
    from rbkit.tools.statistics import finite_or_none

    record = {
        "metric": f"flag:{flag.name}", "value": finite_or_none(flag.value), "low": None, "high": None, "n": flag.n,
        "unit": flag.unit, "better": "lower", "flag": flag.name, "fires": flag.fires, "limit": flag.limit,
        "detail": flag.detail, "source": FLAGS[flag.name],
    }  # fmt: skip
    return record if flag.decided else record | {"reason": "too few rows to tell"}


def refuse_fired(records: list[dict[str, Any]]) -> None:
    """Raise CheckFailed where a flag fires."""
    fired = [r for r in records if r.get("fires")]
    if fired:
        shown = ", ".join(sorted({r["flag"] for r in fired}))
        raise CheckFailed(f"--flags: {shown}: {fired[0]['detail']}")


def refuse_undecided(records: list[dict[str, Any]]) -> None:
    """Raise Inconclusive where a flag cannot be told, or where not all rows are here."""
    for record in records:
        if "fires" in record and (record["fires"] is None or not record["complete"]):
            why = record["detail"] if record["fires"] is None else "not all rows are here"
            raise Inconclusive(f"--flags: {record['flag']}: undecided: {why}")
