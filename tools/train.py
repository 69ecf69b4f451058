"""Training: standard, adversarial (Madry et al. 2018), TRADES (Zhang et al. 2019), fast FGSM (Wong et al. 2020).

`fit` is a generator: it yields a record per epoch and leaves files, logs and signals to its caller. Data order and
noise are functions of (seed, epoch, example id), so a run that is resumed equals one that never stopped. Processes that
train together (`ranks`) share the micro-batches of each step and hold the same state.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rbkit.tools import random
from rbkit.tools.augment import crop_flip, resized
from rbkit.tools.examples import Data, as_float
from rbkit.tools.gpu import Reading, products
from rbkit.tools.microbatch import Tally, mean_gradient
from rbkit.tools.models import Classifier, copied
from rbkit.tools.muon import Muon
from rbkit.tools.philox import key_of
from rbkit.tools.ranks import ALONE, Ranks
from rbkit.tools.recipe import AUGMENTS, ROBUST, Recipe, learning_rate
from rbkit.tools.risk import Inner, NumericError, loss_of
from rbkit.tools.validation import validate


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
    unread: tuple[Reading, str] | None = None  # what the last step adds to the sums, and where it stood

    @property
    def subject(self) -> Classifier:
        """The classifier that is validated and kept: the averaged one where there is one."""
        return self.classifier if self.average is None else self.average

    def settle(self) -> None:
        """Add what the last step told to the sums. Raises: NumericError if its loss is not finite."""
        if self.unread is None:
            return
        (reading, where), self.unread = self.unread, None
        found = reading.read()
        if not math.isfinite(found[0]):
            raise NumericError(f"loss is {found[0] / found[2]} {where}; try a smaller --lr")
        self.sums = [total + new for total, new in zip(self.sums, found, strict=True)]

    def weights(self) -> dict[str, Tensor]:
        """The network's state dict, copied."""
        return {name: t.detach().clone() for name, t in self.subject.net.state_dict().items()}


def begin(classifier: Classifier, recipe: Recipe) -> State:
    """A run before its first step."""
    average = copied(classifier).requires_grad_(False) if recipe.ema else None
    return State(classifier, _optimiser(classifier, recipe), average)


def _optimiser(classifier: Classifier, recipe: Recipe) -> torch.optim.Optimizer:
    lr, decay = recipe.lr, recipe.weight_decay
    if recipe.optimizer == "adam":
        return torch.optim.Adam(classifier.parameters(), lr=lr, weight_decay=decay)
    momentum, nesterov = recipe.momentum, recipe.nesterov and recipe.momentum > 0
    if recipe.optimizer == "muon":
        return Muon(classifier.net, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    return torch.optim.SGD(classifier.parameters(), lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay)


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


def _average(average: Classifier, classifier: Classifier, decay: float, step: int) -> None:
    """Exponential moving average of weights and BatchNorm statistics, with a shorter memory at the start.

    Statistics of the live weights alone are not those of the averaged ones, the less so the higher the learning rate and the
    deeper the network. Counters are copied.
    """
    decay = min(decay, (1 + step) / (10 + step))
    pairs = zip(
        (*average.parameters(), *average.buffers()), (*classifier.parameters(), *classifier.buffers()), strict=True
    )
    with torch.no_grad():
        for kept, live in pairs:
            if kept.is_floating_point():
                kept.lerp_(live, 1 - decay)
            else:
                kept.copy_(live)


def train_epoch(
    state: State,
    data: Data,
    recipe: Recipe,
    *,
    inner: Inner | None = None,
    tick: Callable[[int], None] = lambda step: None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """What is left of a pass over the data; returns the mean loss and accuracy over examples.

    inner: the attack of a robust recipe, from `attack_of`; made anew where it is None. `tick(step)` is called after each
    step, when `state` may be saved once it is settled; what it raises ends the pass.

    Raises: NumericError with step and learning rate when the loss is not finite; on a GPU one step later, as asking would
    make it wait.
    """
    steps = steps_per_epoch(data, recipe)
    order = random.permutation(len(data), seed=recipe.seed, purpose="order", draw=state.epoch).to(data.label.device)
    inner = attack_of(state, recipe) if inner is None else inner
    state.classifier.train()
    with _sound_kernels(state.classifier), products(tf32=bool(recipe.tf32)):
        for index in range(state.step - state.epoch * steps, steps):
            rows = order[index * recipe.batch : (index + 1) * recipe.batch]
            _step(state, inner, data, rows, recipe, total=steps * recipe.epochs, ranks=ranks)
            tick(state.step)
    state.settle()
    loss, right, count = state.sums
    state.sums = [0.0, 0.0, 0.0]
    return {"train_loss": loss / count, "train_accuracy": right / count}


def attack_of(state: State, recipe: Recipe) -> Inner | None:
    """The inner attack of a robust recipe, on the live classifier."""
    return Inner(state.classifier, recipe) if recipe.method in ROBUST else None


def steps_per_epoch(data: Data, recipe: Recipe) -> int:
    """Full batches in the data; at least one."""
    return max(1, len(data) // recipe.batch)


def _step(
    state: State, inner: Inner | None, data: Data, rows: Tensor, recipe: Recipe, *, total: int, ranks: Ranks
) -> None:
    parts = rows.split(recipe.micro or recipe.batch)
    done = state.step / total

    def measure(index: int) -> tuple[Tensor, Tensor]:
        batch = data.rows(parts[index])
        images = _augmented(batch, recipe, epoch=state.epoch)
        # Dropout of others' networks draws from the global generator.
        with (
            seeded(_word(recipe.seed, f"dropout of step {state.step}, micro-batch {index}")),
            torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.amp),
        ):
            loss, logits = loss_of(state.classifier, inner, images, batch, recipe, epoch=state.epoch, done=done)
        return loss, (logits.argmax(1) == batch.label).sum()

    tallies = mean_gradient(state.classifier, [len(part) for part in parts], measure, ranks)
    _descend(state, tallies, recipe, learning_rate(recipe, state.step, total))


def _augmented(batch: Data, recipe: Recipe, *, epoch: int) -> Tensor:
    """The images of a batch as float32 (N, C, H, W), channels last, augmented as the recipe says."""
    images = as_float(batch.image)
    if recipe.augment == "resized":
        images = resized(images, batch.ids, seed=recipe.seed, epoch=epoch)
    elif recipe.augment != "none":
        images = crop_flip(images, batch.ids, seed=recipe.seed, epoch=epoch, **AUGMENTS[recipe.augment])
    return images.contiguous(memory_format=torch.channels_last)


def _descend(state: State, tallies: list[Tally], recipe: Recipe, lr: float) -> None:
    """The step of the optimiser along the gradient at hand."""
    state.settle()
    reading = Reading(_sums(tallies))
    state.unread = reading, f"at step {state.step} (epoch {state.epoch + 1}, learning rate {lr:.3g})"
    if reading.arrived is None:  # on a CPU the numbers are there, and spoil no weights
        state.settle()
    for group in state.optimiser.param_groups:
        group["lr"] = lr
    if recipe.clip_value:
        nn.utils.clip_grad_value_(state.classifier.parameters(), recipe.clip_value)
    state.optimiser.step()
    state.step += 1
    if state.average is not None:
        _average(state.average, state.classifier, recipe.ema, state.step)


def _sums(tallies: list[Tally]) -> Tensor:
    """Sums over the rows of micro-batches: loss, right predictions, and how many rows; float64 (3,)."""
    parts = [torch.stack([t.loss.double() * t.rows, t.right.double()]) for t in tallies]
    rows = parts[0].new_full((1,), sum(t.rows for t in tallies))
    return torch.cat([functools.reduce(torch.add, parts), rows])


def selection_score(record: dict[str, Any], recipe: Recipe) -> float:
    """What `best` means: the mean of clean and robust validation accuracy (as the paper), or one of them."""
    clean = record.get("val_accuracy")
    if clean is None:  # nothing held out: the last epoch is the best that can be told
        return float(record["epoch"])
    robust = record.get("val_robust_accuracy", clean)
    return float({"mean": (clean + robust) / 2, "clean": clean, "robust": robust}[recipe.select])


def fit(
    state: State,
    data: Data,
    held_out: Data | None,
    recipe: Recipe,
    *,
    tick: Callable[[int], None] = lambda step: None,
    ranks: Ranks = ALONE,
) -> Iterator[dict[str, Any]]:
    """Train from where `state` stands; yields a record per epoch, after which `state` may be saved."""
    inner = attack_of(state, recipe)
    while state.epoch < recipe.epochs:
        record: dict[str, Any] = {"event": "epoch", "epoch": state.epoch + 1}
        record |= train_epoch(state, data, recipe, inner=inner, tick=tick, ranks=ranks)
        if held_out is not None and len(held_out):
            record |= validate(state.subject, held_out, recipe, ranks)
        score = selection_score(record, recipe)
        if score > state.best:
            state.best, state.best_epoch, state.best_weights = score, state.epoch + 1, state.weights()
        state.epoch += 1
        state.records.append(record)
        yield record


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What draws from torch's global generator does so as a function of `seed`; the generator is put back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _word(seed: int, purpose: str) -> int:
    """A seed of 64 bits for torch's generators."""
    high, low = key_of(seed, purpose)
    return high << 32 | low
