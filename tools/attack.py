"""Attacks: the ascent loop with a loss of the logits (Goodfellow et al. 2015; Madry et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rbkit.tools import random
from rbkit.tools.ascend import Batch, Context, Objective, Outcome, Plan, Poll, flow
from rbkit.tools.models import Evaluation
from rbkit.tools.norms import NORMS, Norm

TIE = 1e-5  # of the logit range: below it a prediction may differ between equal computations


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per row (N,), from logits by log-sum-exp."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the label's, (N,): positive where the prediction is wrong."""
    others = logits.scatter(1, labels[:, None], float("-inf")).amax(1)
    return others - logits.gather(1, labels[:, None])[:, 0]


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein 2020, eq. 6): the margin over the gap of first to third logit.

    Raises: ValueError with fewer than 3 classes, where it is not defined.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"the dlr loss needs at least 3 classes, got {logits.shape[1]}; try --loss margin")
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def clearly_above(difference: Tensor, logits: Tensor) -> Tensor:
    """Whether a logit difference exceeds the tie margin, bool (N,)."""
    return difference > TIE * (logits.amax(1) - logits.amin(1))


def is_broken(logits: Tensor, labels: Tensor) -> Tensor:
    """Rows whose prediction is clearly not the label, bool (N,)."""
    return clearly_above(margin(logits, labels), logits)


@dataclass(frozen=True)
class Attack:
    """Parameters of an attack, as recorded.

    name: fgsm or pgd. eps and step_size in [0, 1] pixels. start: random (uniform in the ball) or clean.
    loss: a key of LOSSES. targeted: ascend towards another class. until: broken (leave at the first success) or end.
    """

    name: str
    norm: str
    eps: float
    steps: int
    step_size: float
    restarts: int = 1
    start: str = "random"
    loss: str = "ce"
    targeted: bool = False
    until: str = "broken"
    seed: int = 0

    def plan(self) -> Plan:
        """The ascent that carries it out."""
        norm = NORMS[self.norm]
        start = random_start(norm, self.eps, seed=self.seed) if self.start == "random" else None
        return Plan(
            norm, self.eps, self.step_size, self.steps, self.restarts, start=start, stop=self.until == "broken"
        )  # fmt: skip


def fgsm(*, norm: str, eps: float, seed: int = 0, **options: object) -> Attack:
    """One step of length eps from the clean image (Goodfellow et al. 2015, section 4)."""
    return replace(Attack("fgsm", norm, eps, 1, eps, start="clean", seed=seed), **options)  # type: ignore[arg-type]


def pgd(
    *, norm: str, eps: float, steps: int = 20, step_size: float | None = None, seed: int = 0, **options: object
) -> Attack:
    """Projected gradient ascent (Madry et al. 2018, section 2.1); the step defaults to 2.5 eps / steps."""
    size = 2.5 * eps / steps if step_size is None else step_size
    return replace(Attack("pgd", norm, eps, steps, size, seed=seed), **options)  # type: ignore[arg-type]


ATTACKS: dict[str, Callable[..., Attack]] = {"fgsm": fgsm, "pgd": pgd}


def random_start(norm: Norm, eps: float, *, seed: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
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


def choose_targets(ids: Tensor, labels: Tensor, classes: int, *, seed: int) -> Tensor:
    """One random class per row that is not its label, (N,). Raises: ValueError with a single class."""
    if classes < 2:
        raise ValueError("a targeted attack needs at least 2 classes")
    shift = 1 + random.integers(ids, classes - 1, seed=seed, purpose="target")
    return (labels + shift) % classes


@dataclass
class Attacked:
    """Results per row: adversarial images, success, cost, and what the clean image was predicted as."""

    outcome: Outcome
    success: Tensor
    clean_prediction: Tensor
    target: Tensor | None


def prepare(evaluation: Evaluation, spec: Attack, batch: Batch) -> Batch:
    """Labels, targets and the rows that need no attack.

    `context` may bring `label`, `target` and `adversarial` (an earlier attack's result, which is kept where it broke
    the row). Without labels the prediction stands in. Untargeted rows that are misclassified clean are skipped.
    """
    logits = evaluation.logits(batch.clean)
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
    earlier = batch.context.get("adversarial")
    if earlier is not None:
        skip = skip | objective(evaluation.logits, spec.loss, targeted=spec.targeted)(earlier, context)[1]
    return Batch(batch.ids, batch.clean, context, skip, (batch.tag, prediction, earlier))


def slots_matter(evaluation: Evaluation, images: Tensor, labels: Tensor) -> bool:
    """Whether a row's logits or input gradient depend, to the last bit, on its slot or on its neighbours.

    One block of `images` is computed as it is, in reverse order, and with every other row replaced by the first.
    """
    block = evaluation.block
    rows = torch.arange(block, device=images.device) % len(images)
    images, labels = images[rows], labels[rows]
    value, gradient = _probe(evaluation, images, labels)
    reverse = _probe(evaluation, images.flip(0), labels.flip(0))
    lonely, targets = images.clone(), labels.clone()
    lonely[1::2], targets[1::2] = images[0], labels[0]
    alone = _probe(evaluation, lonely, targets)
    same = torch.equal(value, reverse[0].flip(0)) and torch.equal(gradient, reverse[1].flip(0))
    return not (same and torch.equal(value[::2], alone[0][::2]) and torch.equal(gradient[::2], alone[1][::2]))


def _probe(evaluation: Evaluation, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    images = images.detach().requires_grad_()
    logits = evaluation(images)
    return logits.detach(), torch.autograd.grad(cross_entropy(logits, labels).sum(), images)[0]


def run(evaluation: Evaluation, spec: Attack, poll: Poll, *, refill: bool = True) -> Iterator[tuple[object, Attacked]]:
    """Attack batches as they come; yields (tag of the batch, result) in order, rows refilled across ready batches."""

    def ready(wait: bool) -> Batch | None:
        batch = poll(wait)
        return None if batch is None else prepare(evaluation, spec, batch)

    goal = objective(evaluation, spec.loss, targeted=spec.targeted)
    for batch, outcome in flow(goal, spec.plan(), ready, block=evaluation.block, refill=refill):
        tag, prediction, earlier = batch.tag
        assert batch.skip is not None
        if earlier is not None:
            outcome.images[batch.skip] = earlier[batch.skip]
        success = outcome.reached | batch.skip
        yield tag, Attacked(outcome, success, prediction, batch.context.get("target"))
