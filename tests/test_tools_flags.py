"""Red flags: each fires on a model or an attack built for it, together with those that must join it, and none on plain ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from toys import H, W, convnet, generator, linear

from rbkit.tools import attack, flags, stages, trial
from rbkit.tools.flow import polling
from rbkit.tools.models import Classifier, Evaluation
from rbkit.tools.slots import Batch
from rbkit.tools.trial import Sample, Trial

N, C, EPS = 32, 3, 0.5


def same(x: Tensor) -> Tensor:
    return x


class Defended(nn.Module):
    """A network behind something that hides its gradient."""

    def __init__(self, net: nn.Module, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


def defended(before: Callable[[Tensor], Tensor] = same, after: Callable[[Tensor], Tensor] = same) -> Evaluation:
    net = linear().net
    return Evaluation(Classifier(Defended(net, before, after), mean=[0.0] * C, std=[1.0] * C), block=32)


def rows(model: Evaluation, count: int = N, *, spread: float = 0.2, norm: str = "l2", eps: float = EPS,
         **spec: object) -> Sample:  # fmt: skip
    """Images that are multiples of 1/16, labelled by the undefended model, attacked by PGD with `spec`."""
    x = (0.5 + spread * torch.randn(count, C, H, W, generator=generator(5))).clamp(0, 1).mul(16).round() / 16
    ids = torch.arange(count) * 7
    sample = Sample(ids, x, x, model.logits(x).argmax(1))
    return attacked(model, sample, attack.pgd(norm=norm, eps=eps, **spec))


def attacked(model: Evaluation, sample: Sample, spec: attack.Attack) -> Sample:
    batch = Batch(sample.ids, sample.clean, {"label": sample.label})
    _, found = next(stages.run(model, spec, polling([batch])))
    return replace(sample, stored=found.outcome.images, target=found.target)


def fired(model: Evaluation, sample: Sample, *, norm: str = "l2", eps: float = EPS) -> set[str]:
    found = flags.flags(model, sample, norm=norm, eps=eps)
    assert all(flag.n == N for flag in found)
    return {flag.name for flag in found if flag.fires}


def near_the_grid(x: Tensor) -> Tensor:
    """Lets the gradient through only where a pixel still has the value of a clean one."""
    clean = (x * 16 - (x * 16).round()).abs() < 1e-3
    return torch.where(clean, x, x.detach())


def no_number(logits: Tensor) -> Tensor:
    return logits + (0 * logits).sqrt()


def drawn_by_luck(logits: Tensor) -> Tensor:
    """Two classes, each with half of all points near any image; the gradient is zero."""
    first = logits[:, 0]
    return torch.stack([(500 * first).cos(), 0 * first], 1)


MASKED = {"flat_loss", "black_box", "unbounded"}
DEFENCES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], float, set[str]]] = {
    "quantised input": (lambda x: (x * 8).round() / 8, same, EPS, MASKED | {"zero_gradients"}),
    "saturated softmax": (same, lambda z: 200 * z, EPS, MASKED | {"zero_gradients", "logit_scale"}),
    "shattered gradient": (lambda x: x + 0.02 * torch.sin(3000 * x), same, EPS, {"flat_loss", "black_box"}),
    "no gradient off the clean values": (near_the_grid, same, EPS, {"one_step", "zero_gradients", "flat_loss"}),
    "reversed gradient": (lambda x: 2 * x.detach() - x, same, 2.0, MASKED | {"noise"}),
    "luck of the start": (
        lambda x: x.detach() + 0 * x,
        drawn_by_luck,
        EPS,
        MASKED | {"zero_gradients", "restarts", "noise"},
    ),
    "no number": (same, no_number, EPS, {"nan_gradients"} | MASKED),
    "noise layer": (same, lambda z: z + 0.01 * torch.randn_like(z), EPS, {"randomised"}),
    "probabilities": (same, lambda z: (0.1 * z).softmax(1), EPS, {"probabilities"}),
    "batch statistic": (lambda x: x - 0.1 * x.mean(0), same, EPS, {"batch_dependent"}),
}


@pytest.mark.parametrize("defence", DEFENCES)
def test_a_flag_fires_on_what_it_is_for(defence: str) -> None:
    before, after, eps, expected = DEFENCES[defence]
    model = defended(before, after)
    found = fired(model, rows(model, eps=eps), eps=eps)
    assert expected <= found
    if not expected & flags_of_attacks():
        assert found == expected


def flags_of_attacks() -> set[str]:
    return set(flags.FLAGS) - {"probabilities", "randomised", "batch_dependent"}


def test_every_flag_has_a_trigger() -> None:
    assert set().union(*(row[3] for row in DEFENCES.values())) | {"few_steps"} == set(flags.FLAGS)


def test_a_network_without_any_gradient_is_found_out() -> None:
    model = defended(torch.detach)
    sample = labelled(model)
    assert {"zero_gradients", "flat_loss", "unbounded"} <= fired(model, sample)


WEAK = {
    "tiny step": attack.pgd(norm="l2", eps=EPS, steps=20, step_size=EPS / 1000, start="clean"),
    "one short step": attack.pgd(norm="l2", eps=EPS, steps=1, step_size=EPS / 10, start="clean"),
}


@pytest.mark.parametrize("weak", WEAK)
def test_a_weak_attack_is_noticed_and_the_model_is_not_blamed(weak: str) -> None:
    model = Evaluation(convnet(), block=32)
    sample = attacked(model, labelled(model), WEAK[weak])
    found = fired(model, sample)
    assert "few_steps" in found and found <= {"few_steps", "one_step", "noise", "black_box"}


def labelled(model: Evaluation) -> Sample:
    x = torch.rand(N, C, H, W, generator=generator(6))
    return Sample(torch.arange(N), x, x, model.logits(x).argmax(1))


def test_an_attack_on_another_model_is_noticed() -> None:
    model, other = Evaluation(convnet(seed=3), block=32), Evaluation(convnet(seed=4), block=32)
    sample = labelled(model)
    stored = attacked(
        other, replace(sample, label=other.logits(sample.clean).argmax(1)), attack.pgd(norm="l2", eps=EPS)
    )
    assert "few_steps" in fired(model, replace(sample, stored=stored.stored))


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.1), ("l2", EPS), ("linf", 0.01), ("linf", 0.1)])
def test_plain_models_attacked_properly_have_none(norm: str, eps: float) -> None:
    for model in (Evaluation(linear(), block=32), Evaluation(convnet(), block=32)):
        sample = attacked(model, labelled(model), attack.pgd(norm=norm, eps=eps))
        assert fired(model, sample, norm=norm, eps=eps) == set()


def test_a_targeted_attack_is_judged_by_its_targets() -> None:
    model = Evaluation(convnet(), block=32)
    good = attacked(model, labelled(model), attack.pgd(norm="l2", eps=EPS, targeted=True))
    assert good.target is not None and fired(model, good) == set()
    assert "few_steps" in fired(model, replace(good, stored=good.clean))
    other = attacked(model, labelled(model), attack.pgd(norm="l2", eps=EPS)).stored  # broken, but not at the target
    assert "few_steps" in fired(model, replace(good, stored=other))


def test_the_sample_is_that_of_the_ids_in_any_order_and_pieces() -> None:
    x = torch.rand(150, 2, 3, 4, generator=generator(7))
    every = Sample(torch.arange(150) - 20, x, x.flip(0), torch.arange(150) % 5)
    whole = every.drawn()
    order = torch.randperm(150, generator=generator(8))
    pieces = [every.take(order[a:b]) for a, b in ((0, 70), (70, 71), (71, 150))]
    grown = pieces[0].drawn()
    for piece in pieces[1:]:
        grown = grown.joined(piece).drawn()
    for name in ("ids", "clean", "stored", "label"):
        assert torch.equal(getattr(whole, name), getattr(grown, name))
    assert len(whole.ids) == 64 and whole.ids.tolist() != sorted(whole.ids.tolist())
    with pytest.raises(ValueError, match="targeted"):
        whole.joined(replace(whole, target=whole.label))


def test_flags_repeat_and_leave_the_model_alone() -> None:
    model = Evaluation(convnet(), block=32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sample = labelled(model)
    state = torch.get_rng_state()
    first, second = (flags.flags(model, sample, norm="l2", eps=0.2) for _ in range(2))
    assert first == second and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_few_rows_decide_nothing() -> None:
    """6 rows cannot pass the test at 0.01, 7 can, and each row lost asks for more."""
    model = Evaluation(convnet(), block=32)
    sample = labelled(model)
    for count, verdict in ((6, None), (7, True), (0, None)):
        some = sample.take(torch.arange(count)) if count else sample.take(torch.arange(9))
        if not count:
            some = replace(some, label=(some.label + 1) % 4)  # all are wrong before any attack
        found = {flag.name: flag for flag in flags.flags(model, some, norm="l2", eps=2.0)}
        assert found["few_steps"].fires is verdict and found["few_steps"].n == count
        assert found["randomised"].fires is False
    assert [flags._needed(lost) for lost in (0, 1, 3)] == [7, 10, 14]


def test_what_flags_refuse() -> None:
    model = Evaluation(convnet(), block=32)
    for norm, eps, word in (("l2", 0.0, "eps"), ("l2", float("inf"), "eps"), ("l1", 1.0, "norm")):
        with pytest.raises(ValueError, match=word):
            flags.flags(model, labelled(model), norm=norm, eps=eps)


def test_the_search_stays_in_the_ball_and_changes_squares() -> None:
    ids, delta = torch.arange(6), torch.zeros(6, 3, 8, 10)
    for norm, size in (("linf", 0.3), ("l2", 0.15)):
        change = trial._square(ids, delta, 0.3, norm, 0, seed=0)
        measured = change.flatten(1).abs().amax(1) if norm == "linf" else change.flatten(1).norm(dim=1)
        assert measured.tolist() == pytest.approx([size] * 6)
        assert ((change != 0).sum((2, 3)) == 36).all()  # 6 x 6 is half of 8 x 10 at the first query
        assert torch.equal(change[2:3], trial._square(ids[2:3], delta[:1], 0.3, norm, 0, seed=0))
    last = trial._square(ids, delta, 0.3, "linf", trial.QUERIES - 1, seed=0)
    assert ((last != 0).sum((2, 3)) == 1).all()


def test_a_gain_is_told_from_chance_by_the_rows_that_are_lost_too() -> None:
    """3 rows lost ask for 14 won."""
    for won, fires in ((13, False), (14, True)):
        first, second = torch.arange(40) < won, (torch.arange(40) >= 20) & (torch.arange(40) < 23)
        assert flags._gain("few_steps", ("a", first), ("b", second)).fires is fires


def test_without_a_gradient_no_row_falls_to_an_unbounded_attack() -> None:
    """A start away from the clean image would break most rows by itself."""
    model = defended(torch.detach)
    found = {flag.name: flag for flag in flags.flags(model, labelled(model), norm="linf", eps=0.01)}
    assert found["unbounded"].value == 1.0


def test_a_single_row_tells_a_batch_statistic() -> None:
    model = defended(lambda x: x - 0.1 * x.mean(0))
    found = {flag.name: flag for flag in flags.flags(model, labelled(model).take(torch.arange(1)), norm="l2", eps=EPS)}
    assert found["batch_dependent"].fires


def test_the_search_climbs() -> None:
    """It breaks most of what PGD breaks, and far more than the tenth that squares which do not build on each other break."""
    model = defended()
    trial = Trial(model, labelled(model), "linf", 0.07, 0)
    assert trial.default.float().mean() > 0.9 and trial.searched().float().mean() > 0.8
