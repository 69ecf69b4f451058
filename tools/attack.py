"""Attacks: an ascent with a loss of the logits, or several in sequence on what the earlier ones left.

Sources: Goodfellow et al. 2015 (fgsm), Madry et al. 2018 (pgd), Croce and Hein 2020 (apgd, auto: arXiv 2003.01690).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rbkit.tools import random
from rbkit.tools.apgd import Apgd
from rbkit.tools.ascend import Plan, counted
from rbkit.tools.fab import Fab
from rbkit.tools.flow import Flow, Poll, finished
from rbkit.tools.losses import AIMED, LOSSES, clearly_above, fitting_loss, is_broken, margin
from rbkit.tools.models import Evaluation
from rbkit.tools.norms import NORMS, Norm
from rbkit.tools.sameness import Widths
from rbkit.tools.slots import Ascent, Batch, Context, Objective, Outcome, Start
from rbkit.tools.square import Square


@dataclass(frozen=True)
class Attack:
    """Parameters of an attack, as recorded; None where an attack has no such parameter.

    name: a key of ATTACKS. eps and step_size in [0, 1] pixels. start: random (uniform in the ball) or clean.
    loss: a key of LOSSES. targeted: ascend towards another class. until: broken (leave at the first success) or end.
    targets: other classes that each example is pushed to in turn. queries: forward passes of square. keep: `best` iterate
    of each example (also where None), `batch` or `last`, as in Plan. last_iterate: `unjudged` leaves the iterate after the
    last step out, as the paper's code does, so that the last step counts for nothing.
    """

    name: str
    norm: str
    eps: float
    steps: int | None = None
    step_size: float | None = None
    restarts: int = 1
    start: str | None = "random"
    loss: str | None = "ce"
    targeted: bool = False
    until: str = "broken"
    seed: int = 0
    targets: int | None = None
    queries: int | None = None
    keep: str | None = None
    last_iterate: str | None = None

    def plan(self) -> Plan:
        """Steps of a fixed length, as fgsm and pgd take them."""
        return Plan(
            NORMS[self.norm], self.eps, self.step_size or 0.0, counted(self.steps or 0, self.last_iterate), self.restarts,
            start=self._start(), stop=self.until == "broken", keep=self.keep or "best",
        )  # fmt: skip

    def ascent(self) -> Ascent:
        """The ascent that carries it out."""
        norm, steps, stop = NORMS[self.norm], self.steps or 0, self.until == "broken"
        if self.name in ("apgd-ce", "apgd-dlr", "apgd-t"):
            return Apgd(norm, self.eps, steps, self.restarts, start=self._start(), stop=stop)
        if self.name == "fab-t":
            start = random_start(norm, self.eps / 2, seed=self.seed)
            return Fab(norm, self.eps, steps, self.restarts, start=start, stop=stop)
        if self.name == "square":
            return Square(norm, self.eps, self.queries or 0, self.seed, self.restarts, stop=stop)
        return self.plan()

    def stages(self) -> tuple[Attack, ...]:
        """The attacks that it is made of, each on what the ones before it left (section 5 for `auto`)."""
        if self.name != "auto":
            return (self,)
        ball = {"norm": self.norm, "eps": self.eps, "seed": self.seed, "restarts": self.restarts}
        steps, targets = self.steps or STEPS, self.targets or TARGETS
        return (
            apgd_ce(steps=steps, until=self.until, **ball),  # type: ignore[arg-type]
            apgd_t(steps=steps, targets=targets, until=self.until, **ball),  # type: ignore[arg-type]
            fab_t(steps=steps, targets=targets, until="broken", **ball),  # type: ignore[arg-type]
            square(queries=self.queries or QUERIES, until=self.until, **ball),  # type: ignore[arg-type]
        )

    def _start(self) -> Start | None:
        return random_start(NORMS[self.norm], self.eps, seed=self.seed) if self.start == "random" else None

    def goal(self, model: Callable[[Tensor], Tensor]) -> Objective:
        """What it maximises on a model, images (N, C, H, W) to logits (N, K)."""
        if self.targets is not None:
            return aimed_objective(model, self.loss or "margin")
        if self.name == "apgd-dlr":
            return fitting_objective(model, self.loss or "dlr")
        return objective(model, self.loss or "ce", targeted=self.targeted)

    def settled(self, classes: int) -> Attack:
        """The parameters as they are with so many classes: fewer targets, another loss."""
        targets = None if self.targets is None else min(self.targets, classes - 1)
        if self.loss is None or self.name in ("fgsm", "pgd"):
            return replace(self, targets=targets)
        return replace(self, targets=targets, loss=fitting_loss(self.loss, classes, aimed=targets is not None))


STEPS, TARGETS, QUERIES = 100, 9, 5000  # of the standard protocol, with one restart


def fgsm(*, norm: str, eps: float, seed: int = 0, **options: object) -> Attack:
    """One step of length eps from the clean image (Goodfellow et al. 2015, section 4)."""
    return replace(Attack("fgsm", norm, eps, 1, eps, start="clean", seed=seed), **options)  # type: ignore[arg-type]


def pgd(
    *, norm: str, eps: float, steps: int = 20, step_size: float | None = None, seed: int = 0, **options: object
) -> Attack:
    """Projected gradient ascent (Madry et al. 2018, section 2.1); the step defaults to 2.5 eps / steps."""
    size = 2.5 * eps / steps if step_size is None else step_size
    return replace(Attack("pgd", norm, eps, steps, size, seed=seed), **options)  # type: ignore[arg-type]


def apgd_ce(*, norm: str, eps: float, steps: int = STEPS, **options: object) -> Attack:
    """APGD on the cross-entropy (Croce and Hein 2020, algorithm 1)."""
    return replace(Attack("apgd-ce", norm, eps, steps), **options)  # type: ignore[arg-type]


def apgd_dlr(*, norm: str, eps: float, steps: int = STEPS, **options: object) -> Attack:
    """APGD on the difference of logits ratio (section 4); on the margin with fewer than 3 classes."""
    return replace(Attack("apgd-dlr", norm, eps, steps, loss="dlr"), **options)  # type: ignore[arg-type]


def apgd_t(*, norm: str, eps: float, steps: int = STEPS, targets: int = TARGETS, **options: object) -> Attack:
    """APGD on the targeted dlr (section 4.1) towards each of the likeliest other classes in turn, `steps` for each; on
    the margin with fewer than 4 classes."""
    spec = Attack("apgd-t", norm, eps, steps, loss="dlr", targets=targets)
    return replace(spec, **options)  # type: ignore[arg-type]


def fab_t(*, norm: str, eps: float, steps: int = STEPS, targets: int = TARGETS, **options: object) -> Attack:
    """The nearest broken image, searched towards each of the likeliest other classes in turn (Croce and Hein 2020, arXiv
    1907.02044). Until `end` it gives each row's distance; until `broken` it stops at the first point inside the ball."""
    spec = Attack("fab-t", norm, eps, steps, start="clean", loss="margin", targets=targets, until="end")
    return replace(spec, **options)  # type: ignore[arg-type]


def square(*, norm: str, eps: float, queries: int = QUERIES, **options: object) -> Attack:
    """Random search over square patches, on the margin (Andriushchenko et al. 2020)."""
    return replace(Attack("square", norm, eps, start=None, loss="margin", queries=queries), **options)  # type: ignore[arg-type]


def auto(*, norm: str, eps: float, steps: int = STEPS, queries: int = QUERIES, **options: object) -> Attack:
    """AutoAttack's standard protocol: apgd-ce, apgd-t, fab-t and square in sequence, each on the rows still unbroken."""
    spec = Attack("auto", norm, eps, steps, start=None, loss=None, targets=TARGETS, queries=queries)
    return replace(spec, **options)  # type: ignore[arg-type]


ATTACKS: dict[str, Callable[..., Attack]] = {
    "fgsm": fgsm, "pgd": pgd, "apgd-ce": apgd_ce, "apgd-dlr": apgd_dlr, "apgd-t": apgd_t, "fab-t": fab_t,
    "square": square, "auto": auto,
}  # fmt: skip


def random_start(norm: Norm, eps: float, *, seed: int) -> Start:
    """Starts uniform in the ball, cut to the box, as a function of (seed, id, restart)."""

    def start(ids: Tensor, clean: Tensor, restart: Tensor) -> Tensor:
        delta = norm.start(ids, tuple(clean.shape[1:]), eps, seed=seed, draw=restart)
        return (clean + norm.project(delta, eps)).clamp(0, 1)

    return start


def objective(model: Callable[[Tensor], Tensor], loss: str = "ce", *, targeted: bool = False) -> Objective:
    """The loss to raise at `context["label"]`, or (targeted) to lower at `context["target"]`."""
    measure = LOSSES[loss]

    def untargeted_objective(images: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        logits = model(images)
        return measure(logits, context["label"]), is_broken(logits.detach(), context["label"])

    def targeted_objective(images: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        logits = model(images)
        found = logits.detach()
        return -measure(logits, context["target"]), clearly_above(-margin(found, context["target"]), found)

    return targeted_objective if targeted else untargeted_objective


def fitting_objective(model: Callable[[Tensor], Tensor], loss: str) -> Objective:
    """The loss to raise at `context["label"]`, where it is defined for the model's number of classes, else the margin."""

    def measure(images: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        logits, label = model(images), context["label"]
        chosen = LOSSES[fitting_loss(loss, logits.shape[1], aimed=False)]
        return chosen(logits, label), is_broken(logits.detach(), label)

    return measure


def aimed_objective(model: Callable[[Tensor], Tensor], loss: str) -> Objective:
    """A loss that rises towards `context["target"]`; reached as soon as `context["label"]` is no longer predicted."""

    def measure(images: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        logits, label = model(images), context["label"]
        chosen = AIMED[fitting_loss(loss, logits.shape[1], aimed=True)]
        return chosen(logits, label, context["target"]), is_broken(logits.detach(), label)

    return measure


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


@dataclass
class Attacked:
    """Results per row: adversarial images, success, cost, and what the clean image was predicted as.

    distance: of the nearest broken image known, (N,) in [0, 1] pixels, infinite where none is; only of fab-t to the end.
    """

    outcome: Outcome
    success: Tensor
    clean_prediction: Tensor
    target: Tensor | None
    distance: Tensor | None = None


@dataclass
class _Tag:
    """What goes with a batch through an attack: the caller's tag, and what is known of its rows."""

    tag: Any
    prediction: Tensor
    earlier: Tensor | None
    broken: Tensor
    before: Attacked | None = None


def prepare(evaluation: Evaluation, spec: Attack, batch: Batch, *, judge: Evaluation | None = None) -> Batch:
    """Labels, targets and the rows that need no attack.

    `context` may bring `label`, `target` and `adversarial` (an earlier attack's result, which is kept where it broke
    the row). Without labels the prediction stands in. Untargeted rows that are misclassified clean are skipped. With a
    `judge`, predictions and what is broken are its, while `evaluation` is the model that images are made on.
    """
    victim = evaluation if judge is None else judge
    logits = victim.logits(batch.clean)
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
        broken = skip | spec.goal(victim.logits)(earlier, context)[1]
    skip = skip if _measures(spec, judge) else broken
    if spec.keep == "batch":  # rows that need no attack count in the mean all the same
        skip = torch.zeros_like(skip)
    return Batch(batch.ids, batch.clean, context, skip, _Tag(batch.tag, prediction, earlier, broken))


def _measures(spec: Attack, judge: Evaluation | None) -> bool:
    """Whether distances are asked for: rows that an earlier attack broke are then searched too."""
    return spec.name == "fab-t" and spec.until == "end" and judge is None


def run(
    evaluation: Evaluation, spec: Attack, poll: Poll, *, refill: bool = True, judge: Evaluation | None = None
) -> Iterator[tuple[object, Attacked]]:
    """Attack batches as they come; yields (tag of the batch, result) in order, rows refilled across ready batches.

    With a `judge`, images are made on `evaluation`, always to the end, and success is what the judge says.
    """
    source, widths = poll, Widths(evaluation)
    for stage in spec.stages():
        source = _Stage(evaluation, stage, source, refill=refill, judge=judge, widths=widths).poll
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
        widths: Widths,
    ) -> None:
        self.evaluation, self.judge, self.source = evaluation, judge, source
        self.spec = spec if judge is None else replace(spec, until="end")
        self.goal = spec.goal(evaluation)
        block = evaluation.block
        self.flow = Flow(self.goal, self.spec.ascent(), self._ready, block=block, refill=refill, widths=widths)

    def _ready(self, wait: bool) -> Batch | None:
        batch = self.source(wait)
        return None if batch is None else prepare(self.evaluation, self.spec, batch, judge=self.judge)

    def poll(self, wait: bool) -> Batch | None:
        """The next batch that is done, its result in the tag, and as what an earlier attack left in the context."""
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
        return Batch(batch.ids, batch.clean, context, tag=replace(known, tag=tag, before=result))

    def _result(self, batch: Batch, outcome: Outcome) -> Attacked:
        """The outcome with what earlier attacks broke, judged on the images as they are stored."""
        known, reached = batch.tag, outcome.reached
        distance = self._distance(batch, outcome)
        if self.spec.name == "fab-t":  # a point outside the ball is no result
            fallback = batch.clean if known.earlier is None else known.earlier
            outcome.images = torch.where(reached[:, None, None, None], outcome.images, fallback)
        if known.earlier is not None or self.spec.keep == "batch":
            before = batch.clean if known.earlier is None else known.earlier
            outcome.images[known.broken] = before[known.broken]
        if self.judge is not None:
            reached = self.spec.goal(self.judge.logits)(outcome.images, batch.context)[1]
        target = batch.context["target"] if self.spec.targeted else None
        return Attacked(outcome, reached | known.broken, known.prediction, target, distance)

    def _distance(self, batch: Batch, outcome: Outcome) -> Tensor | None:
        """Of the nearest broken image, also among those of an earlier attack; 0 where the clean image is one."""
        if not _measures(self.spec, self.judge):
            return None
        known, distance = batch.tag, -outcome.value
        if known.earlier is not None:
            before = NORMS[self.spec.norm].size(known.earlier - batch.clean)
            distance = torch.where(known.broken, torch.minimum(distance, before), distance)
        return torch.where(batch.context["label"] != known.prediction, torch.zeros_like(distance), distance)


def _add_cost(outcome: Outcome, before: Outcome) -> None:
    outcome.forwards += before.forwards
    outcome.backwards += before.backwards
    outcome.zero_gradients += before.zero_gradients
