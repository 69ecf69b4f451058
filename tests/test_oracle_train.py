"""Training against a slow loop of its equations: plain modules, SGD written out, attacks step by step."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from toys import SmallNet, generator, linear, randomise

from rbkit.tools import random, train
from rbkit.tools.attack import random_start
from rbkit.tools.augment import crop_flip
from rbkit.tools.examples import Data, as_float
from rbkit.tools.models import Classifier
from rbkit.tools.norms import NORMS
from rbkit.tools.recipe import Recipe
from rbkit.tools.risk import Inner
from rbkit.tools.train import begin, fit, train_epoch
from rbkit.tools.validation import validate

N, C, H, W, K = 22, 3, 6, 8, 4
RECIPE = Recipe(epochs=2, batch=5, lr=0.05, seed=3)
PGD = replace(RECIPE, method="pgd", eps=0.5, step_size=0.2, steps=3)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def data(n: int = N, *, seed: int = 0) -> Data:
    image = torch.randint(0, 256, (n, C, H, W), generator=generator(seed), dtype=torch.uint8)
    return Data(image, torch.arange(n) % K, torch.arange(n) * 7 + 2**33)


def fresh(seed: int = 3) -> Classifier:
    return Classifier(randomise(SmallNet(C, K), seed), mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])


def same_weights(first: Classifier, second: Classifier) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def attack_by_hand(model, recipe, x, label, ids, *, epoch, done):
    """Steps of Madry et al. 2018 or, for TRADES, of Zhang et al. 2019 (equation 5 and algorithm 1)."""
    size = min(1.0, done / recipe.eps_ramp) if recipe.eps_ramp else 1.0
    eps, step = size * recipe.eps, size * recipe.step_size
    frozen = copy.deepcopy(model).eval() if recipe.attack_bn == "eval" else model
    with torch.no_grad():
        clean = F.softmax(frozen(x), 1) if recipe.method == "trades" else None
    now = random_start(NORMS[recipe.norm], eps, seed=recipe.seed)(ids, x, torch.full((len(ids),), epoch))
    for _ in range(recipe.steps):
        at = now.clone().requires_grad_()
        logits = frozen(at)
        if clean is None:
            loss = F.cross_entropy(logits, label, reduction="sum")
        else:
            loss = (clean * (clean.log() - F.log_softmax(logits, 1))).sum()
        g = torch.autograd.grad(loss, at)[0]
        if recipe.norm == "linf":
            delta = (now + step * g.sign() - x).clamp(-eps, eps)
        else:
            delta = now + step * g / g.flatten(1).norm(dim=1)[:, None, None, None] - x
            delta = delta * (eps / delta.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp(max=1)[:, None, None, None]
        now = (x + delta).clamp(0, 1)
    return now


def loss_by_hand(model, recipe, x, attacked, label):
    """(loss, logits that accuracy is told of)."""
    if recipe.method == "trades":
        clean, moved = model(torch.cat([x, attacked])).chunk(2)
        p = F.softmax(clean, 1)
        divergence = (p * (p.log() - F.log_softmax(moved, 1))).sum(1).mean()
        return F.cross_entropy(clean, label) + recipe.beta * divergence, moved
    if recipe.method == "gradient-penalty":
        x = x.requires_grad_()
        logits = model(x)
        loss = F.cross_entropy(logits, label, reduction="sum")
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        return (loss + recipe.beta * (g**2).sum()) / len(x), logits
    logits = model(x if attacked is None else attacked)
    return F.cross_entropy(logits, label), logits


def sgd_by_hand(model, velocity, gradients, recipe, lr):
    """SGD with Nesterov momentum and weight decay, as Sutskever et al. 2013 in torch's form."""
    for i, (p, gradient) in enumerate(zip(model.parameters(), gradients, strict=True)):
        g = gradient + recipe.weight_decay * p
        velocity[i] = g if velocity[i] is None else recipe.momentum * velocity[i] + g
        p -= lr * (g + recipe.momentum * velocity[i])


def average_by_hand(average, model, decay):
    for kept, p in zip(average.parameters(), model.parameters(), strict=True):
        kept.copy_(decay * kept + (1 - decay) * p)
    for kept, b in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(decay * kept + (1 - decay) * b if b.is_floating_point() else b)


def micro_batch_by_hand(model, recipe, rows, part, *, epoch, done):
    """(loss, right, gradients, buffers after it) of the rows `part`, on a copy of the model as it is."""
    model = copy.deepcopy(model)
    label, ids = rows.label[part], rows.ids[part]
    x = crop_flip(rows.image[part] / 255, ids, seed=recipe.seed, epoch=epoch)
    attacked = None
    if recipe.method == "noise":
        noise = random.normal(ids, x.shape[1:], seed=recipe.seed, purpose="training noise", draw=epoch)
        x = torch.minimum(torch.maximum(x + recipe.sigma * noise, torch.zeros(())), torch.ones(()))
    elif recipe.eps:
        attacked = attack_by_hand(model, recipe, x, label, ids, epoch=epoch, done=done)
    loss, logits = loss_by_hand(model, recipe, x, attacked, label)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), int((logits.argmax(1) == label).sum()), gradients, list(model.buffers())


def train_by_hand(recipe: Recipe, rows: Data):
    """(model, average, mean loss and accuracy per epoch) of the whole recipe."""
    model = fresh().train()
    average, per_epoch = copy.deepcopy(model), len(rows) // recipe.batch
    velocity: list = [None] * len(list(model.parameters()))
    step, told = 0, []
    for epoch in range(recipe.epochs):
        order = random.permutation(len(rows), seed=recipe.seed, purpose="order", draw=epoch)
        losses, right = 0.0, 0
        for batch in order[: per_epoch * recipe.batch].split(recipe.batch):
            done = step / (per_epoch * recipe.epochs)
            lr = recipe.lr * (done / recipe.warmup if done < recipe.warmup else (1 - done) / (1 - recipe.warmup))
            parts = batch.split(recipe.micro or recipe.batch)
            found = [micro_batch_by_hand(model, recipe, rows, part, epoch=epoch, done=done) for part in parts]
            shares = [len(part) / len(batch) for part in parts]
            step += 1
            with torch.no_grad():
                gradients = [
                    sum(w * g for w, g in zip(shares, gs, strict=True))
                    for gs in zip(*(f[2] for f in found), strict=True)
                ]
                sgd_by_hand(model, velocity, gradients, recipe, lr)
                for b, after in zip(model.buffers(), zip(*(f[3] for f in found), strict=True), strict=True):
                    mean = sum(w * a for w, a in zip(shares, after, strict=True))
                    b.copy_(mean if b.is_floating_point() else after[0])
                average_by_hand(average, model, min(recipe.ema, (1 + step) / (10 + step)))
            losses += sum(w * f[0] for w, f in zip(shares, found, strict=True))
            right += sum(f[1] for f in found)
        told.append((losses / per_epoch, right / (per_epoch * recipe.batch)))
    return model, average, told


RECIPES = {
    "standard": RECIPE,
    "pgd l2": PGD,
    "pgd linf": replace(PGD, norm="linf", eps=0.05, step_size=0.02, steps=2),
    "fgsm": replace(PGD, method="fgsm", steps=1, step_size=0.6),
    "trades": replace(PGD, method="trades", beta=3.0),
    "train mode": replace(PGD, attack_bn="train"),
    "trades, train mode": replace(PGD, method="trades", attack_bn="train"),
    "ramp": replace(PGD, eps_ramp=0.6),
    "noise": replace(RECIPE, method="noise", sigma=0.3),
    "gradient-penalty": replace(RECIPE, method="gradient-penalty", beta=20.0),
    "ema": replace(RECIPE, ema=0.6),
    "micro": replace(RECIPE, micro=2),
    "micro pgd, ema": replace(PGD, micro=3, ema=0.6),
    "micro trades, train mode": replace(PGD, method="trades", attack_bn="train", micro=3),
    "micro noise": replace(RECIPE, method="noise", sigma=0.3, micro=3),
    "micro gradient-penalty": replace(RECIPE, method="gradient-penalty", beta=20.0, micro=3),
}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_training_equals_the_slow_loop(name):
    """Two epochs, so that order, augmentation and starts of the second one count; the odd rows of each are left over.

    Micro-batches of 2 and 3 do not divide the batch of 5, so that the weights of unequal ones count too.
    """
    recipe = RECIPES[name]
    state = begin(fresh(), recipe)
    records = list(fit(state, data(), None, recipe))
    model, average, told = train_by_hand(recipe, data())
    assert state.step == 8 and state.epoch == 2
    for record, (loss, accuracy) in zip(records, told, strict=True):
        assert record["train_loss"] == pytest.approx(loss, rel=1e-3)
        assert record["train_accuracy"] == pytest.approx(accuracy)
    expected, found, untrained = ((average if recipe.ema else model), state.subject, fresh())
    for key, value in expected.state_dict().items():
        assert torch.allclose(value.float(), found.state_dict()[key].float(), atol=2e-3), key
        if key.endswith("weight"):
            assert not torch.allclose(value, untrained.state_dict()[key], atol=4e-3), f"{key} did not move"


def test_amp_computes_in_bfloat16_and_stays_near():
    half = replace(PGD, amp=True)
    exact, state = train_epoch(begin(fresh(), PGD), data(), PGD), begin(fresh(), half)
    found = train_epoch(state, data(), half)
    assert found["train_loss"] != exact["train_loss"]
    assert found["train_loss"] == pytest.approx(exact["train_loss"], rel=0.1)
    assert all(p.dtype == torch.float32 for p in state.classifier.parameters())


@pytest.mark.parametrize("method", ["pgd", "trades"])
@pytest.mark.parametrize(("attack_bn", "moves"), [("eval", False), ("train", True)])
def test_only_a_train_mode_attack_moves_norms_and_none_moves_weights(method, attack_bn, moves):
    rows, model = data(), fresh().train()
    before = copy.deepcopy(model)
    Inner(model, replace(PGD, method=method, attack_bn=attack_bn))(as_float(rows.image), rows, epoch=0, done=0.5)
    assert same_weights(model, before) is not moves
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert model.training and all(p.grad is None for p in model.parameters())


# -------------------------------------------------------------------------------------------- stop and resume


class Stop(Exception):
    pass


def copied(state: train.State, recipe: Recipe) -> train.State:
    """What a file keeps, tensors and numbers, put into a run that starts anew from other weights."""
    other = begin(fresh(seed=77), recipe)
    other.classifier.load_state_dict({k: v.clone() for k, v in state.classifier.state_dict().items()})
    if state.average is not None and other.average is not None:
        other.average.load_state_dict({k: v.clone() for k, v in state.average.state_dict().items()})
    momenta = [state.optimiser.state[p]["momentum_buffer"] for p in state.classifier.parameters()]
    for p, momentum in zip(other.classifier.parameters(), momenta, strict=True):
        other.optimiser.state[p]["momentum_buffer"] = momentum.clone().contiguous()
    for name in ("epoch", "step", "sums", "best", "best_epoch", "best_weights", "records"):
        setattr(other, name, copy.deepcopy(getattr(state, name)))
    return other


@pytest.mark.parametrize("name", ["trades, train mode", "ramp", "micro pgd, ema"])
@pytest.mark.parametrize("at", [1, 4, 6])
def test_every_kind_of_run_resumes_bit_for_bit(name, at):
    """Stopped within the first epoch, at its last step, and within the second; records and best weights count too."""
    recipe, held = RECIPES[name], data(9, seed=5)
    whole = begin(fresh(), recipe)
    list(fit(whole, data(), held, recipe))

    def stop(step: int) -> None:
        if step == at:
            raise Stop

    state = begin(fresh(), recipe)
    with pytest.raises(Stop):
        list(fit(state, data(), held, recipe, tick=stop))
    assert state.step == at
    resumed = copied(state, recipe)
    list(fit(resumed, data(), held, recipe))
    assert same_weights(resumed.subject, whole.subject) and same_weights(resumed.classifier, whole.classifier)
    assert resumed.records == whole.records
    assert (resumed.best, resumed.best_epoch) == (whole.best, whole.best_epoch)
    assert all(torch.equal(v, whole.best_weights[k]) for k, v in resumed.best_weights.items())


# ------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_validation_counts_what_a_linear_model_must_lose(norm):
    """Robust where the margin exceeds eps times the dual norm of the weight difference."""
    eps = {"l2": 0.08, "linf": 0.008}[norm]
    model = linear(2, (C, H, W), scale=0.3)
    x = torch.rand(61, C, H, W, generator=generator(2)) * 0.4 + 0.3
    weight = model.net[1].weight.detach().double()
    difference = weight[1] - weight[0]
    with torch.no_grad():
        model.net[1].bias.zero_()
        model.net[1].bias[0] = float((x.flatten(1).double() @ difference).median())
        logits = model(x).double()
    label = logits.argmax(1)
    label[:8] = 1 - label[:8]
    margin = logits.gather(1, label[:, None])[:, 0] - logits.gather(1, 1 - label[:, None])[:, 0]
    dual = float(difference.norm() if norm == "l2" else difference.abs().sum())
    robust, nearly = margin > eps * dual, margin > 0.95 * eps * dual
    assert 5 < int(robust.sum()) <= int(nearly.sum()) < 45
    found = validate(model, Data(x, label, torch.arange(61)), replace(PGD, norm=norm, eps=eps))
    assert found["val_accuracy"] == pytest.approx(53 / 61)
    # Ten steps from a random start come within some percent of the optimum, and never past it.
    low, high = float(robust.double().mean()), float(nearly.double().mean())
    assert low - 1e-9 <= found["val_robust_accuracy"] <= high + 1e-9


@pytest.mark.parametrize("recipe", [RECIPE, replace(PGD, eps=0.0)])
def test_without_a_ball_only_clean_accuracy_is_told(recipe):
    model = fresh().train()
    before = copy.deepcopy(model)
    assert set(validate(model, data(), recipe)) == {"val_loss", "val_accuracy"}
    assert same_weights(model, before) and model.training


def test_training_does_not_use_the_global_generator():
    state = begin(fresh(), PGD)
    before = torch.random.get_rng_state()
    list(fit(state, data(), data(4), PGD))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_first_of_equally_good_epochs_is_kept(monkeypatch):
    scores = iter([0.3, 0.7, 0.7, 0.1])
    monkeypatch.setattr(train, "validate", lambda *_: {"val_accuracy": next(scores)})
    recipe = replace(RECIPE, epochs=4)
    state = begin(fresh(), recipe)
    seen = [state.weights() for _ in fit(state, data(), data(3), recipe)]
    assert (state.best, state.best_epoch) == (0.7, 2)
    assert all(torch.equal(v, seen[1][k]) for k, v in state.best_weights.items())
    assert not torch.equal(seen[1]["fc.weight"], seen[2]["fc.weight"])
