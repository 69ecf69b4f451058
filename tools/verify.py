"""Rechecks of adversarial images from their bytes: each check says which rows fail it, and by how much."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rbkit.tools.losses import is_broken
from rbkit.tools.models import Evaluation
from rbkit.tools.norms import NORMS
from rbkit.tools.quantise import leaves_ball


def not_finite(images: Tensor) -> Tensor:
    """Rows of images (N, C, H, W) that hold a NaN or an infinity, bool (N,)."""
    return ~images.isfinite().flatten(1).all(1)


def box_excess(images: Tensor) -> Tensor:
    """How far each row of images (N, C, H, W) leaves [0, 1], float64 (N,); entries that are not finite do not count."""
    values = torch.where(images.isfinite(), images, 0).double()
    return torch.maximum(values - 1, -values).clamp_min(0).flatten(1).amax(1)


def off_ball(adversarial: Tensor, clean: Tensor, *, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """Rows outside the ball alone, bool (N,), and their norm less eps, float64 (N,).

    The box and finiteness have checks of their own: both images are cut to the box first, where one fault
    would otherwise be reported under two names, and rows that are not finite never count.
    """
    inside, origin = adversarial.clamp(0, 1), clean.clamp(0, 1)
    measurable = ~(not_finite(adversarial) | not_finite(clean))
    size = NORMS[norm].size(inside.double() - origin.double())
    excess = torch.where(measurable, size - eps, torch.zeros_like(size))
    return leaves_ball(inside, origin, norm=norm, eps=eps) & measurable, excess


def out_of_range(labels: Tensor, classes: int) -> Tensor:
    """Labels (N,) that are no class of the model, bool (N,)."""
    return (labels < 0) | (labels >= classes)


def success_differs(success: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Rows whose stored success, bool (N,), is not what logits (N, K) say; labels out of range never count."""
    usable = ~out_of_range(labels, logits.shape[1])
    broken = is_broken(logits, labels.clamp(0, logits.shape[1] - 1))
    return (success.bool() != broken) & usable


# ---------------------------------------------------------------------------------------------- a whole stream

SHOWN = 5  # ids that a check names


@dataclass
class Check:
    """What one check found: rows looked at, rows that fail, the first ids among them, and the largest excess."""

    name: str
    rows: int = 0
    failed: int = 0
    ids: list[int] = field(default_factory=list)
    excess: float | None = None

    def add(self, ids: Tensor, wrong: Tensor, excess: Tensor | None = None) -> None:
        """Rows with their ids (N,), whether each fails, bool (N,), and by how much (N,)."""
        self.rows += len(ids)
        self.failed += int(wrong.sum())
        self.ids += ids[wrong].tolist()[: SHOWN - len(self.ids)]
        if excess is not None and bool(wrong.any()):
            self.excess = max(self.excess or 0.0, float(excess[wrong].max()))


@dataclass(frozen=True)
class Rows:
    """Rows to be rechecked: ids (N,), image and adversarial float32 (N, C, H, W), label and success (N,) or None."""

    ids: Tensor
    image: Tensor
    adversarial: Tensor
    label: Tensor | None = None
    success: Tensor | None = None


def fingerprint(image: Tensor) -> bytes:
    """Digest of one image's float32 values (C, H, W)."""
    return hashlib.blake2b(image.to(torch.float32).contiguous().numpy().tobytes(), digest_size=16).digest()


class Clean:
    """The clean counterpart: label and digest by id, so that rows are matched by id, in any order."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[int | None, bytes]] = {}

    def add(self, ids: Tensor, image: Tensor, label: Tensor | None) -> None:
        """Clean rows."""
        labels = [None] * len(ids) if label is None else label.tolist()
        for key, value, picture in zip(ids.tolist(), labels, image.cpu(), strict=True):
            self.rows[key] = (value, fingerprint(picture))


class Recheck:
    """Checks of one attacked stream, row by row; each row is blamed for what it is, once.

    Success is told only of rows on which all else holds: a wrong label or a NaN has consequences, not further faults.
    """

    def __init__(
        self, evaluation: Evaluation, *, classes: int, norm: str, eps: float, clean: Clean | None = None
    ) -> None:
        self.evaluation, self.classes, self.norm, self.eps, self.clean = evaluation, classes, norm, eps, clean
        names = ["ids", "labels", "finite", "box", "ball", "success"]
        names += [] if clean is None else ["clean-ids", "clean-labels", "clean-images"]
        self.checks = {name: Check(name) for name in names}
        self.seen: set[int] = set()
        self.broken = 0

    def add(self, rows: Rows) -> None:
        """Recheck the next rows of the stream."""
        bad = self._tell("ids", rows, self._repeated(rows.ids))
        if rows.label is not None:
            bad |= self._tell("labels", rows, out_of_range(rows.label, self.classes))
        bad |= self._tell("finite", rows, not_finite(rows.adversarial) | not_finite(rows.image))
        outside = torch.maximum(box_excess(rows.adversarial), box_excess(rows.image))
        bad |= self._tell("box", rows, outside > 0, outside)
        bad |= self._tell("ball", rows, *off_ball(rows.adversarial, rows.image, norm=self.norm, eps=self.eps))
        if self.clean is not None:
            bad |= self._compare(rows, self.clean)
        self._predict(rows, ~bad)

    def _tell(self, name: str, rows: Rows, wrong: Tensor, excess: Tensor | None = None) -> Tensor:
        self.checks[name].add(rows.ids, wrong, excess)
        return wrong.clone()

    def _repeated(self, ids: Tensor) -> Tensor:
        wrong = []
        for key in ids.tolist():
            wrong.append(key in self.seen)
            self.seen.add(key)
        return torch.tensor(wrong, dtype=torch.bool, device=ids.device)

    def _compare(self, rows: Rows, clean: Clean) -> Tensor:
        """Against the clean counterpart: ids that it lacks, labels and images that are others."""
        known = [clean.rows.get(key) for key in rows.ids.tolist()]
        labels = [None] * len(known) if rows.label is None else rows.label.tolist()
        pairs = list(zip(known, labels, rows.image.cpu(), strict=True))
        wrong = {
            "clean-ids": [row is None for row in known],
            "clean-labels": [
                row is not None and None not in (row[0], label) and row[0] != label for row, label, _ in pairs
            ],
            "clean-images": [row is not None and row[1] != fingerprint(image) for row, _, image in pairs],
        }
        bad = torch.zeros(len(known), dtype=torch.bool, device=rows.ids.device)
        for name, found in wrong.items():
            bad |= self._tell(name, rows, torch.tensor(found, dtype=torch.bool, device=rows.ids.device))
        return bad

    def _predict(self, rows: Rows, sound: Tensor) -> None:
        """A second forward pass: what is broken, and whether the stream says so too."""
        if not bool(sound.any()):
            return
        logits = self.evaluation.logits(rows.adversarial[sound])
        label = self.evaluation.logits(rows.image[sound]).argmax(1) if rows.label is None else rows.label[sound]
        self.broken += int(is_broken(logits, label).sum())
        if rows.success is not None:
            wrong = success_differs(rows.success[sound], logits, label)
            self.checks["success"].add(rows.ids[sound], wrong)

    def missing(self) -> list[int]:
        """Ids of the clean counterpart that the stream lacks, in order."""
        return [] if self.clean is None else sorted(set(self.clean.rows) - self.seen)
