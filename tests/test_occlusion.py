"""Occlusion: captum's where windows are whole, the definition in float64 where they are cut, exact for linear models."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from toys import IDS, TARGET, C, H, N, W, convnet, evaluation, images, linear, weights_of

from rbkit.tools.attribution import Saliency
from rbkit.tools.masking import MASKERS, blurred, shown
from rbkit.tools.occlusion import sides, windows
from rbkit.tools.saliency import explain

NET, X = convnet(), images()


def explained(model=NET, x=X, *, target=TARGET, ids=IDS, **spec):
    return explain(evaluation(model), x, target, Saliency("occlusion", **spec), ids=ids)


def hidden_by(masker, model, x):
    return {
        "black": torch.zeros_like(x),
        "mean": model.mean.expand_as(x),
        "blur": blurred(x),
    }[masker]


def positions(side, window, stride):
    """Where windows begin along a side, until one reaches the border; the rows or columns of each."""
    spans, start = [], 0
    while True:
        spans.append([p for p in range(start, start + window) if p < side])
        if start + window >= side:
            return spans
        start += stride


def defined(x, hidden, target, window, stride):
    """Zeiler and Fergus in float64, one image and one window at a time; maps (N, H, W) of one channel's share."""
    double = copy.deepcopy(NET).double()
    out = torch.zeros(len(x), H, W, dtype=torch.float64)
    for i, k in enumerate(target.tolist()):
        drops = [[[] for _ in range(W)] for _ in range(H)]
        clear = float(double(x[i : i + 1].double())[0, k].detach())
        for rows, columns in itertools.product(positions(H, window, stride), positions(W, window, stride)):
            shown = x[i].double().clone()
            for y, z in itertools.product(rows, columns):
                shown[:, y, z] = hidden[i, :, y, z].double()
            drop = clear - float(double(shown[None])[0, k].detach())
            for y, z in itertools.product(rows, columns):
                drops[y][z].append(drop / (len(rows) * len(columns) * C))
        out[i] = torch.tensor([[sum(d) / len(d) for d in row] for row in drops], dtype=torch.float64)
    return out


@pytest.mark.parametrize("masker", ["black", "mean", "blur"])
def test_it_is_the_definition(masker):
    hidden = hidden_by(masker, NET, X)
    for window, stride in ((3, 2), (2, 1), (4, 4)):
        found = explained(window=window, stride=stride, masker=masker).attribution
        slow = defined(X, hidden, TARGET, window, stride)
        for channel in range(C):
            torch.testing.assert_close(found[:, channel].double(), slow, rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore")  # of the peer
@pytest.mark.parametrize(("window", "stride"), [(2, 1), (3, 1), (5, 1)])
def test_whole_windows_are_captums(window, stride):
    """Captum gives each pixel of a window the whole fall: a factor of the entries in a window."""
    from captum.attr import Occlusion

    theirs = Occlusion(NET).attribute(
        X, (C, window, window), strides=(C, stride, stride), target=TARGET, baselines=NET.mean.expand_as(X)
    )
    found = explained(window=window, stride=stride).attribution
    torch.testing.assert_close(found * (C * window**2), theirs.float(), rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore")  # of the peer
def test_cut_windows_stand_where_captums_do():
    """Windows of 4 by 3 are cut on the right only; the fall of each is told apart by the size of what is left of it."""
    from captum.attr import Occlusion

    x = images(h=7, w=9)
    theirs = Occlusion(NET).attribute(x, (C, 4, 4), strides=(C, 4, 4), target=TARGET, baselines=0)
    found = explained(x=x, window=4, stride=4, masker="black").attribution
    size = torch.ones(7, 9)
    for top, bottom, left, right in windows(7, 9, window=4, stride=4).tolist():
        size[top:bottom, left:right] = (bottom - top) * (right - left)
    assert size.unique().tolist() == [3, 4, 12, 16]
    torch.testing.assert_close(found * C * size, theirs.float(), rtol=0, atol=2e-5)


def test_of_a_linear_model_it_is_weight_times_step_averaged_in_the_window():
    model = linear()
    exact = weights_of(model)[TARGET] * X
    found = explained(model, window=1, stride=1, masker="black")
    expected = exact.sum(1, keepdim=True).expand_as(X) / C
    torch.testing.assert_close(found.attribution, expected, rtol=0, atol=1e-5)
    assert (found.completeness_error < 1e-4).all()
    # Squares that do not overlap keep their sums, also where the border cuts them.
    found = explained(model, window=4, stride=4, masker="black")
    for rows in (slice(0, 4), slice(4, 5)):
        for columns in (slice(0, 4), slice(4, 6)):
            torch.testing.assert_close(
                found.attribution[..., rows, columns].sum((1, 2, 3)),
                exact[..., rows, columns].sum((1, 2, 3)),
                rtol=0,
                atol=1e-5,
            )


def test_errors_and_changes_are_what_they_say():
    found = explained(masker="black", window=3, stride=2)
    change = (NET(X) - NET(torch.zeros_like(X)))[torch.arange(N), TARGET].detach().double()
    torch.testing.assert_close(found.output_change, change, rtol=0, atol=1e-5)
    gap = (found.attribution.flatten(1).double().sum(1) - found.output_change).abs()
    assert torch.equal(found.completeness_error, gap) and (gap > 1e-4).any()


def test_defaults_are_a_quarter_and_a_half():
    assert sides(Saliency("occlusion"), 32, 40) == (8, 4)
    assert sides(Saliency("occlusion"), 3, 2) == (1, 1)
    assert sides(Saliency("occlusion", window=5), 32, 40) == (5, 2)
    assert sides(Saliency("occlusion", window=5, stride=5), 32, 40) == (5, 5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"window": 6}, "window 6: expected 1 to 5"),
        ({"window": 2, "stride": 3}, "stride 3: expected 1 to 2"),
        ({"masker": "data"}, "expected black, mean or blur"),
    ],
)
def test_what_does_not_fit_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        explained(**spec)


@pytest.mark.parametrize("masker", [m for m in MASKERS if m != "data"])
def test_a_map_depends_on_no_other_image(masker):
    """Also where the model has one channel, for which a blur in one batch rounds otherwise for one image alone."""
    grey = linear(shape=(1, 28, 29))
    for model, x in ((NET, X), (grey, images(c=1, h=28, w=29))):
        whole = explained(model, x, masker=masker)
        order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
        other = explained(model, x[order], target=TARGET[order], ids=IDS[order], masker=masker)
        assert torch.equal(other.attribution, whole.attribution[order])
        alone = explained(model, x[4:5], target=TARGET[4:5], ids=IDS[4:5], masker=masker)
        assert torch.equal(alone.attribution[0], whole.attribution[4])
        assert torch.equal(alone.completeness_error[0], whole.completeness_error[4])


def test_a_blurred_baseline_of_a_grey_image_depends_on_no_other_image():
    model, x = linear(shape=(1, 28, 29)), images(c=1, h=28, w=29)
    spec = Saliency("ig", baseline="blur", steps=3)
    whole = explain(evaluation(model), x, TARGET, spec, ids=IDS).attribution
    alone = explain(evaluation(model), x[:1], TARGET[:1], spec, ids=IDS[:1]).attribution
    assert torch.equal(alone[0], whole[0])


def test_only_whole_blocks_are_computed():
    judged, seen = evaluation(NET), []
    judged.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    explain(judged, X, TARGET, Saliency("occlusion", window=2, stride=1), ids=IDS)
    assert set(seen) == {32} and len(seen) == -(-N * 4 * 5 // 32) + 2


@pytest.mark.parametrize("output", ["probability", "log-probability"])
def test_the_output_is_what_is_explained(output):
    found = explained(output=output, window=3, stride=3).output_change
    ends = [NET(x).detach().double().softmax(1) for x in (X, NET.mean.expand_as(X))]
    ends = [z.log() if output == "log-probability" else z for z in ends]
    change = (ends[0] - ends[1])[torch.arange(N), TARGET]
    torch.testing.assert_close(found, change, rtol=0, atol=1e-5)


def test_no_image_is_no_map():
    found = explained(x=X[:0], target=TARGET[:0], ids=IDS[:0])
    assert found.attribution.shape == (0, C, H, W) and found.completeness_error.shape == (0,)


def test_what_is_shown_is_exactly_the_image_or_the_fill():
    """To the last bit, also where both are far apart in size."""
    image, fill = images(seed=1), 1e-6 * images(seed=2)[:1]
    kept = images(seed=3)[:, :1] < 0.5
    for left, right in ((image, fill), (fill, image)):
        assert torch.equal(shown(left, right, kept), torch.where(kept, left, right))
