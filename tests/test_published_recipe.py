"""What the paper's code does otherwise, each as a named option: which iterate is kept, schedule, optimiser, augmentation."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import execute, shell
from test_tools_train import data, equal, fresh, recipe, weights
from toys import C, K, convnet, evaluation, generator, images

from rbkit.cli._checkpoint import Job
from rbkit.tools import attack, invert, stages, train
from rbkit.tools.ascend import Plan, ascend, climb, drive
from rbkit.tools.augment import resized
from rbkit.tools.flow import polling
from rbkit.tools.losses import cross_entropy
from rbkit.tools.norms import L2
from rbkit.tools.recipe import learning_rate
from rbkit.tools.risk import Inner
from rbkit.tools.slots import Batch
from rbkit.tools.train import begin, fit

ROWS = 40  # more than a block of 32: each block has a mean of its own
PLAN = Plan(L2, 2.0, 8.0, 4)  # steps so long that the mean loss goes up and down
SHORT = replace(PLAN, step_size=0.8)  # and so short that it rises to the end


def rows():
    model, x = evaluation(convnet()), images(ROWS, seed=5)
    label = model.logits(x).argmax(1)
    label[::3] = (label[::3] + 1) % K  # misclassified rows count in the mean too
    return model, x, label


def iterates(model, plan, x, label):
    """(images, loss) of each iterate, the last one too, from the clean images."""
    found, now = [], x
    for step in range(plan.steps + 1):
        leaf = now.clone().requires_grad_()
        loss = cross_entropy(model(leaf), label)
        found.append((now, loss.detach()))
        if step < plan.steps:
            now = climb(now, torch.autograd.grad(loss.sum(), leaf)[0], x, plan)
    return found


def slow_batch_best(model, plan, x, label, *, judged):
    """The iterate of the highest mean loss, block by block; the first where several tie."""
    parts = []
    for start in range(0, len(x), 32):
        seen = iterates(model, plan, x[start : start + 32], label[start : start + 32])
        seen = seen if judged else seen[:-1]
        means = [float(loss.mean()) for _, loss in seen]
        parts.append(seen[means.index(max(means))][0])
    return torch.cat(parts)


@pytest.mark.parametrize(("plan", "judged"), [(PLAN, True), (PLAN, False), (SHORT, True), (SHORT, False)])
def test_the_best_iterate_of_the_batch_is_one_for_all_rows(plan: Plan, judged: bool) -> None:
    model, x, label = rows()
    last = "judged" if judged else "unjudged"
    spec = attack.pgd(
        norm="l2",
        eps=2.0,
        steps=4,
        step_size=plan.step_size,
        start="clean",
        until="end",
        keep="batch",
        last_iterate=last,
    )
    batch = Batch(torch.arange(ROWS), x, {"label": label})
    found = next(stages.run(model, spec, polling([batch]), refill=False))[1].outcome
    slow = slow_batch_best(model, plan, x, label, judged=judged)
    right = model.logits(x).argmax(1) == label
    assert found.images[right].numpy() == pytest.approx(slow[right].numpy(), abs=1e-5)
    assert torch.equal(found.images[~right], x[~right]) and bool((~right).any())
    own = next(stages.run(model, replace(spec, keep="best"), polling([batch]), refill=False))[1].outcome
    assert plan is SHORT or not torch.allclose(own.images[right], slow[right], atol=1e-3)


def test_an_unjudged_iterate_is_a_step_that_does_not_count() -> None:
    model, x, label = rows()
    spec = attack.pgd(norm="l2", eps=0.3, steps=5, start="clean", until="end")
    batch = Batch(torch.arange(ROWS), x, {"label": label})
    short = replace(spec, steps=4)
    found, expected, whole = (
        next(stages.run(model, s, polling([batch])))[1].outcome.images
        for s in (replace(spec, last_iterate="unjudged"), short, spec)
    )
    assert torch.equal(found, expected) and not torch.equal(found, whole)


@pytest.mark.parametrize(("plan", "judged"), [(PLAN, True), (PLAN, False), (SHORT, True), (SHORT, False)])
def test_training_takes_the_same_iterate(plan: Plan, judged: bool) -> None:
    """`drive`, over all rows at once, against the slow loop over one block."""
    model, x, label = rows()
    x, label = x[:32], label[:32]
    goal = attack.objective(model)
    kept = replace(plan, steps=4 if judged else 3, keep="batch")
    found = drive(goal, kept, Batch(torch.arange(32), x, {"label": label}))
    slow = slow_batch_best(model, plan, x, label, judged=judged)
    assert found.numpy() == pytest.approx(slow.numpy(), abs=1e-5)
    last = drive(goal, replace(plan, keep="last"), Batch(torch.arange(32), x, {"label": label}))
    assert torch.allclose(found, last, atol=1e-5) == (plan is SHORT and judged)


def test_the_inner_attack_of_the_paper() -> None:
    """From the clean image; with one step, left unjudged, that is where it ends."""
    plan = recipe(steps=1, attack_start="clean", attack_keep="batch", last_iterate="unjudged")
    model, rows = fresh(), data(16)
    x = train.as_float(rows.image)
    assert torch.equal(Inner(model, plan)(x, rows, epoch=0, done=0.0), x)
    for change in ({"attack_start": "random"}, {"last_iterate": "judged"}):
        assert not torch.equal(Inner(model, replace(plan, **change))(x, rows, epoch=0, done=0.0), x)


def test_inversions_keep_what_they_are_told() -> None:
    model, x, _ = rows()
    spec = invert.Inversion("representation", steps=6, step_size=2.0, keep="last")
    starts = [torch.full_like(x, 0.5)]
    made, loss = invert.invert(model, x, starts, spec, ids=torch.arange(ROWS))
    best = invert.invert(model, x, starts, replace(spec, keep="best"), ids=torch.arange(ROWS))[1]
    assert (best <= loss + 1e-6).all() and (best < loss - 1e-3).any()
    short = invert.invert(model, x, starts, replace(spec, steps=5), ids=torch.arange(ROWS))[0]
    left = invert.invert(model, x, starts, replace(spec, last_iterate="unjudged"), ids=torch.arange(ROWS))[0]
    assert torch.equal(left, short) and not torch.equal(left, made)


def test_the_mean_is_that_of_the_slots_at_work() -> None:
    """Padding holds copies of the first row, which must not weigh on the mean."""
    model, x, label = rows()
    found = ascend(
        attack.objective(model),
        replace(PLAN, keep="batch"),
        Batch(torch.arange(5), x[:5], {"label": label[:5]}),
        block=32,
    )
    slow = slow_batch_best(model, PLAN, x[:5], label[:5], judged=True)
    assert found.images.numpy() == pytest.approx(slow.numpy(), abs=1e-5)


# ------------------------------------------------------------------------------------------ the outer problem


def test_a_schedule_longer_than_the_training_is_left_halfway() -> None:
    plan = recipe(epochs=100, schedule="cosine", schedule_epochs=200, lr=0.01)
    assert learning_rate(plan, 1000, 1000) == pytest.approx(0.005)
    assert learning_rate(plan, 500, 1000) == pytest.approx(0.005 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(replace(plan, schedule_epochs=100), 1000, 1000) == pytest.approx(0, abs=1e-12)


def changed(**options) -> torch.Tensor:
    """Changes of all weights in one step."""
    plan = recipe(method="standard", eps=0.0, epochs=1, momentum=0.0, weight_decay=0.0, schedule="constant", **options)
    model = fresh()
    before = [p.detach().clone() for p in model.parameters()]
    train.train_epoch(begin(model, plan), data(16), plan)
    return torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])


def test_gradients_are_clipped_by_value() -> None:
    plain, clipped = changed(lr=0.5), changed(lr=0.5, clip_value=0.01)
    assert plain.abs().max() > 0.006 and clipped.abs().max() == pytest.approx(0.005, rel=1e-4)
    small = plain.abs() < 0.004
    assert torch.allclose(plain[small], clipped[small], atol=1e-6)


def test_adam_takes_steps_of_its_rate() -> None:
    moved = changed(lr=0.01, optimizer="adam").abs()
    assert moved.max() == pytest.approx(0.01, rel=1e-3) and (moved > 0.0099).float().mean() > 0.5


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_optimisers_resume_to_the_same_bytes(optimizer: str, tmp_path: Path) -> None:
    """Moments and step counts of every weight are in the checkpoint."""
    plan, rows = recipe(method="standard", eps=0.0, optimizer=optimizer, lr=0.01, epochs=3), data()
    whole, first, again = (begin(fresh(seed), plan) for seed in (0, 0, 1))
    list(fit(whole, rows, None, plan))
    next(fit(first, rows, None, plan))
    job = Job({}, plan, rows, path=str(tmp_path / "x.ckpt"))
    assert job.save(first) and job.restore(again)
    list(fit(again, rows, None, plan))
    assert equal(weights(again), weights(whole)) and not equal(weights(first), weights(whole))


# ------------------------------------------------------------------------------------------ parts at full size


def ramp(n: int) -> torch.Tensor:
    return torch.linspace(0.1, 0.9, 12).expand(n, C, 10, 12).contiguous()


def test_a_part_of_a_ramp_is_a_flatter_ramp() -> None:
    """Unturned, a part at full size has less slope, mirrored every other time; nothing becomes black."""
    found = resized(ramp(400), torch.arange(400), seed=0, epoch=0, degrees=0.0)
    slope = found[:, 0, 5].diff(dim=1)[:, 2:-2]
    assert torch.allclose(slope, slope.mean(1, keepdim=True).expand_as(slope), atol=2e-4)
    share = slope.mean(1) / (0.8 / 11)
    assert 0.4 < (share < 0).float().mean() < 0.6
    assert share.abs().max() <= 1 + 1e-3 and share.abs().min() >= math.sqrt(0.08 * 3 / 4) - 1e-3
    assert found.min() >= 0.1 - 1e-6


def test_turned_parts_have_black_corners_and_are_functions_of_seed_epoch_and_id() -> None:
    x, ids = ramp(60), torch.arange(60)
    whole = resized(x, ids, seed=0, epoch=1)
    assert (whole[:, 0, 0, 0] == 0).float().mean() > 0.3 and (whole[:, :, 4:6, 5:7] > 0.05).all()
    order = torch.randperm(60, generator=generator(0))
    assert torch.equal(resized(x[order], ids[order], seed=0, epoch=1), whole[order])
    for other in ({"seed": 0, "epoch": 2}, {"seed": 1, "epoch": 1}):
        assert not torch.equal(resized(x, ids, **other), whole)


# ------------------------------------------------------------------------------------------ the commands


def test_the_options_reach_the_files(tmp_path: Path, train_file: Path, stream_file: Path) -> None:
    """One call each, and what they record."""
    result = shell(
        f"""set -e
        rb-train {train_file} --width 4 --epochs 1 --eps 0.5 --steps 2 --attack-bn train --attack-start clean \
            --attack-keep batch --last-iterate unjudged --schedule cosine --schedule-epochs 2 --clip-value 0.1 \
            --augment resized --val {stream_file} -q -o m.safetensors
        rb-attack {stream_file} -m m.safetensors --steps 3 --start clean --keep batch --last-iterate unjudged -o a.safetensors
        rb-invert {stream_file} -m m.safetensors --steps 2 --keep last --last-iterate unjudged -o i.safetensors
        rb-score a.safetensors -m m.safetensors --tag paper --json > s.jsonl
        rb-info --json m.safetensors a.safetensors i.safetensors""",
        cwd=tmp_path,
    )
    assert result.status == 0, result.err
    shown = result.out.decode()
    for words in ('"attack_keep":"batch"', '"schedule_epochs":2', '"clip_value":0.1', '"augment":"resized"'):
        assert words in shown.replace(" ", ""), words
    assert shown.count("unjudged") >= 3
    assert all('"tag":"paper"' in line for line in (tmp_path / "s.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("rb-train x --eps 0.5 --last-iterate unjudged", "--attack-keep batch"),
        ("rb-train x --epochs 8 --schedule-epochs 4", "--schedule-epochs 4"),
        ("rb-attack x -m m --keep batch --until broken", "--until broken"),
        ("rb-attack x -m m --attack square --keep batch", "goes with --attack pgd"),
        ("rb-invert x -m m --keep none", "expected one of best, batch, last"),
    ],
)
def test_what_does_not_go_together_is_refused(command: str, words: str) -> None:
    result = execute(*command.split())
    assert result.status == 2 and result.err.count("\n") == 1 and words in result.err
