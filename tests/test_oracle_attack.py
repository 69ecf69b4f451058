"""Attacks against torchattacks: other people's code on the same trained network."""

from __future__ import annotations

import pytest
import torch
import torchattacks

from rbkit.tools import shapes, train
from rbkit.tools.architectures import resnet8
from rbkit.tools.ascend import Batch, polling
from rbkit.tools.attack import pgd, run
from rbkit.tools.models import Classifier, Evaluation
from rbkit.tools.train import Data, Recipe, begin, fit

EPS = {"l2": 0.5, "linf": 4 / 255}
STEPS = 20


@pytest.fixture(scope="module")
def network():
    """A resnet8 of width 8 after eight epochs on 500 shapes, and 200 shapes that it has not seen, with labels.

    Objects are large and clear, so that few images are enough.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "RADIUS", (0.55, 0.85))
        patch.setattr(shapes, "CONTRAST", (0.12, 0.42))
        return trained()


def trained():
    """(classifier, images, labels) of the fixture above."""
    ids = torch.arange(500)
    drawn = shapes.generate(ids, seed=0, split="train")
    image, label = drawn["image"], drawn["label"]
    with train.seeded(0):
        net = resnet8(num_classes=8, width=8)
    mean, std = train.statistics(image)
    recipe = Recipe(epochs=8, batch=16, augment="none", lr=0.1, momentum=0.8)
    state = begin(Classifier(net, mean=mean, std=std), recipe)
    list(fit(state, Data(image, label, ids), None, recipe))
    drawn = shapes.generate(torch.arange(200), seed=0, split="test")
    test, truth = drawn["image"], drawn["label"]
    return state.classifier.eval().requires_grad_(False), train.as_float(test), truth


def theirs(classifier, x, label, norm):
    """torchattacks' adversarial images; it draws from the global generator, which is put back."""
    eps, size = EPS[norm], 2.5 * EPS[norm] / STEPS
    kind = {"l2": torchattacks.PGDL2, "linf": torchattacks.PGD}[norm]
    with train.seeded(1):
        return kind(classifier, eps=eps, alpha=size, steps=STEPS, random_start=True)(x, label).detach()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_robust_accuracy_is_that_of_torchattacks(network, norm):
    """Within a point of each other: starts and the iterate that is kept differ, the ascent does not."""
    classifier, x, label = network
    evaluation = Evaluation(classifier)
    batch = Batch(torch.arange(len(x)), x, {"label": label})
    spec = pgd(norm=norm, eps=EPS[norm], steps=STEPS, until="end")
    found = next(run(evaluation, spec, polling([batch])))[1]
    clean = float((classifier(x).argmax(1) == label).double().mean())
    ours = float((~found.success).double().mean())
    peer = float((classifier(theirs(classifier, x, label, norm)).argmax(1) == label).double().mean())
    assert clean > 0.25 and 0.02 < ours < clean - 0.1, (clean, ours)  # an attack that does something
    assert abs(ours - peer) <= 0.01 + 1e-9, (clean, ours, peer)
