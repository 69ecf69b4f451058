"""Micro-batches: their mean is that of a slow loop, whoever computes which; ranks are threads that meet here."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import C, K, SmallNet, convnet, generator, images, randomise

from rbkit.tools.examples import Data
from rbkit.tools.microbatch import Tally, mean_gradient
from rbkit.tools.models import Classifier, Evaluation
from rbkit.tools.ranks import ALONE, Ranks
from rbkit.tools.recipe import Recipe
from rbkit.tools.train import begin, fit
from rbkit.tools.validation import validate

SIZES = [4, 4, 3]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that spin would get in the way of the ranks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Threaded(Ranks):
    """A rank that is a thread: what each tells lies in a list, and a barrier is waited for before and after reading."""

    told: list[Any] | None = None
    barrier: threading.Barrier | None = None

    def _exchange(self, value: object) -> list[Any]:
        assert self.told is not None and self.barrier is not None
        self.told[self.index] = value
        self.barrier.wait(60)
        found = list(self.told)
        self.barrier.wait(60)
        return found

    def gather(self, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        return [[t.clone() for t in one] for one in self._exchange([t.clone() for t in tensors])]

    def sums(self, numbers: Sequence[int]) -> list[int]:
        return [sum(column) for column in zip(*self._exchange(list(numbers)), strict=True)]


def together(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What each of `count` ranks makes of `work`."""
    told: list[Any] = [None] * count
    found: list[Any] = [None] * count
    barrier = threading.Barrier(count)

    def run(index: int) -> None:
        try:
            found[index] = work(Threaded(index, count, told, barrier))
        except BaseException as error:
            found[index] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [e for e in found if isinstance(e, BaseException) and not isinstance(e, threading.BrokenBarrierError)]
    if errors:
        raise errors[0]
    return found


def batch() -> tuple[list[Tensor], list[Tensor]]:
    rows = sum(SIZES)
    x, label = images(rows), torch.arange(rows) % K
    return list(x.split(SIZES)), list(label.split(SIZES))


def step(model: nn.Module, ranks: Ranks = ALONE) -> list[Tally]:
    """One batch through `mean_gradient`."""
    x, label = batch()

    def measure(index: int) -> tuple[Tensor, Tensor]:
        logits = model(x[index])
        return F.cross_entropy(logits, label[index]), (logits.argmax(1) == label[index]).sum()

    return mean_gradient(model, SIZES, measure, ranks)


def test_gradient_and_statistics_are_means_over_examples() -> None:
    """By a slow loop: each micro-batch on a copy of the model as it was, weighted by its rows."""
    model = convnet().train()
    names, expected_loss = dict(model.named_parameters()), 0.0
    gradients = {name: torch.zeros_like(p) for name, p in names.items()}
    buffers = {name: torch.zeros_like(b, dtype=torch.float64) for name, b in model.named_buffers()}
    for x, label in zip(*batch(), strict=True):
        twin = copy.deepcopy(model)
        loss = F.cross_entropy(twin(x), label)
        found = torch.autograd.grad(loss, list(twin.parameters()))
        weight = len(x) / sum(SIZES)
        expected_loss += weight * float(loss.detach())
        for name, gradient in zip(names, found, strict=True):
            gradients[name] += weight * gradient
        for name, buffer in twin.named_buffers():
            buffers[name] += weight * buffer.double()
    before = copy.deepcopy(model.state_dict())
    tallies = step(model)
    assert [t.rows for t in tallies] == SIZES
    assert sum(t.loss * t.rows for t in tallies) / sum(SIZES) == pytest.approx(expected_loss, rel=1e-6)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, gradients[name], atol=1e-6), name
        assert torch.equal(p, before[name])
    for name, b in model.named_buffers():
        assert torch.allclose(b.double(), buffers[name], atol=1e-6), name
    moved = {name for name, b in model.named_buffers() if not torch.equal(b, before[name])}
    assert any(name.endswith("running_var") for name in moved) and any("num_batches" in name for name in moved)
    # Constants of the normalisation stay as they are to the last bit, however many means are taken.
    assert torch.equal(model.mean, before["mean"]) and torch.equal(model.std, before["std"])


def test_one_micro_batch_is_the_plain_gradient_to_the_last_bit() -> None:
    model, twin = convnet().train(), convnet().train()
    x, label = images(9), torch.arange(9) % K
    loss = F.cross_entropy(twin(x), label)
    loss.backward()

    def measure(index: int) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return F.cross_entropy(logits, label), (logits.argmax(1) == label).sum()

    (tally,) = mean_gradient(model, [9], measure, ALONE)
    assert tally.loss == float(loss.detach())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for b, c in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(b, c)


class Aside(nn.Module):
    """A network with a parameter that its output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.unused = SmallNet(C, K), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_any_number_of_ranks_finds_the_same_bits(count: int) -> None:
    """Two ranks leave one idle in the last round; five are more than there are micro-batches."""
    torch.manual_seed(0)
    model = Aside().train()
    models = [copy.deepcopy(model) for _ in range(count)]
    tallies = step(model)
    for found in together(count, lambda ranks: step(models[ranks.index], ranks)):
        assert found == tallies
    for other in models:
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad))
        for b, c in zip(model.buffers(), other.buffers(), strict=True):
            assert torch.equal(b, c)
    assert model.unused.grad is None and model.net.fc.bias.grad is not None


class Dropping(SmallNet):
    """A network that draws from torch's global generator."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, training=self.training))


def test_dropout_does_not_depend_on_what_was_drawn_before() -> None:
    """So a run that is resumed, or whose micro-batches are divided, draws the same."""
    rows = Data(images(12), torch.arange(12) % K, torch.arange(12))
    recipe = Recipe(epochs=2, batch=6, micro=3, lr=0.1, augment="none", schedule="constant")
    ends = []
    for kind, drawn in ((Dropping, 0), (Dropping, 5), (SmallNet, 0)):
        torch.manual_seed(drawn)
        state = begin(Classifier(randomise(kind(C, K)), mean=[0.5] * C, std=[0.25] * C), recipe)
        list(fit(state, rows, None, recipe))
        ends.append(state.classifier.net.fc.weight)
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("count", [2, 4])
def test_validation_rows_are_divided_and_counted_once(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows: with four ranks one of them has none."""
    # Networks are traced one at a time: torch.fx stands in for every module's call meanwhile, in all threads.
    ready = Evaluation(convnet())
    monkeypatch.setattr("rbkit.tools.validation.Evaluation", lambda model: ready)
    recipe = Recipe(epochs=1, method="pgd", eps=0.1)
    for rows in (3, 37):
        x = images(rows)
        label = torch.randint(0, K, (rows,), generator=generator(1))
        label[::2] = convnet().eval()(x).argmax(1)[::2]
        held = Data(x, label, torch.arange(rows))
        whole = validate(convnet(), held, recipe)
        assert 0 < whole["val_accuracy"] <= 1
        for found in together(count, lambda ranks, held=held: validate(convnet(), held, recipe, ranks)):
            assert found == whole
