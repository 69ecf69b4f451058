"""The positive control: images with a planted cue, on which it is known which of two models looks at the object.

Plain records in, plain records out. A metric that does not tell the two apart in the right direction proves nothing.
"""

from __future__ import annotations

from typing import Any

from rbkit.tools.compare import interpretability, is_standard, paired

SWAP_LOSS = 0.3  # accuracy that a standard model must lose when the cue lies, for the control to count
SWAP_KEPT = 0.1  # accuracy that the robust model may lose at most
CONTROL_CLEAN = 0.5  # accuracy below which a model leans on nothing much, so that it has nothing to lose


def is_cued(record: dict[str, Any]) -> bool:
    """Whether a record is of images with a planted cue (rb-data shapes --cue)."""
    return record.get("cue") is not None


def _cue_accuracies(records: list[dict[str, Any]]) -> dict[str, dict[bool, float]]:
    """Accuracy of the `standard` and the `robust` model, by whether the cue is swapped."""
    found: dict[str, dict[bool, float]] = {"standard": {}, "robust": {}}
    for record in records:
        if is_cued(record) and record["metric"] == "clean_accuracy" and record.get("kind") == "images":
            side = "standard" if is_standard(record) else "robust"
            found[side][bool(record.get("cue_shift"))] = record["value"]
    return found


def swap_losses(records: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy lost when the cue is that of another class, of the `standard` and of the `robust` model."""
    return _lost(_cue_accuracies(records))


def _lost(accuracies: dict[str, dict[bool, float]]) -> dict[str, float]:
    return {side: values[False] - values[True] for side, values in accuracies.items() if len(values) == 2}


def control_failings(records: list[dict[str, Any]]) -> list[str]:
    """Why the positive control does not count, if it does not: the swap of the cue decides, not the intention."""
    measured = _cue_accuracies(records)
    lost = _lost(measured)
    if len(lost) < 2:
        return ["the cue was not swapped for a standard and a robust model"]
    found = []
    if lost["standard"] < SWAP_LOSS:
        found.append(
            f"with a swapped cue the standard model loses {lost['standard']:.3f}, expected {SWAP_LOSS:g} or more"
        )
    if lost["robust"] > SWAP_KEPT:
        found.append(f"with a swapped cue the robust model loses {lost['robust']:.3f}, expected {SWAP_KEPT:g} at most")
    if measured["robust"][False] < CONTROL_CLEAN:
        found.append(
            f"the robust model has {measured['robust'][False]:.3f} clean accuracy, expected {CONTROL_CLEAN:g} or more"
        )
    return found


def validated(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs of `paired` on images with a true cue, each with `tells`: `yes` where the metric is better for the model
    that looks at the object, `no` where it is worse, `open` where the intervals touch."""
    cued = [r for r in records if is_cued(r) and not r.get("cue_shift")]
    tells = {"robust": "yes", "standard": "no", "open": "open"}
    return [{**row, "tells": tells[row["verdict"]]} for row in interpretability(paired(cued))]
