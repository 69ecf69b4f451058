"""Attacks: an ascent with a loss of the logits, or several in sequence (carried out by `stages`).

Sources: Goodfellow et al. 2015 (fgsm), Madry et al. 2018 (pgd), Croce and Hein 2020 (apgd, auto: arXiv 2003.01690).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from rbkit.tools.apgd import Apgd
from rbkit.tools.ascend import Plan, counted
from rbkit.tools.fab import Fab
from rbkit.tools.losses import (
    AIMED,
    LOSSES,
    clearly_above,
    fitting_loss,
    is_broken,
    margin,
    targeted_margin,
    tie,
)
from rbkit.tools.norms import NORMS, Norm
from rbkit.tools.slots import Ascent, Context, Objective, Start
from rbkit.tools.square import Square

STEPS, TARGETS, QUERIES = 100, 9, 5000  # of the standard protocol, with one restart


@dataclass(frozen=True)
class Attack:
    """Parameters of an attack, as recorded; None where an attack has no such parameter.

    name: a key of ATTACKS. eps and step_size in [0, 1] pixels. start: random (uniform in the ball) or clean.
    loss: a key of LOSSES. targeted: ascend towards another class. until: broken (leave at the first success) or end.
    targets: other classes that each example is pushed to in turn. queries: forward passes of square. keep: `best` iterate
    of each example (also where None), `batch` or `last`, as in Plan. last_iterate: `unjudged` leaves the iterate after the
    last step out, as the paper's code does, so that the last step counts for nothing. sprint: so many steps of length eps
    from the clean image come first; what they break needs no more.
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
    sprint: int | None = None

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
        if self.sprint is not None:
            whole = replace(self, sprint=None)
            return replace(whole, steps=self.sprint, step_size=self.eps, start="clean", restarts=1), whole
        if self.name != "auto":
            return (self,)
        ball: dict[str, Any] = {"norm": self.norm, "eps": self.eps, "seed": self.seed, "restarts": self.restarts}
        steps, targets = self.steps or STEPS, self.targets or TARGETS
        return (
            apgd_ce(steps=steps, until=self.until, **ball),
            apgd_t(steps=steps, targets=targets, until=self.until, **ball),
            fab_t(steps=steps, targets=targets, until="broken", **ball),
            square(queries=self.queries or QUERIES, until=self.until, **ball),
        )

    def _start(self) -> Start | None:
        return random_start(NORMS[self.norm], self.eps, seed=self.seed) if self.start == "random" else None

    def goal(self, model: Callable[[Tensor], Tensor]) -> Objective:
        """What it maximises on a model, images (N, C, H, W) to logits (N, K)."""
        if self.name == "fab-t":
            return boundary_objective(model)
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


def fgsm(*, norm: str, eps: float, seed: int = 0, **options: Any) -> Attack:
    """One step of length eps from the clean image (Goodfellow et al. 2015, section 4)."""
    return replace(Attack("fgsm", norm, eps, 1, eps, start="clean", seed=seed), **options)


def pgd(
    *, norm: str, eps: float, steps: int = 20, step_size: float | None = None, seed: int = 0, **options: Any
) -> Attack:
    """Projected gradient ascent (Madry et al. 2018, section 2.1); the step defaults to 2.5 eps / steps."""
    size = 2.5 * eps / steps if step_size is None else step_size
    return replace(Attack("pgd", norm, eps, steps, size, seed=seed), **options)


def apgd_ce(*, norm: str, eps: float, steps: int = STEPS, **options: Any) -> Attack:
    """APGD on the cross-entropy (Croce and Hein 2020, algorithm 1)."""
    return replace(Attack("apgd-ce", norm, eps, steps), **options)


def apgd_dlr(*, norm: str, eps: float, steps: int = STEPS, **options: Any) -> Attack:
    """APGD on the difference of logits ratio (section 4); on the margin with fewer than 3 classes."""
    return replace(Attack("apgd-dlr", norm, eps, steps, loss="dlr"), **options)


def apgd_t(*, norm: str, eps: float, steps: int = STEPS, targets: int = TARGETS, **options: Any) -> Attack:
    """APGD on the targeted dlr (section 4.1) towards each of the likeliest other classes in turn, `steps` for each; on
    the margin with fewer than 4 classes."""
    spec = Attack("apgd-t", norm, eps, steps, loss="dlr", targets=targets)
    return replace(spec, **options)


def fab_t(*, norm: str, eps: float, steps: int = STEPS, targets: int = TARGETS, **options: Any) -> Attack:
    """The nearest broken image, searched towards each of the likeliest other classes in turn (Croce and Hein 2020, arXiv
    1907.02044). Until `end` it gives each row's distance; until `broken` it stops at the first point inside the ball."""
    spec = Attack("fab-t", norm, eps, steps, start="clean", loss="margin", targets=targets, until="end")
    return replace(spec, **options)


def square(*, norm: str, eps: float, queries: int = QUERIES, **options: Any) -> Attack:
    """Random search over square patches, on the margin (Andriushchenko et al. 2020)."""
    return replace(Attack("square", norm, eps, start=None, loss="margin", queries=queries), **options)


def auto(*, norm: str, eps: float, steps: int = STEPS, queries: int = QUERIES, **options: Any) -> Attack:
    """AutoAttack's standard protocol: apgd-ce, apgd-t, fab-t and square in sequence, each on the rows still unbroken."""
    spec = Attack("auto", norm, eps, steps, start=None, loss=None, targets=TARGETS, queries=queries)
    return replace(spec, **options)


ATTACKS: dict[str, Callable[..., Attack]] = {
    "fgsm": fgsm, "pgd": pgd, "apgd-ce": apgd_ce, "apgd-dlr": apgd_dlr, "apgd-t": apgd_t, "fab-t": fab_t,
    "square": square, "auto": auto,
}  # fmt: skip


def random_start(norm: Norm, eps: float, *, seed: int) -> Start:
    """Starts uniform in the ball, cut to the box, as a function of (seed, id, restart)."""

    def start(ids: Tensor, clean: Tensor, restart: Tensor) -> Tensor:
        delta = norm.start(ids, tuple(clean.shape[1:]), eps, seed=seed, draw=restart)
        return norm.project_(delta, eps).add_(clean).clamp_(0, 1)

    return start


def objective(model: Callable[[Tensor], Tensor], loss: str = "ce", *, targeted: bool = False) -> Objective:
    """The loss to raise at `context["label"]`, or (targeted) to lower at `context["target"]`, int64 (N,) each.

    model: images (N, C, H, W) to logits (N, K). loss: a key of LOSSES.
    """
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


def boundary_objective(model: Callable[[Tensor], Tensor]) -> Objective:
    """How far `context["target"]` is ahead of `context["label"]`, less the difference that makes it clearly so; reached as
    soon as the label is clearly no longer predicted.

    A search for its zero ends where a point is about to count as broken. At the zero of the plain difference it would stay
    for good: no point near there counts, and only from one that does is there a way back towards the clean image.
    """

    def measure(images: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        logits, label = model(images), context["label"]
        found = logits.detach()
        return targeted_margin(logits, label, context["target"]) - tie(found), is_broken(found, label)

    return measure
