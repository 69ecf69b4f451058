"""Stages: attacks carried out on batches as they come, each on what the ones before it left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rbkit.tools import random
from rbkit.tools.attack import Attack
from rbkit.tools.flow import Flow, Poll, finished
from rbkit.tools.gpu import products
from rbkit.tools.losses import margin
from rbkit.tools.models import Evaluation
from rbkit.tools.norms import NORMS
from rbkit.tools.sameness import Narrowest, narrowing
from rbkit.tools.slots import Batch, Context, Outcome


@dataclass
class Attacked:
    """Results per row: adversarial images and their cost, success bool (N,), and int64 (N,) the target of a targeted attack.

    distance: of the nearest broken image known, (N,) in [0, 1] pixels, infinite where none is; only of fab-t to the end.
    """

    outcome: Outcome
    success: Tensor
    target: Tensor | None
    distance: Tensor | None = None


@dataclass
class _Tag:
    """What goes with a batch through an attack: the caller's tag, and what is known of its rows, logits (N, K) first."""

    tag: Any
    logits: Tensor
    earlier: Tensor | None
    broken: Tensor
    before: Attacked | None = None


def run(
    evaluation: Evaluation,
    spec: Attack,
    poll: Poll,
    *,
    refill: bool = True,
    judge: Evaluation | None = None,
    tf32: bool = False,
) -> Iterator[tuple[Any, Attacked]]:
    """Attack batches as they come; yields (tag of the batch, result) in order, rows refilled across ready batches.

    With a `judge`, images are made on `evaluation`, always to the end, and success is what the judge says. With `tf32`
    they are made by products in TF32 on a GPU, and judged in float32.
    """
    source, widths = poll, narrowing(evaluation)
    for stage in spec.stages():
        source = _Stage(evaluation, stage, source, refill=refill, judge=judge, widths=widths, tf32=tf32).poll
    for batch in finished(source):
        yield batch.tag.tag, batch.tag.before


class _Stage:
    """One attack of a sequence: takes batches from a source, and is a source of batches for the next."""

    def __init__(
        self,
        evaluation: Evaluation,
        spec: Attack,
        source: Poll,
        *,
        refill: bool,
        judge: Evaluation | None,
        widths: Narrowest | None,
        tf32: bool,
    ) -> None:
        self.evaluation, self.judge, self.source, self.tf32 = evaluation, judge, source, tf32
        self.spec = spec if judge is None else replace(spec, until="end")
        self.goal = spec.goal(evaluation)
        self.flow = Flow(
            self.goal, self.spec.ascent(), self._ready,
            block=evaluation.block, refill=refill, widths=widths, lanes=evaluation.lanes,
        )  # fmt: skip

    def _ready(self, wait: bool) -> Batch | None:
        batch = self.source(wait)
        with products(tf32=False):
            return None if batch is None else prepare(self.evaluation, self.spec, batch, judge=self.judge)

    def poll(self, wait: bool) -> Batch | None:
        """The next batch that is done, its result in the tag, and as what an earlier attack left in the context."""
        with products(tf32=self.tf32):
            found = self.flow.poll(wait)
        if found is None:
            return None
        batch, outcome = found
        known: _Tag = batch.tag
        result = self._result(batch, outcome)
        tag = known.tag
        if isinstance(tag, _Tag) and tag.before is not None:
            _add_cost(outcome, tag.before.outcome)
            tag = tag.tag
        context = {"label": batch.context["label"], "adversarial": outcome.images}
        if self.spec.targeted:
            context["target"] = batch.context["target"]
        return Batch(batch.ids, batch.clean, context, tag=replace(known, tag=tag, before=result))

    def _result(self, batch: Batch, outcome: Outcome) -> Attacked:
        """The outcome with what earlier attacks broke, judged on the images as they are stored."""
        known, reached = batch.tag, outcome.reached
        distance = self._distance(batch, outcome)
        before = batch.clean if known.earlier is None else known.earlier
        if self.spec.name == "fab-t":  # a point outside the ball is no result
            outcome.images = torch.where(reached[:, None, None, None], outcome.images, before)
        if known.earlier is not None or self.spec.keep == "batch":
            outcome.images[known.broken] = before[known.broken]
        if self.judge is not None or self.tf32:
            with products(tf32=False):  # also where a later attack, which asks for this batch, searches in TF32
                reached = self.spec.goal((self.judge or self.evaluation).logits)(outcome.images, batch.context)[1]
        target = batch.context["target"] if self.spec.targeted else None
        return Attacked(outcome, reached | known.broken, target, distance)

    def _distance(self, batch: Batch, outcome: Outcome) -> Tensor | None:
        """Of the nearest broken image, also among those of an earlier attack; 0 where the clean image is one."""
        if not _measures(self.spec, self.judge):
            return None
        known, distance = batch.tag, -outcome.value
        if known.earlier is not None:
            before = NORMS[self.spec.norm].size(known.earlier - batch.clean)
            distance = torch.where(known.broken, torch.minimum(distance, before), distance)
        return torch.where(batch.context["label"] != known.logits.argmax(1), torch.zeros_like(distance), distance)


def _add_cost(outcome: Outcome, before: Outcome) -> None:
    outcome.forwards += before.forwards
    outcome.backwards += before.backwards
    outcome.zero_gradients += before.zero_gradients


def prepare(evaluation: Evaluation, spec: Attack, batch: Batch, *, judge: Evaluation | None = None) -> Batch:
    """Labels, targets and the rows that need no attack.

    `context` may bring `label`, `target` and `adversarial` (an earlier attack's result, which is kept where it broke
    the row). Without labels the prediction stands in. Untargeted rows that are misclassified clean are skipped. With a
    `judge`, predictions and what is broken are its, while `evaluation` is the model that images are made on.
    """
    victim = evaluation if judge is None else judge
    # What the attack before this one has told of its rows is not computed again.
    before = batch.tag.before if isinstance(batch.tag, _Tag) else None
    logits = victim.logits(batch.clean) if before is None else batch.tag.logits
    prediction = logits.argmax(1)
    label = batch.context.get("label", prediction)
    context = {"label": label}
    skip = label != prediction
    if spec.targeted:
        target = batch.context.get("target")
        context["target"] = (
            choose_targets(batch.ids, label, logits.shape[1], seed=spec.seed) if target is None else target
        )
        skip = torch.zeros_like(skip)
    if spec.targets is not None:
        scores = logits if judge is None else evaluation.logits(batch.clean)
        context["targets"] = likeliest_others(scores, label, spec.targets)
        context["target"] = context["targets"][:, 0].clone()
    earlier, broken = batch.context.get("adversarial"), skip
    if earlier is not None:
        broken = before.success if before is not None else skip | spec.goal(victim.logits)(earlier, context)[1]
    skip = skip if _measures(spec, judge) else broken
    if spec.keep == "batch":  # rows that need no attack count in the mean all the same
        skip = torch.zeros_like(skip)
    order = (
        None if spec.keep == "batch" else hardest_first(logits, context, targeted=spec.targeted)
    )  # its mean is over neighbours
    return Batch(batch.ids, batch.clean, context, skip, _Tag(batch.tag, logits, earlier, broken), order)


def hardest_first(logits: Tensor, context: Context, *, targeted: bool = False) -> Tensor:
    """Rows by how far they are from the goal at their clean logits (N, K), the farthest first, int64 (N,).

    What takes all steps should begin early: begun last, it goes on when the rest of its block is padding.
    """
    near = -margin(logits, context["target"]) if targeted else margin(logits, context["label"])
    return near.argsort(stable=True)


def _measures(spec: Attack, judge: Evaluation | None) -> bool:
    """Whether distances are asked for: rows that an earlier attack broke are then searched too."""
    return spec.name == "fab-t" and spec.until == "end" and judge is None


def likeliest_others(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """The `count` classes with the highest logits apart from the label, most likely first, int64 (N, count) or fewer.

    Equal logits come in order of class. Raises: ValueError with a single class.
    """
    if logits.shape[1] < 2:
        raise ValueError("a targeted attack needs at least 2 classes")
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return others.argsort(dim=1, descending=True, stable=True)[:, : min(count, logits.shape[1] - 1)]


def choose_targets(ids: Tensor, labels: Tensor, classes: int, *, seed: int) -> Tensor:
    """One random class per row that is not its label, (N,). Raises: ValueError with a single class."""
    if classes < 2:
        raise ValueError("a targeted attack needs at least 2 classes")
    shift = 1 + random.integers(ids, classes - 1, seed=seed, purpose="target")
    return (labels + shift) % classes
