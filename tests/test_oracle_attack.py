"""Attacks against torchattacks: other people's code on the same trained network."""

from __future__ import annotations

import pytest
import torch
import torchattacks

from rbkit.tools import shapes, train
from rbkit.tools.architectures import resnet8
from rbkit.tools.attack import ATTACKS, pgd
from rbkit.tools.examples import Data, as_float, statistics
from rbkit.tools.flow import polling
from rbkit.tools.models import Classifier, Evaluation
from rbkit.tools.recipe import Recipe
from rbkit.tools.slots import Batch
from rbkit.tools.stages import run
from rbkit.tools.train import begin, fit

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
    mean, std = statistics(image)
    recipe = Recipe(epochs=8, batch=16, augment="none", lr=0.1, momentum=0.8)
    state = begin(Classifier(net, mean=mean, std=std), recipe)
    list(fit(state, Data(image, label, ids), None, recipe))
    drawn = shapes.generate(torch.arange(200), seed=0, split="test")
    test, truth = drawn["image"], drawn["label"]
    return state.classifier.eval().requires_grad_(False), as_float(test), truth


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


PEERS = {"apgd-ce": "APGD", "apgd-t": "APGDT", "square": "Square", "fab-t": "FAB"}
OPTIONS = {  # few steps and queries, so that what they are spent on matters
    "apgd-ce": ({"steps": 10}, {"steps": 10, "loss": "ce"}),
    "apgd-t": ({"steps": 6}, {"steps": 6, "n_classes": 8}),
    "square": ({"queries": 150}, {"n_queries": 150}),
    "fab-t": ({"steps": 5}, {"steps": 5, "n_classes": 8, "multi_targeted": True}),
}
TOLERANCE = {"square": 0.051}  # of a random search; the others climb the same way


def peers_accuracy(name, classifier, x, label, norm):
    """Robust accuracy under torchattacks' version, which draws from the global generator."""
    kind = {"l2": "L2", "linf": "Linf"}[norm]
    with train.seeded(1):
        attack = getattr(torchattacks, PEERS[name])(classifier, norm=kind, eps=EPS[norm], **OPTIONS[name][1])
        found = attack(x, label).detach()
    return float((classifier(found).argmax(1) == label).double().mean())


@pytest.mark.parametrize(
    ("name", "norm"),
    [("apgd-ce", "l2"), ("apgd-ce", "linf"), ("apgd-t", "l2"), ("square", "l2"), ("square", "linf"), ("fab-t", "linf")],
)
def test_accuracy_is_not_above_that_of_torchattacks(network, name, norm):
    """Under the same attack with as many steps or queries, on sixty images."""
    classifier, x, label = network
    x, label = x[:60], label[:60]
    spec = ATTACKS[name](norm=norm, eps=EPS[norm], **OPTIONS[name][0])
    found = next(run(Evaluation(classifier), spec, polling([Batch(torch.arange(60), x, {"label": label})])))[1]
    clean = float((classifier(x).argmax(1) == label).double().mean())
    ours = float((~found.success).double().mean())
    peer = peers_accuracy(name, classifier, x, label, norm)
    assert ours < clean - 0.05, (clean, ours)
    assert ours <= peer + TOLERANCE.get(name, 0.0168), (clean, ours, peer)
