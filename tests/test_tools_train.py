"""Training: augmentation, schedules, losses, the mode of the inner attack, resumption, selection."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import reference
import torch
import toys
from torch.nn import functional as F
from toys import C, K, N, SmallNet, W, convnet, generator, images

from rbkit.tools import random, train
from rbkit.tools.augment import crop_flip
from rbkit.tools.examples import Data, as_float, statistics
from rbkit.tools.models import Classifier
from rbkit.tools.recipe import AUGMENTS, ROBUST, Recipe, learning_rate
from rbkit.tools.risk import Inner, NumericError, loss_of, penalised
from rbkit.tools.train import begin, fit
from rbkit.tools.validation import validate, validation_attack

ROWS, SIZE = 48, 9


def data(rows=ROWS, *, seed=0):
    """Images whose mean colour tells the class: easy to learn in a few steps."""
    label = torch.arange(rows) % K
    colour = torch.tensor([[0.2, 0.5, 0.8], [0.8, 0.5, 0.2], [0.5, 0.8, 0.2], [0.5, 0.2, 0.8]])
    x = colour[label][:, :, None, None] + 0.1 * torch.randn(rows, C, SIZE, SIZE + 2, generator=generator(seed))
    return Data((x.clamp(0, 1) * 255).round().to(torch.uint8), label, torch.arange(rows) * 3 + 1)


def fresh(seed=0):
    with train.seeded(seed):
        net = SmallNet()
    return Classifier(net, mean=[0.5] * C, std=[0.25] * C)


def recipe(**options):
    return Recipe(**{"epochs": 2, "batch": 16, "lr": 0.05, "eps": 0.2, "steps": 2, "step_size": 0.1} | options)


def weights(state):
    return {name: t.clone() for name, t in state.classifier.state_dict().items()}


def equal(first, second):
    return set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in first)


# ------------------------------------------------------------------------------------------ the data


def test_crop_flip_equals_the_slow_loop():
    x, ids = images(), torch.arange(N) + 40
    words = random.words(ids, 3, seed=2, purpose="augment", draw=5)
    found = crop_flip(x, ids, seed=2, epoch=5, pad=3)
    seen = set()
    for row in range(N):
        top, left, mirrored = int(words[row, 0]) * 7 // 2**32, int(words[row, 1]) * 7 // 2**32, words[row, 2] >= 2**31
        slow = reference.crop_flip(x[row].double().numpy(), top=top, left=left, mirrored=bool(mirrored), pad=3)
        assert (found[row].double().numpy() == slow).all()
        seen.add(bool(mirrored))
    assert seen == {True, False}


def test_crop_flip_is_a_function_of_seed_epoch_and_id():
    """D7."""
    x, ids = images(40), torch.arange(40)
    whole = crop_flip(x, ids, seed=0, epoch=1)
    order = torch.randperm(40, generator=generator(0))
    assert torch.equal(crop_flip(x[order], ids[order], seed=0, epoch=1), whole[order])
    assert torch.equal(crop_flip(x[5:6], ids[5:6], seed=0, epoch=1)[0], whole[5])
    for other in ({"seed": 0, "epoch": 2}, {"seed": 1, "epoch": 1}):
        assert not torch.equal(crop_flip(x, ids, **other), whole)


def test_half_the_images_are_mirrored_and_all_offsets_are_drawn():
    """A ramp from left to right stays one without flips; the shifts by -1, 0 and 1 pixels are about as frequent."""
    x, ids = torch.arange(1.0, W + 1).expand(2000, 1, W, W).contiguous(), torch.arange(2000)
    plain = crop_flip(x, ids, seed=0, epoch=0, pad=1, flip=False)[:, 0, 2]
    mixed = crop_flip(x, ids, seed=0, epoch=0, pad=1)[:, 0, 2]
    assert (plain.diff(dim=1)[:, 1:-1] > 0).all()
    mirrored = mixed[:, 2] > mixed[:, 3]
    assert 0.45 < mirrored.float().mean() < 0.55
    assert torch.equal(mixed, torch.where(mirrored[:, None], plain.flip(1), plain))
    shifts = torch.bincount((plain[:, 2] - 2).long(), minlength=3)
    assert len(shifts) == 3 and (shifts > 560).all()


def test_each_way_to_augment_does_what_its_name_says():
    """Flipping leaves an image or its mirror image; cropping never mirrors; both together do both."""
    x, ids = torch.arange(1.0, W + 1).expand(64, 1, W, W).contiguous(), torch.arange(64)
    found = {name: crop_flip(x, ids, seed=0, epoch=0, **given) for name, given in AUGMENTS.items()}
    kept, mirrored = ((found["flip"] == y).flatten(1).all(1) for y in (x, x.flip(3)))
    assert (kept ^ mirrored).all() and 20 < int(kept.sum()) < 44
    assert torch.equal(found["crop-flip"][kept], found["crop"][kept])
    assert not torch.equal(found["crop-flip"][mirrored], found["crop"][mirrored])
    assert not (found["crop"] == x).flatten(1).all(1).all()


def test_statistics_are_exact_per_channel():
    """D6: over all pixels, also where the last part is smaller."""
    x = torch.randint(0, 256, (1030, C, 2, 3), generator=generator(0), dtype=torch.uint8)
    mean, std = statistics(x)
    pixels = x.double().div(255).transpose(0, 1).flatten(1)
    assert mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-6)
    assert std == pytest.approx(pixels.std(1, correction=0).tolist(), abs=1e-6)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
def test_schedules_end_at_zero(schedule):
    """T4, and the peak is the learning rate that was asked for."""
    plan = recipe(schedule=schedule, warmup=0.25, lr=0.4)
    rates = [learning_rate(plan, step, 100) for step in range(101)]
    assert max(rates) == pytest.approx(0.4) and rates[100] == pytest.approx(0, abs=1e-12) and min(rates[1:100]) > 0
    peak = rates.index(max(rates))
    assert peak == (25 if schedule == "onecycle" else 0)
    assert all(a > b for a, b in itertools.pairwise(rates[peak:]))
    assert learning_rate(replace(plan, schedule="constant"), 77, 100) == 0.4


def test_a_schedule_without_warmup_starts_at_the_top():
    assert learning_rate(recipe(warmup=0.0, lr=0.4), 0, 10) == 0.4


# ------------------------------------------------------------------------------------------ recipes

RECIPES = {
    "standard": {"method": "standard", "eps": 0.0},
    "pgd": {"method": "pgd"},
    "pgd linf": {"method": "pgd", "norm": "linf", "eps": 0.03, "step_size": 0.02},
    "fgsm": {"method": "fgsm", "norm": "linf", "eps": 0.03, "steps": 1, "step_size": 0.04},
    "trades": {"method": "trades", "beta": 2.0},
    "bn train": {"method": "pgd", "attack_bn": "train"},
    "ema": {"method": "pgd", "ema": 0.9},
    "ramp": {"method": "pgd", "eps_ramp": 0.5},
    "noise": {"method": "noise", "sigma": 0.1, "eps": 0.0},
    "gradient-penalty": {"method": "gradient-penalty", "beta": 1.0, "eps": 0.0},
    "crop": {"method": "standard", "augment": "crop", "schedule": "cosine"},
    "flip": {"method": "standard", "augment": "flip"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_lowers_the_loss(name):
    state = begin(fresh(), recipe(epochs=4, **RECIPES[name]))
    records = list(fit(state, data(), data(20, seed=1), recipe(epochs=4, **RECIPES[name])))
    assert [r["epoch"] for r in records] == [1, 2, 3, 4] and state.step == 12
    assert records[-1]["train_loss"] < 0.9 * records[0]["train_loss"]
    assert ("val_robust_accuracy" in records[0]) == (RECIPES[name]["method"] in ROBUST)
    for record in records:
        assert record.get("val_robust_accuracy", 0) <= record["val_accuracy"]


def test_equal_runs_are_equal_and_seeds_differ():
    ends = []
    for seed in (0, 0, 1):
        state = begin(fresh(), recipe(method="pgd", seed=seed))
        list(fit(state, data(), None, recipe(method="pgd", seed=seed)))
        ends.append(weights(state))
    assert equal(ends[0], ends[1]) and not equal(ends[0], ends[2])


def test_seeded_construction_leaves_the_global_generator():
    before = torch.random.get_rng_state()
    assert torch.equal(fresh(3).net.fc.weight, fresh(3).net.fc.weight)
    assert not torch.equal(fresh(3).net.fc.weight, fresh(4).net.fc.weight)
    assert torch.equal(torch.random.get_rng_state(), before)


class Attending(torch.nn.Module):
    """Pixels as tokens, by torch's attention or written out, and a linear head."""

    def __init__(self, *, written: bool):
        super().__init__()
        self.into, self.head, self.written = torch.nn.Linear(C, 24), torch.nn.Linear(8, K), written

    def forward(self, x):
        q, k, v = self.into(x.flatten(2).transpose(1, 2))[:, None].chunk(3, dim=-1)
        if self.written:
            found = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
        else:
            found = F.scaled_dot_product_attention(q, k, v)
        return self.head(found[:, 0].mean(1))


def test_the_gradient_penalty_of_attention():
    """Its fused kernels have no second derivative; the plain products that stand in give the gradient of what it is."""
    nets = [toys.randomise(Attending(written=written), seed=4).double() for written in (True, False)]
    found = []
    for net in nets:
        model = Classifier(net, mean=[0.5] * C, std=[0.25] * C).double()
        loss, _ = penalised(model, images(N).double(), torch.arange(N) % K, weight=2.0)
        loss.backward()
        found.append([p.grad for p in net.parameters()])
    assert all(g.abs().max() > 0 for g in found[0])
    torch.testing.assert_close(found[1], found[0])


def test_trades_loss_equals_equation_5():
    model, batch, plan = convnet(), data(N), recipe(method="trades", beta=3.0)
    x = as_float(batch.image)
    moved = Inner(model, plan)(x, batch, epoch=0, done=0.5)
    loss, logits = loss_of(model, Inner(model, plan), x, batch, plan, epoch=0, done=0.5)
    clean, other = model(x).detach().double().numpy(), model(moved).detach().double().numpy()
    assert float(loss.detach()) == pytest.approx(reference.trades(clean, other, batch.label.tolist(), 3.0), rel=1e-5)
    assert torch.allclose(logits, model(moved), atol=1e-5)


def test_trades_attack_raises_the_divergence():
    model, batch = convnet(), data(N)
    x = as_float(batch.image)
    log_p = model(x).detach().log_softmax(1)

    def divergence(at):
        log_q = model(at).detach().log_softmax(1)
        return (log_p.exp() * (log_p - log_q)).sum(1)

    plan = recipe(method="trades")
    moved = Inner(model, plan)(x, batch, epoch=0, done=0.5)
    start = Inner(model, replace(plan, steps=0))(x, batch, epoch=0, done=0.5)
    assert (divergence(moved) > divergence(start)).float().mean() > 0.8


def test_the_inner_attack_stays_in_its_ball_and_starts_anew_each_epoch():
    model, batch, plan = convnet(), data(N), recipe(method="pgd")
    x = as_float(batch.image)
    inner = Inner(model, plan)
    first, again, other = (inner(x, batch, epoch=e, done=1.0) for e in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    for moved in (first, other):
        size = (moved.double() - x.double()).flatten(1).norm(dim=1)
        assert (size <= 0.2 * (1 + 1e-6)).all() and (size > 0.1).all() and moved.min() >= 0 and moved.max() <= 1


def test_eps_ramp_scales_the_ball():
    model, batch, plan = convnet(), data(N), recipe(method="pgd", eps_ramp=0.5)
    x = as_float(batch.image)
    inner = Inner(model, plan)
    assert torch.equal(inner(x, batch, epoch=0, done=0.0), x)
    half = (inner(x, batch, epoch=0, done=0.25) - x).flatten(1).norm(dim=1)
    assert (half <= 0.1 * (1 + 1e-6)).all() and (half > 0.05).all()
    assert torch.equal(inner(x, batch, epoch=0, done=0.5), inner(x, batch, epoch=0, done=1.0))


@pytest.mark.parametrize(("mode", "moves"), [("eval", False), ("train", True)])
def test_only_the_papers_mode_moves_statistics_in_the_attack(mode, moves):
    """T1, and in neither mode do weights get a gradient from the inner problem."""
    model, batch, plan = convnet().train(), data(N), recipe(method="pgd", attack_bn=mode)
    before = copy.deepcopy(model.state_dict())
    Inner(model, plan)(as_float(batch.image), batch, epoch=0, done=0.5)
    assert equal(before, model.state_dict()) == (not moves)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_the_inner_attack_sees_the_current_weights():
    model, other, batch, plan = convnet(seed=3), convnet(seed=4), data(N), recipe(method="pgd")
    x = as_float(batch.image)
    inner = Inner(model, plan)
    inner(x, batch, epoch=0, done=0.5)
    with torch.no_grad():
        for mine, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            mine.copy_(theirs)
    assert torch.allclose(
        inner(x, batch, epoch=0, done=0.5), Inner(other, plan)(x, batch, epoch=0, done=0.5), atol=1e-6
    )


# ------------------------------------------------------------------------------- position and resumption


class Stop(Exception):
    """What a signal raises in the tick."""


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_run_that_is_resumed_equals_one_that_never_stopped(stop):
    """T5: at any step, through copies of all that `State` holds, momentum, EMA and partial sums included."""
    plan = recipe(epochs=2, method="pgd", ema=0.9)
    whole = begin(fresh(), plan)
    expected = list(fit(whole, data(), data(20, seed=1), plan))

    def tick(step):
        if step == stop:
            raise Stop

    half = begin(fresh(), plan)
    records = []
    with pytest.raises(Stop):
        records.extend(fit(half, data(), data(20, seed=1), plan, tick=tick))
    resumed = begin(fresh(seed=9), plan)  # other weights: everything must come from the saved state
    resumed.classifier.load_state_dict(copy.deepcopy(half.classifier.state_dict()))
    resumed.average.load_state_dict(copy.deepcopy(half.average.state_dict()))
    resumed.optimiser.load_state_dict(copy.deepcopy(half.optimiser.state_dict()))
    for name in ("epoch", "step", "best", "best_epoch", "best_weights", "sums", "records"):
        setattr(resumed, name, copy.deepcopy(getattr(half, name)))
    list(fit(resumed, data(), data(20, seed=1), plan))
    assert resumed.records == expected and resumed.step == whole.step == 6
    assert equal(weights(resumed), weights(whole)) and equal(resumed.best_weights, whole.best_weights)
    assert equal(resumed.average.state_dict(), whole.average.state_dict())


def test_epochs_see_every_full_batch_once_in_another_order():
    seen = []

    class Watching(SmallNet):
        def forward(self, x):
            if self.training:
                seen.extend(x.flatten(1).sum(1).tolist())
            return super().forward(x)

    model = Classifier(Watching(), mean=[0.5] * C, std=[0.25] * C)
    plan = recipe(method="standard", augment="none")
    list(fit(begin(model, plan), data(), None, plan))
    first, second = seen[:ROWS], seen[ROWS:]
    assert len(second) == ROWS and sorted(first) == pytest.approx(sorted(second)) and first != second


def test_mean_loss_and_accuracy_weigh_examples():
    """T6: a learning rate of 0 leaves the model as it was; the record is the mean over the rows."""
    plan = recipe(method="standard", epochs=1, lr=0.0, augment="none")
    model = convnet()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    record = next(fit(begin(model, plan), data(), None, plan))
    assert record["train_loss"] > 0 and 0 <= record["train_accuracy"] * ROWS == round(record["train_accuracy"] * ROWS)


def test_a_loss_that_is_not_finite_says_where():
    model = fresh()
    with torch.no_grad():
        model.net.fc.bias[0] = torch.nan
    with pytest.raises(NumericError, match=r"loss is nan at step 0 \(epoch 1, learning rate 0\); try a smaller --lr"):
        list(fit(begin(model, recipe()), data(), None, recipe()))


def test_average_follows_with_its_decay_and_is_what_is_kept():
    plan = recipe(method="standard", ema=0.5)
    state = begin(fresh(), plan)
    watched = ("fc.weight", "bn1.running_mean", "bn1.running_var")
    expected = {name: state.average.net.state_dict()[name].clone() for name in watched}

    def follow(step: int) -> None:
        decay = min(0.5, (1 + step) / (10 + step))
        for name in watched:
            expected[name] = decay * expected[name] + (1 - decay) * state.classifier.net.state_dict()[name]

    list(fit(state, data(), data(20, seed=1), plan, tick=follow))
    for name in watched:
        assert torch.allclose(state.average.net.state_dict()[name], expected[name], atol=1e-6), name
    assert not torch.allclose(state.average.net.bn1.running_var, state.classifier.net.bn1.running_var, rtol=1e-4)
    assert int(state.average.net.bn1.num_batches_tracked) == int(state.classifier.net.bn1.num_batches_tracked) > 0
    assert state.subject is state.average


@pytest.mark.parametrize(("select", "best"), [("mean", 2), ("clean", 1), ("robust", 3)])
def test_selection_keeps_the_best_epoch(select, best, monkeypatch):
    scores = iter([(0.9, 0.1), (0.8, 0.5), (0.5, 0.6), (0.4, 0.4)])

    def validate(classifier, held_out, plan, ranks):
        clean, robust = next(scores)
        return {"val_accuracy": clean, "val_robust_accuracy": robust}

    monkeypatch.setattr(train, "validate", validate)
    plan = recipe(epochs=4, method="pgd", steps=1, select=select)
    state = begin(fresh(), plan)
    at = {}
    for record in fit(state, data(), data(20, seed=1), plan):
        at[record["epoch"]] = {k: v.clone() for k, v in state.classifier.net.state_dict().items()}
    assert state.best_epoch == best and equal(state.best_weights, at[best]) and not equal(at[best], at[4])


def test_validation_counts_each_row_once_and_changes_nothing():
    model, held, plan = convnet(), data(37, seed=1), recipe(method="pgd")
    before = copy.deepcopy(model.state_dict())
    found = validate(model, held, plan)
    right = (model(as_float(held.image)).argmax(1) == held.label).double().mean()
    assert found["val_accuracy"] == pytest.approx(float(right)) and equal(before, model.state_dict())
    assert (found["val_robust_accuracy"] * 37) == pytest.approx(round(found["val_robust_accuracy"] * 37))


def test_validation_uses_pgd_10_of_the_training_ball():
    spec = validation_attack(recipe(method="fgsm", norm="linf", eps=0.03))
    assert (spec.name, spec.norm, spec.eps, spec.steps) == ("pgd", "linf", 0.03, 10)
    assert validation_attack(recipe(method="standard")) is None


def test_fewer_rows_than_a_batch_are_one_step():
    plan = recipe(method="standard", batch=500)
    state = begin(fresh(), plan)
    list(fit(state, data(), None, plan))
    assert state.step == 2


def test_labels_are_smoothed_outside_of_the_inner_attack():
    """Szegedy et al. 2016: (1 - s) of the loss of the label and s of the mean over classes; the attack is unchanged."""
    model, rows, share = fresh().train(), data(16), 0.3
    images = as_float(rows.image)
    plain = recipe(method="standard")
    logits = copy.deepcopy(model)(images)
    log_p = F.log_softmax(logits, 1)
    expected = (1 - share) * -log_p.gather(1, rows.label[:, None]).mean() - share * log_p.mean()
    found, _ = loss_of(copy.deepcopy(model), None, images, rows, replace(plain, smoothing=share), epoch=0, done=0.0)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    robust = recipe(method="pgd")
    attacks = [
        Inner(copy.deepcopy(model), replace(robust, smoothing=s))(images, rows, epoch=0, done=0.0)
        for s in (None, share)
    ]
    assert torch.equal(*attacks)
