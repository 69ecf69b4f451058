"""How a model is trained: the options that shape it, and the learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

ROBUST = ("pgd", "fgsm", "trades")  # methods with an inner attack
AUGMENTS: dict[str, dict[str, Any]] = {"crop-flip": {}, "crop": {"flip": False}, "flip": {"pad": 0}}  # of crop_flip


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, as recorded in its file.

    method: standard; pgd, fgsm (one step from a random start) or trades (with `beta`), which are robust; noise
    (Gaussian, `sigma` in [0, 1] pixels) or gradient-penalty (`beta` times the squared input gradient), which are
    controls: smooth, but not trained against an attack. norm, eps, steps, step_size: the inner attack, in [0, 1]
    pixels. eps_ramp: share of the steps over which eps and step_size rise from 0, which keeps a hard ball from
    stalling the first epochs. attack_bn: `eval` (default) or `train`, as the paper does. attack_start: `random` or
    `clean`. attack_keep: the `last` iterate is trained on, or `batch`, that of the highest mean loss over the batch;
    last_iterate `unjudged` then leaves the one after the last step out (the paper has clean, batch and unjudged).
    optimizer: `sgd`, `adam`, or `muon` with SGD's momentum. schedule: `onecycle` (up over `warmup` of the steps, then
    linearly to 0), `cosine` (to 0) or `constant`; schedule_epochs: its length, where that is not `epochs`.
    clip_value: bound of each entry of the weights' gradient, 0 for none. ema: decay per step, 0 for none. amp, tf32:
    bfloat16 where torch deems it safe, or TF32, in training on a GPU. micro: rows that share their BatchNorm
    statistics, a divisor of the batch; None for the batch. smoothing: share of a label that is spread over all
    classes (Szegedy et al. 2016, section 7), not in the inner attack.
    """

    epochs: int
    method: str = "standard"
    norm: str = "l2"
    eps: float = 0.0
    steps: int = 7
    step_size: float = 0.0
    eps_ramp: float = 0.0
    beta: float = 6.0
    sigma: float = 0.0
    attack_bn: str = "eval"
    attack_start: str = "random"
    attack_keep: str = "last"
    last_iterate: str = "judged"
    batch: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    clip_value: float = 0.0
    schedule: str = "onecycle"
    schedule_epochs: int | None = None
    warmup: float = 0.25
    augment: str = "crop-flip"
    ema: float = 0.0
    amp: bool = False
    tf32: bool | None = None
    select: str = "mean"
    seed: int = 0
    micro: int | None = None
    smoothing: float | None = None

    def recorded(self) -> dict[str, Any]:
        """As files keep it: what is left at None is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def learning_rate(recipe: Recipe, step: int, total: int) -> float:
    """The learning rate of `step` (from 0) of `total`; 0 is reached after the last step, unless the schedule is longer."""
    done = step / total * (recipe.epochs / (recipe.schedule_epochs or recipe.epochs))
    if recipe.schedule == "constant":
        return recipe.lr
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))
    warm = recipe.warmup
    return recipe.lr * (done / warm if done < warm else (1 - done) / (1 - warm))
