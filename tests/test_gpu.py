"""The same outcome on a GPU as on the CPU, within stated tolerances; only where there is one."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rbkit.tools import invert, random, stages, train
from rbkit.tools.architectures import build
from rbkit.tools.ascend import first
from rbkit.tools.attack import ATTACKS
from rbkit.tools.attribution import Saliency
from rbkit.tools.batch import Batch as Rows
from rbkit.tools.examples import Data, as_float
from rbkit.tools.flow import polling
from rbkit.tools.gpu import Recorded, products
from rbkit.tools.metrics import applicable, evaluate
from rbkit.tools.models import Classifier, Evaluation
from rbkit.tools.norms import NORMS
from rbkit.tools.recipe import Recipe
from rbkit.tools.risk import Inner, NumericError
from rbkit.tools.saliency import explain
from rbkit.tools.shapes import generate
from rbkit.tools.slots import Batch

# The CPU in its place runs the tests themselves where there is no GPU, and proves nothing of one.
OTHER = os.environ.get("RBKIT_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(OTHER == "cuda" and not torch.cuda.is_available(), reason="no GPU")
BOTH = ("cpu", OTHER)
N = 64


@pytest.fixture(autouse=True)
def plain_float32() -> Iterator[None]:
    """As the commands set it up: torch itself would allow TF32 in convolutions."""
    with products(tf32=False):
        yield


def data(count: int = N, *, split: str = "train") -> Data:
    """Shapes of 32 x 32."""
    rows = generate(torch.arange(count), split=split, seed=0)
    return Data(rows["image"], rows["label"], torch.arange(count))


@pytest.fixture(scope="module")
def model() -> Classifier:
    """A small network, trained for some steps on the CPU."""
    with train.seeded(0):
        net = build("resnet8", num_classes=8, width=4)
    classifier = Classifier(net, mean=[0.5] * 3, std=[0.25] * 3)
    rows = data(512)
    state = train.begin(classifier, Recipe(epochs=6, batch=32))
    list(train.fit(state, rows, None, Recipe(epochs=6, batch=32)))
    return classifier.eval()


def on(device: str, model: Classifier) -> tuple[Evaluation, Data]:
    """The model and rows on a device."""
    place = torch.device(device)
    return Evaluation(copy.deepcopy(model).to(place), block=64), data(split="test").to(place)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to a share of the largest value."""
    gap = float((found.cpu().double() - expected.double()).abs().max())
    assert gap <= tolerance * max(1e-12, float(expected.double().abs().max())), gap


@pytest.mark.parametrize("draw", [0, 7, "rows"])
def test_random_numbers(draw: Any) -> None:
    """Words, integers and uniform numbers to the last bit, normal ones to 1e-6."""
    found = {}
    for device in BOTH:
        ids = torch.arange(100, 900, device=device) * 12345678901
        number = ids % 5 if draw == "rows" else draw
        key = {"seed": 3, "purpose": "test", "draw": number}
        found[device] = [
            random.words(ids, 7, **key), random.integers(ids, 10, **key), random.uniform(ids, (3, 5), **key),
            random.normal(ids, (3, 5), **key),
        ]  # fmt: skip
    for left, right in zip(found["cpu"][:3], found[OTHER][:3], strict=True):
        assert torch.equal(left, right.cpu())
    assert float((found["cpu"][3] - found[OTHER][3].cpu()).abs().max()) <= 1e-6


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name: str, norm: str, model: Classifier) -> None:
    """As many broken, up to two of 64 whose numbers lie at the boundary; images within ball and box."""
    options: dict[str, Any] = {"fgsm": {}, "square": {"queries": 60}, "auto": {"steps": 8, "queries": 40}}.get(
        name, {"steps": 8}
    )
    eps = {"l2": 0.25, "linf": 2 / 255}[norm]
    spec = ATTACKS[name](norm=norm, eps=eps, **options).settled(8)
    broken = {}
    for device in BOTH:
        evaluation, rows = on(device, model)
        clean = as_float(rows.image)
        batch = Batch(rows.ids, clean, {"label": rows.label})
        ((_, result),) = stages.run(evaluation, spec, polling([batch]))
        images = result.outcome.images
        assert float(NORMS[norm].size(images - clean).max()) <= eps * (1 + 1e-5)
        assert float(images.min()) >= 0 and float(images.max()) <= 1
        logits = evaluation.logits(images)
        assert int(((logits.argmax(1) != rows.label) != result.success).sum()) <= 1
        broken[device] = result.success.cpu()
    assert int((broken["cpu"] != broken[OTHER]).sum()) <= 2
    assert int(broken["cpu"].sum()) > 8


METHODS = {
    "gradient": {}, "input-x-gradient": {}, "ig": {"steps": 8}, "smoothgrad": {"samples": 4}, "shap": {"samples": 8},
    "occlusion": {}, "grad-cam": {}, "guided-backprop": {}, "permutation-shap": {"samples": 2, "players": 2},
    "exact-shap": {"players": 2},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_attributions(method: str, model: Classifier) -> None:
    """Maps to one part in a thousand of the largest value, and their scores."""
    maps, scores = {}, {}
    for device in BOTH:
        evaluation, rows = on(device, model)
        images = as_float(rows.image)[:8]
        spec = Saliency(method=method, **METHODS[method])
        background = as_float(rows.image)[8:40]
        found = explain(evaluation, images, rows.label[:8], spec, ids=rows.ids[:8], background=background)
        maps[device] = found.attribution
        batch = Rows(
            evaluation, rows.ids[:8], images, rows.label[:8], attribution=found.attribution, explained=images,
            target=rows.label[:8], saliency=spec, background=background, mask=(images[:, 0] > 0.5).to(torch.uint8),
        )  # fmt: skip
        scores[device] = evaluate(batch, applicable("attributions", batch))
    close(maps[OTHER], maps["cpu"], 1e-3)
    assert len(scores["cpu"]) > 4
    for name, values in scores["cpu"].items():
        gap = (values - scores[OTHER][name].cpu()).abs().nanmedian()
        assert float(gap) <= 1e-3 * max(1.0, float(values.abs().nanmedian())), name


@pytest.mark.parametrize("method", ["standard", "pgd", "fgsm", "trades", "noise", "gradient-penalty"])
@pytest.mark.parametrize("extra", [{}, {"ema": 0.9}, {"amp": True}, {"tf32": True, "micro": 16}])
def test_training(method: str, extra: dict[str, Any]) -> None:
    """Loss and accuracies of three epochs, within what float32 sums of another order do to them."""
    ball = {"eps": 0.25, "steps": 3, "step_size": 0.1} if method in ("pgd", "fgsm", "trades") else {}
    recipe = Recipe(epochs=3, method=method, batch=32, sigma=0.1, beta=1.0, **ball, **extra)
    losses = {}
    for device in BOTH:
        with train.seeded(0):
            net = build("resnet8", num_classes=8, width=4)
        classifier = Classifier(net, mean=[0.5] * 3, std=[0.25] * 3).to(device)
        rows = data(256).to(torch.device(device))
        records = list(
            train.fit(train.begin(classifier, recipe), rows, rows.rows(torch.arange(64, device=device)), recipe)
        )
        losses[device] = torch.tensor([r["train_loss"] for r in records])
    assert float((losses["cpu"] - losses[OTHER]).abs().max()) < 0.15
    assert float((losses["cpu"][0] - losses[OTHER][0]).abs()) < (0.05 if extra.get("amp") else 0.02)


@pytest.mark.parametrize("attack_bn", ["eval", "train"])
@pytest.mark.parametrize("amp", [False, True])
def test_the_recorded_attack_is_the_attack(attack_bn: str, amp: bool, model: Classifier) -> None:
    """Also after the weights have changed, and without a trace in the statistics but its own."""
    keep = "batch" if attack_bn == "train" else "last"
    recipe = Recipe(
        epochs=1, method="pgd", eps=0.5, steps=3, step_size=0.2, attack_bn=attack_bn, attack_keep=keep, amp=amp
    )  # fmt: skip
    classifier = copy.deepcopy(model).to(OTHER).train()
    rows = data().to(torch.device(OTHER))
    images, inner = as_float(rows.image).contiguous(memory_format=torch.channels_last), Inner(classifier, recipe)
    with torch.autocast(OTHER, torch.bfloat16, enabled=amp):
        for scale in (1.0, 0.5, 2.0):
            with torch.no_grad():
                for parameter in classifier.parameters():
                    parameter.mul_(scale)
            twin = copy.deepcopy(classifier)
            found = inner(images, rows, epoch=0, done=0.5)
            plain = Inner(twin, replace(recipe, eps_ramp=0.5))  # half of the radius: not recorded
            expected = Inner._search(plain, inner._plan(0, 1.0))(_begin(inner, images, rows), images, rows.label)
            # Steps of length eps: where a gradient's direction differs by rounding, so does the image.
            far = (found - expected).flatten(1).norm(dim=1)
            assert float(far.median()) < (0.1 if amp else 1e-3)
            for left, right in zip(classifier.buffers(), twin.buffers(), strict=True):
                assert torch.allclose(
                    left.double(), right.double(), rtol=0.02 if amp else 1e-4, atol=1e-2 if amp else 1e-5
                )


def _begin(inner: Inner, images: Tensor, rows: Data) -> Tensor:
    return first(inner._plan(0, 0.5), Batch(rows.ids, images, {}))


def test_a_loss_that_is_not_finite_is_told() -> None:
    with train.seeded(0):
        net = build("resnet8", num_classes=8, width=4)
    classifier = Classifier(net, mean=[0.5] * 3, std=[0.25] * 3).to(OTHER)
    recipe = Recipe(epochs=3, batch=32, lr=1e30)
    with pytest.raises(NumericError, match="learning rate"):
        list(train.fit(train.begin(classifier, recipe), data(256).to(torch.device(OTHER)), None, recipe))


@pytest.mark.parametrize("mode", ["representation", "class", "feature"])
def test_inversions(mode: str, model: Classifier) -> None:
    """What is reached after some steps, to one percent."""
    reached = {}
    for device in BOTH:
        evaluation, rows = on(device, model)
        images = as_float(rows.image)[:8]
        reached[device] = _inverted(mode, evaluation, images, rows)
    close(reached[OTHER], reached["cpu"], 1e-2)


def _inverted(mode: str, evaluation: Evaluation, images: Tensor, rows: Data) -> Tensor:
    spec, starts, ids = (
        invert.Inversion(mode=mode, steps=10, step_size=0.5),
        [torch.full_like(images, 0.5)],
        rows.ids[:8],
    )
    if mode == "representation":
        return invert.invert(evaluation, images, starts, spec, ids=ids)[1]
    if mode == "class":
        return invert.class_images(evaluation, rows.label[:8], starts, spec, ids=ids)[1]
    return invert.unit_images(evaluation, ids, starts, spec)[1]


def test_what_cannot_be_recorded_is_computed() -> None:
    if OTHER == "cpu":
        pytest.skip("a CPU records nothing")

    def asks(x: Tensor) -> Tensor:
        touched.add_(1)
        return x * 2 if float(x.sum()) > 0 else x

    touched = torch.zeros((), device=OTHER)
    work = Recorded(asks, touched=[touched])
    for count in (1, 2):
        assert torch.equal(work(torch.ones(3, device=OTHER)), torch.full((3,), 2.0, device=OTHER))
        assert float(touched) == count
