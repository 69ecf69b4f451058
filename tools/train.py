"""Training: standard, adversarial (Madry et al. 2018), TRADES (Zhang et al. 2019), fast FGSM (Wong et al. 2020).

`fit` is a generator: it yields a record per epoch and leaves files, logs and signals to its caller. Data order and
noise are functions of (seed, epoch, example id), so a run that is resumed equals one that never stopped.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbkit.tools import random
from rbkit.tools.ascend import Batch, Context, Objective, Plan, ascend, counted, drive
from rbkit.tools.attack import Attack, objective, pgd, random_start
from rbkit.tools.augment import crop_flip, resized
from rbkit.tools.models import Classifier, Evaluation
from rbkit.tools.norms import NORMS

ROBUST = ("pgd", "fgsm", "trades")  # methods with an inner attack
AUGMENTS: dict[str, dict[str, Any]] = {"crop-flip": {}, "crop": {"flip": False}, "flip": {"pad": 0}}  # of crop_flip


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, as recorded in its file.

    method: standard; pgd, fgsm (one step from a random start) or trades (with `beta`), which are robust; noise
    (Gaussian, `sigma` in [0, 1] pixels) or gradient-penalty (`beta` times the squared input gradient), which are
    controls: smooth, but not trained against an attack. norm, eps, steps, step_size: the inner attack, in [0, 1]
    pixels. eps_ramp: share of the steps over which eps and step_size rise from 0, which keeps a hard ball from
    stalling the first epochs. attack_bn: `eval` (default) or `train`, as the paper does. attack_start: `random` or `clean`.
    attack_keep: the `last` iterate is trained on, or `batch`, that of the highest mean loss over the batch; last_iterate
    `unjudged` then leaves the one after the last step out (the paper has clean, batch and unjudged). schedule: `onecycle`
    (up over `warmup` of the steps, then linearly to 0), `cosine` (to 0) or `constant`; schedule_epochs: its length, where
    that is not `epochs`. clip_value: bound of each entry of the weights' gradient, 0 for none. ema: decay per step, 0 for none.
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
    select: str = "mean"
    seed: int = 0


@dataclass
class Data:
    """Examples in memory: image uint8 or float32 (N, C, H, W), label (N,), ids (N,)."""

    image: Tensor
    label: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def rows(self, index: Tensor) -> Data:
        """The rows of `index`."""
        return Data(self.image[index], self.label[index], self.ids[index])

    def to(self, device: torch.device) -> Data:
        """The same on a device."""
        return Data(self.image.to(device), self.label.to(device), self.ids.to(device))


def as_float(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1]; uint8 is divided by 255."""
    return images.to(torch.float32) / 255 if images.dtype == torch.uint8 else images.to(torch.float32)


def statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel over all pixels, in float64."""
    count = 0
    sums = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for part in images.split(1024):
        x = as_float(part).to(torch.float64).cpu()
        sums += torch.stack([x.sum((0, 2, 3)), (x * x).sum((0, 2, 3))])
        count += x[:, 0].numel()
    total, square = sums[0] / count, sums[1] / count
    std = (square - total * total).clamp_min(1e-12).sqrt()
    return [round(v, 6) for v in total.tolist()], [round(v, 6) for v in std.tolist()]


def learning_rate(recipe: Recipe, step: int, total: int) -> float:
    """The learning rate of `step` (from 0) of `total`; 0 is reached after the last step (T4), unless the schedule is longer."""
    done = step / total * (recipe.epochs / (recipe.schedule_epochs or recipe.epochs))
    if recipe.schedule == "constant":
        return recipe.lr
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))
    warm = recipe.warmup
    return recipe.lr * (done / warm if done < warm else (1 - done) / (1 - warm))


@dataclass
class State:
    """All that a run needs to go on: the live classifier, its optimiser, EMA weights and the position."""

    classifier: Classifier
    optimiser: torch.optim.Optimizer
    average: Classifier | None
    epoch: int = 0
    step: int = 0
    best: float = -math.inf
    best_epoch: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # of the epoch: loss, right, examples
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def subject(self) -> Classifier:
        """The classifier that is validated and kept: the averaged one where there is one."""
        return self.classifier if self.average is None else self.average

    def weights(self) -> dict[str, Tensor]:
        """The network's state dict, copied."""
        return {name: t.detach().clone() for name, t in self.subject.net.state_dict().items()}


def begin(classifier: Classifier, recipe: Recipe) -> State:
    """A run before its first step."""
    optimiser = _optimiser(classifier, recipe)
    average = copy.deepcopy(classifier).requires_grad_(False) if recipe.ema else None
    return State(classifier, optimiser, average)


def _optimiser(classifier: Classifier, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(classifier.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        classifier.parameters(), lr=recipe.lr, momentum=recipe.momentum,
        nesterov=recipe.nesterov and recipe.momentum > 0, weight_decay=recipe.weight_decay,
    )  # fmt: skip


def _kl_objective(model: Callable[[Tensor], Tensor]) -> Objective:
    """TRADES' inner objective: KL divergence from the clean prediction (context `clean_log_probability`)."""

    def measure(images: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(model(images), dim=1)
        value = F.kl_div(log_p, context["log_p"], reduction="none", log_target=True).sum(1)
        return value, torch.zeros(len(images), dtype=torch.bool, device=images.device)

    return measure


class Inner:
    """The inner attack of a step: a model in eval mode with folded, frozen weights, or the live one in train mode."""

    def __init__(self, classifier: Classifier, recipe: Recipe) -> None:
        self.recipe, self.classifier = recipe, classifier
        self.folded = Evaluation(classifier)

    def _plan(self, epoch: int, done: float) -> Plan:
        recipe = self.recipe
        norm = NORMS[recipe.norm]
        size = min(1.0, done / recipe.eps_ramp) if recipe.eps_ramp else 1.0
        # A fresh start every epoch: the epoch is part of the seed's purpose through the draw.
        begin_at = random_start(norm, size * recipe.eps, seed=recipe.seed)

        def start(ids: Tensor, clean: Tensor, restart: Tensor) -> Tensor:
            return begin_at(ids, clean, restart + epoch)

        return Plan(
            norm, size * recipe.eps, size * recipe.step_size, counted(recipe.steps, recipe.last_iterate),
            start=start if recipe.attack_start == "random" else None, keep=recipe.attack_keep,
        )  # fmt: skip

    def __call__(self, images: Tensor, data: Data, *, epoch: int, done: float) -> Tensor:
        """Adversarial images of a batch (N, C, H, W); `done` is the share of all steps before this one."""
        model: Callable[[Tensor], Tensor] = self.classifier
        if self.recipe.attack_bn == "eval":
            self.folded.refresh(self.classifier)
            model = self.folded
        context = {"label": data.label}
        goal = objective(model)
        if self.recipe.method == "trades":
            with torch.no_grad():
                context["log_p"] = F.log_softmax(model(images), dim=1)
            goal = _kl_objective(model)
        return drive(goal, self._plan(epoch, done), Batch(data.ids, images, context))


def noisy(images: Tensor, data: Data, recipe: Recipe, *, epoch: int) -> Tensor:
    """Images (N, C, H, W) with Gaussian noise of `sigma`, cut to the box."""
    shape = tuple(images.shape[1:])
    noise = random.normal(data.ids, shape, seed=recipe.seed, purpose="training noise", draw=epoch)
    return (images + recipe.sigma * noise).clamp(0, 1)


def penalised(classifier: Classifier, images: Tensor, label: Tensor, *, weight: float) -> tuple[Tensor, Tensor]:
    """(mean cross-entropy plus `weight` times the mean squared L2 norm of its input gradient, logits).

    Source: Drucker and Le Cun 1992; Ross and Doshi-Velez 2018, equation 4, without the log.
    """
    images = images.detach().requires_grad_()
    logits = classifier(images)
    losses = F.cross_entropy(logits, label, reduction="none")
    gradient = torch.autograd.grad(losses.sum(), images, create_graph=True)[0]
    return losses.mean() + weight * gradient.flatten(1).square().sum(1).mean(), logits


def loss_of(
    classifier: Classifier, inner: Inner | None, images: Tensor, data: Data, recipe: Recipe, *, epoch: int, done: float
) -> tuple[Tensor, Tensor]:
    """(mean loss, logits on what was trained on) of one batch."""
    if recipe.method == "gradient-penalty":
        return penalised(classifier, images, data.label, weight=recipe.beta)
    if inner is None:
        logits = classifier(noisy(images, data, recipe, epoch=epoch) if recipe.method == "noise" else images)
        return F.cross_entropy(logits, data.label), logits
    attacked = inner(images, data, epoch=epoch, done=done)
    if recipe.method != "trades":
        logits = classifier(attacked)
        return F.cross_entropy(logits, data.label), logits
    both = classifier(torch.cat([images, attacked]))
    clean, moved = both.chunk(2)
    divergence = F.kl_div(F.log_softmax(moved, 1), F.log_softmax(clean, 1), reduction="batchmean", log_target=True)
    return F.cross_entropy(clean, data.label) + recipe.beta * divergence, moved


@contextmanager
def _sound_kernels(classifier: Classifier) -> Iterator[None]:
    """Keep networks of others from a fault of oneDNN, which writes out of bounds (or never returns) in the weight
    gradient of a strided 1 x 1 convolution of fewer channels than its block (up to 16): torch's own kernels take over there.
    """
    layers = [m for m in classifier.modules() if isinstance(m, nn.Conv2d)]
    faulty = any(m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels < 16 for m in layers)
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = before and not faulty  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


class NumericError(ArithmeticError):
    """Raised when a loss is NaN or infinite; carries what to report."""


def _average(average: Classifier, classifier: Classifier, decay: float, step: int) -> None:
    """Exponential moving average of the weights, with a shorter memory at the start; buffers are copied."""
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for kept, live in zip(average.parameters(), classifier.parameters(), strict=True):
            kept.lerp_(live, 1 - decay)
        for buffer, source in zip(average.buffers(), classifier.buffers(), strict=True):
            buffer.copy_(source)


def train_epoch(
    state: State, data: Data, recipe: Recipe, *, tick: Callable[[int], None] = lambda step: None
) -> dict[str, float]:
    """What is left of a pass over the data; returns the mean loss and accuracy over examples.

    `tick(step)` is called after each step, when `state` may be saved; what it raises ends the pass.

    Raises: NumericError with step and learning rate when the loss is not finite.
    """
    steps = steps_per_epoch(data, recipe)
    order = random.permutation(len(data), seed=recipe.seed, purpose="order", draw=state.epoch)
    inner = Inner(state.classifier, recipe) if recipe.method in ROBUST else None
    state.classifier.train()
    with _sound_kernels(state.classifier):
        for index in range(state.step - state.epoch * steps, steps):
            rows = order[index * recipe.batch : (index + 1) * recipe.batch]
            found = _step(state, inner, data.rows(rows.to(data.label.device)), recipe, steps * recipe.epochs)
            state.sums = [total + new for total, new in zip(state.sums, found, strict=True)]
            tick(state.step)
    loss, right, count = state.sums
    state.sums = [0.0, 0.0, 0.0]
    return {"train_loss": loss / count, "train_accuracy": right / count}


def steps_per_epoch(data: Data, recipe: Recipe) -> int:
    """Full batches in the data; at least one."""
    return max(1, len(data) // recipe.batch)


def _step(state: State, inner: Inner | None, batch: Data, recipe: Recipe, total: int) -> list[float]:
    lr, done = learning_rate(recipe, state.step, total), state.step / total
    images = as_float(batch.image)
    if recipe.augment == "resized":
        images = resized(images, batch.ids, seed=recipe.seed, epoch=state.epoch)
    elif recipe.augment != "none":
        images = crop_flip(images, batch.ids, seed=recipe.seed, epoch=state.epoch, **AUGMENTS[recipe.augment])
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.amp):
        loss, logits = loss_of(state.classifier, inner, images, batch, recipe, epoch=state.epoch, done=done)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NumericError(
            f"loss is {value} at step {state.step} (epoch {state.epoch + 1}, learning rate {lr:.3g}); try a smaller --lr"
        )
    for group in state.optimiser.param_groups:
        group["lr"] = lr
    state.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if recipe.clip_value:
        torch.nn.utils.clip_grad_value_(state.classifier.parameters(), recipe.clip_value)
    state.optimiser.step()
    state.step += 1
    if state.average is not None:
        _average(state.average, state.classifier, recipe.ema, state.step)
    right = float((logits.argmax(1) == batch.label).sum())
    return [value * len(batch), right, float(len(batch))]


def validation_attack(recipe: Recipe) -> Attack | None:
    """The attack that a model is validated under: PGD-10 of the training ball."""
    if recipe.method not in ROBUST or recipe.eps == 0:
        return None
    return pgd(norm=recipe.norm, eps=recipe.eps, steps=10, seed=recipe.seed)


def validate(classifier: Classifier, data: Data, recipe: Recipe) -> dict[str, float]:
    """Clean and (for robust recipes) adversarial accuracy on held-out rows, each row counted once.

    Raises: NumericError when a logit is not finite: the last step of an epoch has no later loss that would tell.
    """
    evaluation = Evaluation(classifier)
    images = as_float(data.image)
    logits = evaluation.logits(images)
    if not bool(torch.isfinite(logits).all()):
        raise NumericError("the model gives NaN or infinite logits on held-out rows; try a smaller --lr")
    right = logits.argmax(1) == data.label
    losses = F.cross_entropy(logits, data.label, reduction="none")
    result = {"val_loss": float(losses.double().mean()), "val_accuracy": float(right.double().mean())}
    spec = validation_attack(recipe)
    if spec is not None:
        batch = Batch(data.ids, images, {"label": data.label}, skip=~right)
        outcome = ascend(objective(evaluation), spec.plan(), batch, block=evaluation.block)
        result["val_robust_accuracy"] = float((right & ~outcome.reached).double().mean())
    return result


def selection_score(record: dict[str, Any], recipe: Recipe) -> float:
    """What `best` means: the mean of clean and robust validation accuracy (as the paper), or one of them."""
    clean = record.get("val_accuracy")
    if clean is None:  # nothing held out: the last epoch is the best that can be told
        return float(record["epoch"])
    robust = record.get("val_robust_accuracy", clean)
    return float({"mean": (clean + robust) / 2, "clean": clean, "robust": robust}[recipe.select])


def fit(
    state: State, data: Data, held_out: Data | None, recipe: Recipe, *, tick: Callable[[int], None] = lambda step: None
) -> Iterator[dict[str, Any]]:
    """Train from where `state` stands; yields a record per epoch, after which `state` may be saved."""
    while state.epoch < recipe.epochs:
        record: dict[str, Any] = {"event": "epoch", "epoch": state.epoch + 1}
        record |= train_epoch(state, data, recipe, tick=tick)
        if held_out is not None and len(held_out):
            record |= validate(state.subject, held_out, recipe)
        score = selection_score(record, recipe)
        if score > state.best:
            state.best, state.best_epoch, state.best_weights = score, state.epoch + 1, state.weights()
        state.epoch += 1
        state.records.append(record)
        yield record


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Constructors of networks draw their weights as a function of `seed`; the global generator is put back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
