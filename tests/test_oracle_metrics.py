"""Other people's scorers: where they are right they agree with ours, and where they are not a test shows why."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import toys
from captum.metrics import infidelity, sensitivity_max
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from rbkit.tools.attribution import Saliency
from rbkit.tools.batch import Batch
from rbkit.tools.frechet import frechet
from rbkit.tools.infidelity import SQUARES, squares
from rbkit.tools.likeness import structural_similarity
from rbkit.tools.metrics import evaluate
from rbkit.tools.models import Classifier
from rbkit.tools.norms import NORMS
from rbkit.tools.saliency import explain
from rbkit.tools.sanity import layers, probes, randomised
from rbkit.tools.stability import NOISE_DRAWS, NOISE_RADIUS

torch.set_num_threads(1)
X, IDS, TARGET = toys.images(), toys.IDS, toys.TARGET
EVALUATION = toys.evaluation(toys.convnet())
MAPS = torch.rand(toys.N, toys.H, toys.W, generator=toys.generator(4)) + 0.01  # positive and without ties
MASK = torch.zeros(toys.N, toys.H, toys.W, dtype=torch.uint8)
for row in range(toys.N):
    MASK[row, row % 3 : row % 3 + 2, row % 4 : row % 4 + 2 + row % 2] = 1


@pytest.fixture(scope="module")
def quantus():
    """Quantus, where the libraries of the system that its OpenCV needs are there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("quantus", exc_type=ImportError)


def ours(name, *, maps=MAPS, mask=MASK):
    """One metric of ours, as an array."""
    given = Batch(EVALUATION, IDS, X, explained=X, target=TARGET, attribution=maps[:, None], mask=mask)
    return evaluate(given, [name])[name].numpy()


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("gini", "Sparseness"),
        ("entropy", "Complexity"),
        ("relevance_mass", "RelevanceMassAccuracy"),
        ("relevance_rank", "RelevanceRankAccuracy"),
        ("pointing_game", "PointingGame"),
    ],
)
def test_quantus_agrees_on_positive_maps_without_ties(quantus, name, theirs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = getattr(quantus, theirs)(disable_warnings=True, abs=False, normalise=False)
        found = metric.evaluate_batch(
            x_batch=X.numpy(), a_batch=MAPS[:, None].double().numpy(), s_batch=MASK[:, None].numpy()
        )
    assert ours(name) == pytest.approx(np.asarray(found, dtype=float), abs=1e-5)


def test_an_empty_mask_is_a_hit_in_quantus_and_is_left_out_here(quantus):
    """M7: NaN written into an array of booleans is True."""
    empty = MASK.clone()
    empty[2] = 0
    metric = quantus.PointingGame(disable_warnings=True, abs=False, normalise=False)
    found = metric.evaluate_batch(a_batch=MAPS[:, None].numpy(), s_batch=empty[:, None].numpy())
    assert bool(found[2]) is True
    assert (
        math.isnan(ours("pointing_game", mask=empty)[2])
        and not np.isnan(ours("pointing_game", mask=empty)[[0, 1]]).any()
    )


def test_two_highest_locations_count_in_part_here(quantus):
    """M7: one of two highest locations lies in the mask."""
    maps = torch.zeros_like(MAPS)
    maps[:, 0, 0], maps[:, -1, -1] = 1, 1
    mask = torch.zeros_like(MASK)
    mask[:, 0, 0] = 1
    found = quantus.PointingGame(disable_warnings=True).evaluate_batch(a_batch=maps.numpy(), s_batch=mask.numpy())
    assert found.tolist() == [True] * toys.N
    assert ours("pointing_game", maps=maps, mask=mask).tolist() == [0.5] * toys.N


def test_layers_of_one_shape_become_equal_in_quantus_and_differ_here(quantus):
    """M10: Quantus draws every layer from the same seed and forgets BatchNorm's statistics."""
    net = toys.SmallNet(channels=8, width=8)  # conv1 and conv2 have weights of one shape
    net.bn1.running_mean.fill_(0.3)
    model = quantus.helpers.model.pytorch_model.PyTorchModel(net.eval(), softmax=False, channel_first=True)
    state = torch.random.get_rng_state()
    *_, (_, last) = model.get_random_layer_generator(order="top_down", seed=42)
    assert torch.equal(last.conv1.weight, last.conv2.weight) and last.bn1.running_mean.abs().max() == 0
    assert not torch.equal(torch.random.get_rng_state(), state)
    torch.random.set_rng_state(state)
    mine = toys.evaluation(Classifier(net, mean=[0.5] * 8, std=[0.25] * 8))
    changed = randomised(mine, (8, toys.H, toys.W))
    first, second = changed.model.net.conv1, changed.model.net.conv2
    assert not torch.allclose(first.weight / first.weight.std(), second.weight / second.weight.std())
    assert torch.equal(torch.random.get_rng_state(), state)
    given = probes(mine, (8, toys.H, toys.W))
    before, after = (layers(model, given)["conv1"][1].mean((0, 2, 3)).tolist() for model in (mine, changed))
    assert after == pytest.approx(before, abs=1e-4)


def test_sensitivity_n_of_one_image_is_that_image_s_own(quantus):
    """M13: Quantus correlates over the images of a batch, so that one image has no value; ours is of each image."""
    metric = quantus.SensitivityN(disable_warnings=True, normalise=False, abs=False, features_in_step=6)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="length at least 2"):
        warnings.simplefilter("ignore")
        metric(
            model=EVALUATION.model.net, x_batch=X[:1].numpy(), y_batch=TARGET[:1].numpy(),
            a_batch=MAPS[:1, None].numpy(), device="cpu", softmax=False, channel_first=True,
        )  # fmt: skip
    given = Batch(EVALUATION, IDS, X, explained=X, target=TARGET, attribution=MAPS[:, None])
    one = Batch(EVALUATION, IDS[:1], X[:1], explained=X[:1], target=TARGET[:1], attribution=MAPS[:1, None])
    both = (evaluate(b, ["sensitivity_n"])["sensitivity_n"] for b in (given, one))
    whole, single = (v.tolist() for v in both)
    assert len(whole) == toys.N and single[0] == pytest.approx(whole[0], abs=1e-6) and math.isfinite(single[0])


def test_structural_similarity_is_that_of_scikit_image():
    from skimage.metrics import structural_similarity as scikit

    first = toys.images(2, 3, 17, 19)
    second = (first + 0.3 * toys.images(2, 3, 17, 19, seed=1)).clamp(0, 1)
    found = structural_similarity(first, second).tolist()
    options = {
        "channel_axis": 0,
        "data_range": 1.0,
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
    }
    pairs = zip(first.double().numpy(), second.double().numpy(), strict=True)
    assert found == pytest.approx([scikit(a, b, **options) for a, b in pairs], abs=1e-12)


def test_torchmetrics_averages_a_mirrored_border_too():
    """Without the 5 pixels at each side whose window reaches past the image its map has our mean."""
    first = toys.images(2, 3, 17, 19)
    second = (first + 0.3 * toys.images(2, 3, 17, 19, seed=1)).clamp(0, 1)
    mean, whole = structural_similarity_index_measure(
        first, second, data_range=1.0, reduction="none", return_full_image=True
    )
    found = structural_similarity(first, second).numpy()
    assert found == pytest.approx(whole[:, :, 5:-5, 5:-5].flatten(1).mean(1).numpy(), abs=1e-5)
    assert np.abs(found - mean.numpy()).max() > 1e-4


class Flat(torch.nn.Module):
    """The pixels as features."""

    num_features = 12

    def forward(self, x):
        """(N, 12)."""
        return x.flatten(1)


def their_distance(first, second):
    """The Frechet distance of torchmetrics with the pixels as features."""
    metric = FrechetInceptionDistance(feature=Flat(), normalize=True, input_img_size=(3, 2, 2))
    metric.update(first, real=True)
    metric.update(second, real=False)
    return float(metric.compute())


def test_the_frechet_distance_is_that_of_torchmetrics():
    for n in (200, 8):  # with 8 rows of 12 features the covariance is singular
        first, second = toys.images(n, 3, 2, 2), 0.8 * toys.images(n, 3, 2, 2, seed=1)
        assert frechet(first.flatten(1), second.flatten(1)) == pytest.approx(their_distance(first, second), rel=1e-5)
        assert frechet(first.flatten(1), first.flatten(1)) == 0


def test_torchmetrics_goes_below_zero_where_the_covariance_is_singular():
    """I5: the distance of a set to itself is 0, not a small number of either sign."""
    found = [their_distance(x, x) for x in (toys.images(8, 3, 2, 2, seed=s) for s in range(6))]
    assert min(found) < 0


def test_max_sensitivity_is_that_of_captum_for_the_same_noise():
    """Where noise keeps the prediction; captum does not look at that (M6)."""
    spec = Saliency("gradient")
    given = Batch(
        EVALUATION, IDS, X, explained=X, target=TARGET, saliency=spec,
        attribution=explain(EVALUATION, X, TARGET, spec, ids=IDS).attribution,
    )  # fmt: skip
    copies = [
        (X + NORMS["linf"].start(IDS, tuple(X.shape[1:]), NOISE_RADIUS, seed=0, draw=draw)).clamp(0, 1)
        for draw in range(NOISE_DRAWS)
    ]
    before = EVALUATION.logits(X).argmax(1)
    kept = torch.stack([EVALUATION.logits(x).argmax(1) == before for x in copies]).all(0)
    assert int(kept.sum()) >= 3
    draws = iter(copies)

    def attribute(images):
        """As captum wants it: a tuple, of a tensor or of a tuple of one."""
        chosen = images if torch.is_tensor(images) else images[0]
        return (explain(EVALUATION, chosen, TARGET, spec, ids=IDS).attribution,)

    found = sensitivity_max(
        attribute, X,
        perturb_func=lambda x: next(draws), n_perturb_samples=NOISE_DRAWS, max_examples_per_batch=toys.N, norm_ord="fro",
    )  # fmt: skip
    mine = evaluate(given, ["max_sensitivity"])["max_sensitivity"]
    assert mine[kept].numpy() == pytest.approx(found[kept].numpy(), rel=1e-4)


def test_infidelity_is_that_of_captum_for_the_same_squares():
    """Of a map that counts contributions: the removed part times the map over (image - mean colour)."""
    mean = EVALUATION.model.mean
    attribution = (X - mean) * 0.3 + 0.05
    given = Batch(
        EVALUATION, IDS, X, explained=X, target=TARGET, saliency=Saliency("ig"), attribution=attribution,
    )  # fmt: skip
    removed = squares(IDS, toys.H, toys.W).reshape(toys.N, SQUARES, 1, toys.H, toys.W)
    draws = iter(range(SQUARES))

    def perturb(images, *_):
        gone = removed[:, next(draws)]
        # captum multiplies the map with what the function returns first and evaluates the model at the second.
        return gone.expand_as(images).to(images.dtype), torch.where(gone, mean, images)

    found = infidelity(
        EVALUATION, perturb, X, attribution, target=TARGET, n_perturb_samples=SQUARES, max_examples_per_batch=toys.N
    )
    mine = evaluate(given, ["infidelity"])["infidelity"]
    assert mine.numpy() == pytest.approx(found.numpy(), rel=1e-4)
