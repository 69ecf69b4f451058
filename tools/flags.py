"""Red flags of gradient masking and of attacks that failed: named checks of a model and of a stored attack.

Each check measures one value and fires where it lies above its limit. Where two attacks are compared, the limit is the
largest gain that an exact one-sided sign test over the same rows does not tell from chance at LEVEL, so that a few rows
decide nothing. All randomness is keyed by the ids; only a model that is randomised itself gives other numbers again.

Sources: Athalye et al. 2018 (arXiv 1802.00420), section 3.1; Carlini et al. 2019 (1902.06705), section 4; Pintor et al.
2022 (2106.09947); Croce et al. 2022 (2202.13711) on randomised models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from rbkit.tools import random
from rbkit.tools.ascend import Plan, ascend, climb
from rbkit.tools.attack import Attack, fgsm, objective, pgd, random_start
from rbkit.tools.losses import TIE
from rbkit.tools.models import Evaluation, in_blocks
from rbkit.tools.norms import NORMS
from rbkit.tools.slots import Batch, Objective

SIZE = 64  # rows of the sample
LEVEL = 0.01  # of the sign test
FEWEST = math.ceil(-math.log2(LEVEL))  # rows without which no comparison can be decided: 7
SHARE = 0.05  # of the rows: more zero gradients than this
FLAT = 0.1  # of the rows: more whose loss does not rise
LEFT = 0.1  # of the rows: more that withstand an unbounded attack
SCALED = 0.15  # of the rows: a gain by scaling that plain models do not show (measured there: up to 0.07)
STEPS, MANY, UNBOUNDED, RESTARTS, DRAWS, QUERIES = 20, 100, 50, 3, 20, 200

FLAGS = {
    "zero_gradients": "Carlini et al. 2019",
    "nan_gradients": "Carlini et al. 2019",
    "flat_loss": "Pintor et al. 2022",
    "few_steps": "Carlini et al. 2019",
    "restarts": "Carlini et al. 2019",
    "one_step": "Athalye et al. 2018",
    "noise": "Carlini et al. 2019",
    "black_box": "Athalye et al. 2018",
    "unbounded": "Athalye et al. 2018",
    "logit_scale": "Carlini and Wagner 2017",
    "probabilities": "Croce and Hein 2020",
    "randomised": "Athalye et al. 2018",
    "batch_dependent": "rbkit",
}


@dataclass(frozen=True)
class Flag:
    """What a check found: it fires where value > limit; `fires` is None where n rows are too few to tell.

    unit: of value and limit. detail: the numbers behind it, for people.
    """

    name: str
    value: float | None
    limit: float
    n: int
    unit: str
    detail: str
    decided: bool = True

    @property
    def fires(self) -> bool | None:
        """Whether the value lies above the limit; None: undecided."""
        return self.value is not None and self.value > self.limit if self.decided else None


@dataclass(frozen=True)
class Sample:
    """Rows of an attacked stream: ids int64 (N,), clean and stored images (N, C, H, W), label (N,), target (N,) where
    the attack was targeted."""

    ids: Tensor
    clean: Tensor
    stored: Tensor
    label: Tensor
    target: Tensor | None = None

    def take(self, rows: Tensor) -> Sample:
        """Some rows, by index or mask."""
        target = None if self.target is None else self.target[rows]
        return Sample(self.ids[rows], self.clean[rows], self.stored[rows], self.label[rows], target)

    def joined(self, other: Sample) -> Sample:
        """The rows of both. Raises: ValueError where only one has targets."""
        if (self.target is None) != (other.target is None):
            raise ValueError("targeted and untargeted rows in one pool")
        target = None if self.target is None or other.target is None else torch.cat([self.target, other.target])
        ids, clean, stored = (
            torch.cat(p) for p in ((self.ids, other.ids), (self.clean, other.clean), (self.stored, other.stored))
        )
        return Sample(ids, clean, stored, torch.cat([self.label, other.label]), target)

    def drawn(self, size: int = SIZE) -> Sample:
        """The `size` rows of lowest keyed rank, in that order: the same however the rows came, and in pieces or not."""
        bits = random.words(self.ids, 2, seed=0, purpose="flags")
        order = ((bits[:, 0] << 31) | (bits[:, 1] >> 1)).argsort(stable=True)
        return self.take(order[:size])

    @property
    def context(self) -> dict[str, Tensor]:
        """What the objective of an attack reads."""
        return {"label": self.label} if self.target is None else {"label": self.label, "target": self.target}


def flags(evaluation: Evaluation, sample: Sample, *, norm: str, eps: float, seed: int = 0) -> list[Flag]:
    """All checks, in the order of FLAGS, of `evaluation` and of the attack stored in `sample`, in the ball of `eps`.

    At most 280 forward-backward and 230 forward passes over the sample. Raises: ValueError for eps 0 or a norm
    other than l2 and linf.
    """
    if norm not in ("l2", "linf"):
        raise ValueError(f"norm {norm}: flags are for l2 and linf")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps {eps:g}: flags need a ball, expected a positive number")
    found = [*_of_attacks(_Trial(evaluation, sample, norm, eps, seed)), *_of_outputs(evaluation, sample)]
    assert [flag.name for flag in found] == list(FLAGS)
    return found


class _Trial:
    """The rows that stand before any attack, and attacks on them; masks are bool (N,): which rows are broken."""

    def __init__(self, evaluation: Evaluation, sample: Sample, norm: str, eps: float, seed: int) -> None:
        self.evaluation, self.norm, self.eps, self.seed = evaluation, norm, eps, seed
        self.targeted = sample.target is not None
        self.goal = self._goal("ce")
        with torch.no_grad():
            self.rows = sample.take(~self._reached(sample, sample.clean))
            self.stored = self._reached(self.rows, self.rows.stored)
        # Loss, largest gradient entry, and success at each iterate of the default attack, (N, 3, STEPS + 1).
        self.path = self._path(self.pgd(steps=STEPS).plan())
        self.default = self.path[:, 2].bool().any(1)

    def _goal(self, loss: str, scale: float = 1.0) -> Objective:
        def scaled(images: Tensor) -> Tensor:
            # Zero times the images: a network that cannot be differentiated has a gradient of zero, and is found out.
            return self.evaluation(images) * scale + 0 * images.flatten(1).sum(1, keepdim=True)

        return objective(scaled, loss, targeted=self.targeted)

    def _reached(self, rows: Sample, images: Tensor) -> Tensor:
        names = list(rows.context)
        return in_blocks(
            lambda x, *values: self.goal(x, dict(zip(names, values, strict=True)))[1],
            images, *rows.context.values(), block=self.evaluation.block,
        )  # fmt: skip

    def pgd(self, **options: Any) -> Attack:
        """The default attack, but for `options`."""
        usual: dict[str, Any] = {"norm": self.norm, "eps": self.eps, "seed": self.seed, "targeted": self.targeted}
        return pgd(**usual | options)

    def fgsm(self) -> Attack:
        """One step."""
        return fgsm(norm=self.norm, eps=self.eps, seed=self.seed, targeted=self.targeted)

    def broken(self, plan: Plan, *, scale: float = 1.0) -> Tensor:
        """Rows that an attack by gradients of the cross-entropy breaks."""
        if not len(self.rows.ids):
            return self.stored
        batch = Batch(self.rows.ids, self.rows.clean, self.rows.context)
        return ascend(self._goal("ce", scale), plan, batch, block=self.evaluation.block).reached

    def noisy(self) -> Tensor:
        """Rows that one of DRAWS points of the ball breaks."""
        start = random_start(NORMS[self.norm], self.eps, seed=self.seed + 1)  # not the starts of the attacks
        return self.broken(Plan(NORMS[self.norm], self.eps, 0.0, 0, DRAWS, start=start, stop=True))

    def _path(self, plan: Plan) -> Tensor:
        names = list(self.rows.context)

        def climbed(ids: Tensor, clean: Tensor, *values: Tensor) -> Tensor:
            context = dict(zip(names, values, strict=True))
            assert plan.start is not None
            now, seen = plan.start(ids, clean, torch.zeros_like(ids)), []
            for _ in range(plan.steps + 1):
                images = now.detach().requires_grad_()
                value, reached = self.goal(images, context)
                gradient = torch.autograd.grad(value.sum(), images)[0]
                seen.append(torch.stack([value.detach(), gradient.flatten(1).abs().amax(1), reached.float()], 1))
                now = climb(images.detach(), gradient, clean, plan)
            return torch.stack(seen, 2)

        rows = self.rows
        return in_blocks(climbed, rows.ids, rows.clean, *rows.context.values(), block=self.evaluation.block)

    @torch.no_grad()
    def searched(self) -> Tensor:
        """Rows that a random search by scores alone breaks: squares of changed pixels, kept where the margin grows.

        After Andriushchenko et al. 2020 (Square Attack), with one square per query and its side shrinking.
        """
        norm, rows, goal = NORMS[self.norm], self.rows, self._goal("margin")
        names, block = list(rows.context), self.evaluation.block

        def measured(x: Tensor, *values: Tensor) -> Tensor:
            return torch.stack([v.float() for v in goal(x, dict(zip(names, values, strict=True)))], 1)

        def asked(images: Tensor) -> Tensor:
            return in_blocks(measured, images, *rows.context.values(), block=block)

        now = rows.clean
        best = asked(now)
        broken = self.stored & False
        for query in range(QUERIES):
            change = _square(rows.ids, now - rows.clean, self.eps, norm.name, query, seed=self.seed)
            images = (rows.clean + norm.project(change, self.eps)).clamp(0, 1)
            scores = asked(images)
            better = scores[:, 0] > best[:, 0]
            now = torch.where(better[:, None, None, None], images, now)
            best = torch.where(better[:, None], scores, best)
            broken = broken | scores[:, 1].bool()
            if bool(broken.all()):
                break
        return broken


def _square(ids: Tensor, delta: Tensor, eps: float, norm: str, query: int, *, seed: int) -> Tensor:
    """A change with a square of one sign per channel: set to eps (linf), or added with half of eps in all (l2)."""
    channels, height, width = delta.shape[1:]
    u = random.uniform(ids, (3 + channels,), seed=seed, purpose="black box", draw=query)
    share = 0.5 * 0.02 ** (query / QUERIES)  # of the area
    side = max(1, min(height, width, round(math.sqrt(share * height * width))))
    top, left = (u[:, 0] * (height - side + 1)).long(), (u[:, 1] * (width - side + 1)).long()
    y, x = torch.arange(height, device=ids.device), torch.arange(width, device=ids.device)
    inside = ((y >= top[:, None]) & (y < top[:, None] + side))[:, :, None] & (
        (x >= left[:, None]) & (x < left[:, None] + side)
    )[:, None, :]
    sign = torch.where(u[:, 3:] < 0.5, -1.0, 1.0)[:, :, None, None]
    if norm == "linf":
        return torch.where(inside[:, None], sign * eps, delta)
    return delta + inside[:, None] * sign * (eps / 2 / math.sqrt(channels) / side)


def _of_attacks(trial: _Trial) -> Iterator[Flag]:
    """Checks of gradients and attacks."""
    n = len(trial.rows.ids)
    largest = trial.path[:, 1]
    yield _share("zero_gradients", (largest == 0).any(1), SHARE, "rows with a gradient that is exactly zero")
    yield _share("nan_gradients", (~largest.isfinite()).any(1), 0.0, "rows with a gradient that is not finite")
    loss = trial.path[:, 0]
    yield _share("flat_loss", ~(loss[:, -1] > loss[:, 0]), FLAT, f"rows whose loss is no higher after {STEPS} steps")
    many = trial.broken(trial.pgd(steps=MANY).plan())
    yield _gain("few_steps", (f"{MANY} steps", many), ("the stored attack", trial.stored))
    again = trial.broken(trial.pgd(steps=STEPS, restarts=RESTARTS).plan())
    own = (f"PGD of {STEPS} steps", trial.default)
    yield _gain("restarts", (f"{RESTARTS} starts", again | trial.default), ("one", trial.default))
    attacks = {
        "one_step": ("one step", trial.broken(trial.fgsm().plan())),
        "noise": (f"{DRAWS} draws of noise", trial.noisy()),
        "black_box": (f"{QUERIES} queries", trial.searched()),
    }
    for name, contender in attacks.items():
        yield _clearest(_gain(name, contender, ("the stored attack", trial.stored)), _gain(name, contender, own))
    # From the clean image: a start far away would break rows without any gradient.
    whole = trial.pgd(eps=_diameter(trial), steps=UNBOUNDED, start="clean")
    left = ~trial.broken(whole.plan())
    yield _share("unbounded", left, max(LEFT, 1 / max(n, 1)), "rows withstand an attack that may change all pixels")
    plan = trial.pgd(steps=STEPS).plan()
    yield _clearest(
        *(
            _gain("logit_scale", (f"PGD on logits {shown}", trial.broken(plan, scale=scale)), own, least=SCALED)
            for shown, scale in (("times 10", 10.0), ("over 10", 0.1))
        )
    )


def _diameter(trial: _Trial) -> float:
    """The radius of a ball around any image that holds the whole box."""
    return 1.0 if trial.norm == "linf" else math.sqrt(trial.rows.clean[0].numel() if len(trial.rows.ids) else 1)


def _share(name: str, rows: Tensor, limit: float, what: str) -> Flag:
    """A share of rows against a fixed limit."""
    n, count = len(rows), int(rows.sum())
    return Flag(name, count / n if n else None, limit, n, "share", f"{count} of {n} {what}", decided=n >= FEWEST)


def _gain(name: str, contender: tuple[str, Tensor], reference: tuple[str, Tensor], *, least: float = 0.0) -> Flag:
    """By what share of rows the contender breaks more, against what the sign test needs, or `least` if that is more."""
    (first, a), (second, b) = contender, reference
    n, only, lost = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    value = (only - lost) / n if n else None
    limit = max((_needed(lost) - 1 - lost) / max(n, 1), least)
    detail = f"{first}: {int(a.sum())} of {n} rows broken, {second}: {int(b.sum())}"
    return Flag(name, value, limit, n, "share", detail, decided=n >= FEWEST)


def _needed(lost: int) -> int:
    """The fewest rows won that an exact one-sided sign test at LEVEL takes for more than chance, where `lost` are lost."""
    won = lost
    while won + lost == 0 or stats.binomtest(won, won + lost, 0.5, alternative="greater").pvalue > LEVEL:
        won += 1
    return won


def _clearest(*found: Flag) -> Flag:
    """The comparison that lies highest above its limit; the first of equals."""
    return max(found, key=lambda flag: (flag.value or 0.0) - flag.limit)


@torch.no_grad()
def _of_outputs(evaluation: Evaluation, sample: Sample) -> Iterator[Flag]:
    """Checks of forward passes over all rows."""
    images = sample.clean
    logits = evaluation.logits(images)
    n = len(images)
    sums = (logits >= 0).all(1) & ((logits.sum(1) - 1).abs() < 1e-4)
    share = float(sums.float().mean())
    detail = f"{int(sums.sum())} of {n} rows of outputs are non-negative and sum to 1"
    yield Flag("probabilities", share, 0.99, n, "share", detail)
    again = _moved(logits, evaluation.logits(images))
    yield Flag("randomised", again, TIE, n, "logit range", "largest change of a logit when computed again")
    mixed = evaluation.logits(torch.stack([images, 1 - images], 1).flatten(0, 1))[::2]  # a negative after each row
    other = max(_moved(logits, mixed), _moved(logits, evaluation.logits(images.flip(0)).flip(0)))
    detail = "largest change of a logit among other rows"
    if again > TIE:
        detail += "; not told apart from randomness"
    yield Flag("batch_dependent", other, TIE, n, "logit range", detail, decided=again <= TIE)


def _moved(logits: Tensor, others: Tensor) -> float:
    """The largest difference over rows, in units of the row's logit range; rows that are not finite are left out."""
    span = (logits.amax(1) - logits.amin(1)).clamp_min(1e-30)
    return float(((logits - others).abs().amax(1) / span).nan_to_num(0.0, posinf=0.0).amax())
