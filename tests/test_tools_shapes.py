"""The `shapes` data: each row a function of (seed, split, id), masks that match objects, labels in balance."""

from __future__ import annotations

import math

import pytest
import torch

from rbkit.tools import shapes

IDS = torch.arange(40)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generate(ids, **options):
    """(image, label, mask)."""
    return tuple(shapes.generate(ids, **options)[name] for name in ("image", "label", "mask"))


@pytest.mark.parametrize("cue", [None, shapes.Cue(0.5)])
def test_a_row_is_the_same_in_any_batch_and_order(cue):
    whole = shapes.generate(IDS, seed=1, split="train", cue=cue)
    assert set(whole) == {"image", "label", "mask"} | ({"cue_mask"} if cue else set())
    order = torch.tensor([31, 2, 17, 2, 39])
    some, one = (shapes.generate(ids, seed=1, split="train", cue=cue) for ids in (order, IDS[7:8]))
    for name, rows in whole.items():
        assert torch.equal(some[name], rows[order]) and torch.equal(one[name][0], rows[7])


def test_types_and_shapes():
    image, label, mask = generate(IDS[:5], seed=0, split="test")
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (5, 3, 32, 32))
    assert (label.dtype, tuple(label.shape)) == (torch.int64, (5,))
    assert (mask.dtype, tuple(mask.shape)) == (torch.uint8, (5, 32, 32)) and mask.max() == 1
    assert torch.equal(label, shapes.labels_of(IDS[:5], seed=0, split="test"))


@pytest.mark.parametrize("other", [{"seed": 0, "split": "train"}, {"seed": 1, "split": "test"}])
def test_splits_and_seeds_share_no_image(other):
    image, label, _ = generate(IDS, seed=0, split="test")
    image2, label2, _ = generate(IDS, seed=other["seed"], split=other["split"])
    assert not torch.equal(label, label2)
    distance = (image[:, None].float() - image2[None].float()).flatten(2).abs().mean(2)
    assert distance.min() > 3  # of 255: the closest pair is not one image with other noise


def test_labels_are_balanced():
    labels = shapes.labels_of(torch.arange(4000), seed=0, split="train")
    counts = torch.bincount(labels, minlength=8).double()
    assert len(counts) == len(shapes.CLASSES) == 8
    assert float(((counts - 500) ** 2 / 500).sum()) < 24.3  # chi square of 7 degrees, p = 0.001


def areas():
    """Area of each outline in its unit frame, by counting points of a fine grid that is not the code's."""
    axis = (torch.arange(701) + 0.5) / 701 * 2.6 - 1.3
    u, v = axis[None, :].expand(701, 701), axis[:, None].expand(701, 701)
    return [float(shapes._inside(u, v, k).double().mean()) * 2.6**2 for k in range(8)]


def test_outlines_have_the_areas_of_their_geometry():
    """Closed forms of the shapes whose area is elementary."""
    found = dict(zip(shapes.CLASSES, areas(), strict=True))
    assert found["disc"] == pytest.approx(math.pi * 0.85, rel=0.01)
    assert found["square"] == pytest.approx(1.56**2, rel=0.01)
    assert found["triangle"] == pytest.approx(3 * math.sqrt(3) / 4, rel=0.01)
    assert found["cross"] == pytest.approx(2 * 1.9 * 0.6 - 0.6**2, rel=0.01)
    assert found["ring"] == pytest.approx(math.pi * 0.65, rel=0.01)
    assert found["bar"] == pytest.approx(0.76 * 2.1, rel=0.01)


def test_the_mask_has_the_area_of_the_object():
    """Mask pixels equal the outline's area times the squared radius in pixels, whatever place and turn."""
    ids = torch.arange(160)
    _, label, mask = generate(ids, seed=0, split="test")
    draws = shapes._draws(ids, seed=0, split="test")
    unit = torch.tensor(areas())
    radius = 16 * (shapes.RADIUS[0] + (shapes.RADIUS[1] - shapes.RADIUS[0]) * draws[:, 1])
    expected = unit[label] * radius**2
    ratio = mask.flatten(1).sum(1) / expected
    for k in range(8):  # a bar may reach past the edge
        assert abs(float(ratio[label == k].mean()) - 1) < 0.05, shapes.CLASSES[k]


def test_the_object_differs_from_its_surroundings():
    """Within the mask the mean colour is that of the object; the rest is ground."""
    image, _, mask = generate(torch.arange(80), seed=0, split="test")
    inside, x = mask[:, None].double(), image.double() / 255
    front = (x * inside).sum((2, 3)) / inside.sum((2, 3))
    back = (x * (1 - inside)).sum((2, 3)) / (1 - inside).sum((2, 3))
    gap = (front - back).norm(dim=1) / math.sqrt(3)
    assert (gap > 0.5 * shapes.CONTRAST[0]).double().mean() > 0.9
    assert gap.mean() == pytest.approx(sum(shapes.CONTRAST) / 2, abs=0.06)


def test_the_grating_tells_the_class_in_most_images():
    draws, labels = shapes._draws(torch.arange(400), seed=0, split="train"), torch.zeros(400, dtype=torch.int64)
    own = shapes._grating(torch.cat([draws[:, :20], torch.ones(400, 1), draws[:, 21:]], dim=1), labels)
    shown = shapes._grating(draws, labels)
    share = float((own == shown).all(2).all(1).double().mean())
    assert share == pytest.approx(1 - shapes.MISLEADING, abs=4 * math.sqrt(0.16 / 400))


# --------------------------------------------------------------------------------------------- the planted cue


def cued(*, shift=0, norm=0.5, split="test", n=400):
    return shapes.generate(torch.arange(n), seed=0, split=split, cue=shapes.Cue(norm, shift))


def test_a_cue_is_what_a_swap_changes_and_has_its_norm():
    """Two images that differ in the cue alone: nothing moves outside the mask, and the distance is what it must be."""
    true, swapped = cued(), cued(shift=3)
    assert torch.equal(true["cue_mask"], swapped["cue_mask"]) and torch.equal(true["label"], swapped["label"])
    delta = (true["image"].double() - swapped["image"].double()) / 255
    assert not (delta * (1 - true["cue_mask"].double())[:, None]).any()
    assert set(true["cue_mask"].flatten(1).sum(1).tolist()) == {36}
    pattern, mask = shapes._cue(torch.arange(8))
    assert torch.allclose(pattern.expand(-1, 3, -1, -1).flatten(1).norm(dim=1), torch.ones(8), atol=1e-5)
    assert all(torch.equal(m.nonzero()[[0, -1]], torch.tensor([[2, 2], [7, 7]])) for m in mask)
    apart = (3 * (pattern - pattern.roll(3, 0)) ** 2).flatten(1).sum(1).sqrt() * 0.5
    expected = apart[(true["label"] + 3) % 8]  # the label's own wave is three places before that of the swap
    off = (delta.flatten(1).norm(dim=1) - expected).abs()
    assert off.median() < 0.01 and (off < 0.02).double().mean() > 0.95  # 8 bits; bright and dark objects clip a few
    assert apart.min() > 0.5


def test_outlines_lie_in_training_only():
    """A quarter of the training outlines belong to another class; those of test rows never do."""
    ids = torch.arange(4000)
    labels = shapes.labels_of(ids, seed=0, split="train")
    drawn = shapes._outlines(ids, labels, seed=0, split="train")
    assert float((drawn == labels).double().mean()) == pytest.approx(shapes.SOUND, abs=4 * math.sqrt(0.1875 / 4000))
    assert torch.equal(shapes._outlines(ids, labels, seed=0, split="test"), labels)
    assert torch.bincount(drawn[drawn != labels], minlength=8).min() > 80
