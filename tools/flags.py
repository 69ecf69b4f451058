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

import scipy
import torch
from torch import Tensor

from rbkit.tools.losses import TIE
from rbkit.tools.models import Evaluation
from rbkit.tools.trial import DRAWS, QUERIES, STEPS, Sample, Trial

LEVEL = 0.01  # of the sign test
FEWEST = math.ceil(-math.log2(LEVEL))  # rows without which no comparison can be decided: 7
SHARE = 0.05  # of the rows: more zero gradients than this
FLAT = 0.1  # of the rows: more whose loss does not rise
LEFT = 0.1  # of the rows: more that withstand an unbounded attack
SCALED = 0.15  # of the rows: a gain by scaling that plain models do not show (measured there: up to 0.07)
MANY, UNBOUNDED, RESTARTS = 100, 50, 3  # steps where few may not do, steps of an unbounded attack, starts

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


def flags(evaluation: Evaluation, sample: Sample, *, norm: str, eps: float, seed: int = 0) -> list[Flag]:
    """All checks, in the order of FLAGS, of `evaluation` and of the attack stored in `sample`, in the ball of `eps`.

    At most 280 forward-backward and 230 forward passes over the sample. Raises: ValueError for eps 0 or a norm
    other than l2 and linf.
    """
    if norm not in ("l2", "linf"):
        raise ValueError(f"norm {norm}: flags are for l2 and linf")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps {eps:g}: flags need a ball, expected a positive number")
    found = [*_of_attacks(Trial(evaluation, sample, norm, eps, seed)), *_of_outputs(evaluation, sample)]
    assert [flag.name for flag in found] == list(FLAGS)
    return found


def _of_attacks(trial: Trial) -> Iterator[Flag]:
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
    whole = trial.pgd(eps=trial.diameter, steps=UNBOUNDED, start="clean")
    left = ~trial.broken(whole.plan())
    yield _share("unbounded", left, max(LEFT, 1 / max(n, 1)), "rows withstand an attack that may change all pixels")
    plan = trial.pgd(steps=STEPS).plan()
    yield _clearest(
        *(
            _gain("logit_scale", (f"PGD on logits {shown}", trial.broken(plan, scale=scale)), own, least=SCALED)
            for shown, scale in (("times 10", 10.0), ("over 10", 0.1))
        )
    )


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
    while won + lost == 0 or scipy.stats.binomtest(won, won + lost, 0.5, alternative="greater").pvalue > LEVEL:
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
