"""Guided backpropagation: captum's and the rule written out, for ReLU as module, function, method and in place."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import IDS, TARGET, C, H, K, W, convnet, evaluation, images, linear, randomise, resnet

from rbkit.tools import sanity
from rbkit.tools.attribution import Saliency
from rbkit.tools.batch import Batch
from rbkit.tools.models import Classifier
from rbkit.tools.saliency import explain

X = images()
NORMAL = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


def explained(model, x=X, *, target=TARGET, ids=IDS, method="guided-backprop", **spec):
    return explain(evaluation(model), x, target, Saliency(method, **spec), ids=ids).attribution


class Net(nn.Module):
    """Two hidden layers, the second of which is seen through a view and added to."""

    def __init__(self, relu):
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(C, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, K)
        self.relu = relu

    def forward(self, x):
        x = self.relu(self.conv(x))
        return self.two(self.relu(self.one(x) + x).mean((2, 3)))


def statement(x):
    """In place without taking what is returned."""
    x.relu_()
    return x


def function(x):
    """The same of the function."""
    F.relu(x, inplace=True)
    return x


def part(x):
    """In place on a view of what goes on."""
    x[:, :].relu_()
    return x


RELUS = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu by name": lambda x: F.relu(input=x),
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu in place by position": lambda x: F.relu(x, True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu by name": lambda x: torch.relu(input=x),
    "torch.relu_": torch.relu_,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "statement": statement,
    "statement of the function": function,
    "view": part,
}


def by_hand(net, x, target):
    """The rule written out, without autograd's ReLU: forward, then back layer by layer."""
    mean, std = (torch.tensor(NORMAL[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    first = net.conv((x - mean) / std)
    second = net.one(first.clamp_min(0)) + first.clamp_min(0)
    back = net.two.weight[target][:, :, None, None].expand_as(second) / (H * W)
    back = back.clamp_min(0) * (second > 0)
    back = F.conv_transpose2d(back, net.one.weight, padding=1) + back
    back = back.clamp_min(0) * (first > 0)
    return F.conv_transpose2d(back, net.conv.weight, padding=1) / std


@pytest.mark.parametrize("relu", RELUS)
def test_it_is_the_rule_for_every_way_to_say_relu(relu):
    net = randomise(Net(RELUS[relu]))
    found = explained(Classifier(net, **NORMAL))
    torch.testing.assert_close(found, by_hand(net, X, TARGET).detach(), rtol=0, atol=1e-5)
    assert (found - explained(Classifier(net, **NORMAL), method="gradient")).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore")  # of the peer
@pytest.mark.parametrize("output", ["logit", "log-probability"])
def test_it_is_captums(output):
    from captum.attr import GuidedBackprop

    model, x = resnet(), images(5, 3, 18, 22)
    target = torch.arange(5)
    rule = {"logit": nn.Identity(), "log-probability": nn.LogSoftmax(1)}[output]
    theirs = GuidedBackprop(nn.Sequential(model, rule)).attribute(x, target=target).detach()
    found = explained(model, x, target=target, ids=IDS[:5], output=output)
    torch.testing.assert_close(found, theirs, rtol=0, atol=float(1e-5 * theirs.abs().max()))


class Tokens(nn.Module):
    """torch's own transformer layer, whose ReLU is a function."""

    def __init__(self, activation):
        super().__init__()
        self.patch = nn.Conv2d(C, 8, 2, stride=2)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=activation, batch_first=True)
        self.head = nn.Linear(8, K)

    def forward(self, x):
        return self.head(self.layer(self.patch(x).flatten(2).transpose(1, 2))[:, 0])


def test_a_transformer_with_relu_is_guided_and_one_without_is_refused():
    found = [
        explained(Classifier(randomise(Tokens("relu")), **NORMAL).eval(), method=m)
        for m in ("gradient", "guided-backprop")
    ]
    assert (found[0] - found[1]).abs().max() > 1e-3
    for model in (Classifier(randomise(Tokens("gelu")), **NORMAL).eval(), linear()):
        with pytest.raises(ValueError, match="the network has no ReLU"):
            explained(model)


def test_the_rule_ends_with_the_map():
    """Other methods, and the model's values, are what they were."""
    model = convnet()
    judged = evaluation(model)
    before = judged.logits(X), explain(judged, X, TARGET, Saliency("gradient"), ids=IDS).attribution
    explain(judged, X, TARGET, Saliency("guided-backprop"), ids=IDS)
    with pytest.raises(ValueError, match="no ReLU"):
        explained(linear())
    assert torch.equal(judged.logits(X), before[0])
    assert torch.equal(explain(judged, X, TARGET, Saliency("gradient"), ids=IDS).attribution, before[1])
    assert explained(model, X[:0], target=TARGET[:0], ids=IDS[:0]).shape == (0, C, H, W)


class Deep(nn.Module):
    """Four layers of 32 channels with functional ReLUs: the wider, the more a guided map is the image (Nie et al. 2018)."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise([3, 32, 32, 32, 32]))
        self.fc = nn.Linear(32, K)

    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_it_barely_changes_when_the_model_is_randomised():
    """What it is for: the sanity checks tell it from the gradient, also where ReLU is no module."""
    judged = evaluation(Classifier(randomise(Deep()), mean=[0.5] * 3, std=[0.25] * 3))
    x, ids = F.interpolate(images(12, 3, 5, 5), (16, 18), mode="bilinear"), torch.arange(12)
    found = {}
    for method in ("gradient", "guided-backprop"):
        spec = Saliency(method)
        maps = explain(judged, x, ids % K, spec, ids=ids).attribution
        rows = Batch(judged, ids, x, explained=x, target=ids % K, attribution=maps, saliency=spec, signed=False)
        found[method] = float(sanity.randomisation(rows).mean()), float(sanity.random_logit(rows).mean())
    assert max(found["gradient"]) < 0.3, found
    assert min(found["guided-backprop"]) > 0.55 and found["guided-backprop"][1] > 0.8, found
