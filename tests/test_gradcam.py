"""Grad-CAM: captum's and the definition, on the map that each architecture pools, whatever its activations are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import IDS, TARGET, C, H, K, W, convnet, evaluation, images, linear, randomise, resnet

from rbkit.tools.attribution import Saliency
from rbkit.tools.models import Classifier
from rbkit.tools.saliency import explain

X = images()


class Net(nn.Module):
    """Two convolutions whose activations and pooling are given; the map that is pooled is kept in `last`."""

    def __init__(self, activation, pool, width=8):
        super().__init__()
        self.one, self.two = nn.Conv2d(C, width, 3, padding=1), nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.fc = nn.LazyLinear(K)
        self.activation, self.pool, self.last = activation, pool, None

    def forward(self, x):
        x = self.activation(self.one(x))
        x = self.activation(self.two(x))
        self.last = x
        return self.fc(self.pool(x))


class Transformer(nn.Module):
    """Patches of a convolution, self-attention written out in 4-D heads, the first token to the head."""

    def __init__(self):
        super().__init__()
        self.patch, self.qkv, self.fc = nn.Conv2d(C, 8, 2, stride=2), nn.Linear(8, 24), nn.Linear(8, K)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(len(x), x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = x + ((q @ k.transpose(2, 3)).softmax(3) @ v).transpose(1, 2).reshape(x.shape)
        return self.fc(x[:, 0])


def model_of(net, shape=(C, H, W)):
    net(torch.zeros(2, *shape))  # lazy layers
    net.last = None  # a tensor of a graph cannot be copied
    return Classifier(randomise(net), mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3]).eval()


def explained(model, x=X, *, target=TARGET, ids=IDS, **spec):
    return explain(
        evaluation(model, layer=spec.get("layer")), x, target, Saliency("grad-cam", **spec), ids=ids
    ).attribution


def defined(model, x, target, size, *, signed=False, output=lambda z: z):
    """Equations 1 and 2 in float64 on the map that the network keeps, one image at a time."""
    double, maps = copy.deepcopy(model).double(), []
    for row, k in zip(x.double(), target.tolist(), strict=True):
        score = output(double(row[None]))[0, k]
        kept = double.net.last
        gradient = torch.autograd.grad(score, kept)[0][0]
        total = sum(g.mean() * a for g, a in zip(gradient, kept[0], strict=True))
        total = total if signed else total.relu()
        maps.append(F.interpolate(total[None, None], size, mode="bilinear", align_corners=False)[0, 0])
    return torch.stack(maps).detach()


ACTIVATIONS = {
    "module": nn.ReLU(),
    "inplace module": nn.ReLU(inplace=True),
    "functional": F.relu,
    "functional in place": lambda x: F.relu(x, inplace=True),
    "method in place": lambda x: x.relu_(),
    "gelu": F.gelu,
    "none": lambda x: x,
}
POOLS = {
    "adaptive module": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "mean": lambda x: x.mean((2, 3)),
    "avg_pool2d": lambda x: F.avg_pool2d(x, x.shape[2:]).flatten(1),
    "maximum": lambda x: F.adaptive_max_pool2d(x, 1).squeeze(3).squeeze(2),
    "flat": lambda x: x.flatten(1),
    "view": lambda x: x.reshape(len(x), -1),
    "both pools": lambda x: torch.cat([F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], 1).flatten(1),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_map_is_taken_behind_any_activation(activation):
    model = model_of(Net(ACTIVATIONS[activation], POOLS["flat"]))
    found = explained(model)
    torch.testing.assert_close(found.sum(1).double(), defined(model, X, TARGET, (H, W)), rtol=0, atol=2e-5)
    assert found.any() and torch.equal(found[:, 0], found[:, 2])


@pytest.mark.parametrize("pool", POOLS)
def test_the_map_is_what_any_pooling_reads(pool):
    model = model_of(Net(F.relu, POOLS[pool]))
    found = explained(model).sum(1).double()
    torch.testing.assert_close(found, defined(model, X, TARGET, (H, W)), rtol=0, atol=2e-5)
    assert found.any()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("output", ["logit", "log-probability"])
def test_signs_and_outputs(signed, output):
    model = model_of(Net(nn.ReLU(), POOLS["flat"]))
    rule = {"logit": lambda z: z, "log-probability": lambda z: z.log_softmax(1)}[output]
    found = explained(model, signed=signed, output=output).sum(1).double()
    slow = defined(model, X, TARGET, (H, W), signed=signed, output=rule)
    torch.testing.assert_close(found, slow, rtol=0, atol=2e-5)
    assert bool((found < 0).any()) == signed


def captums(model, layer, x, *, relu=True):
    from captum.attr import LayerAttribution, LayerGradCam

    target = torch.arange(len(x)) % 4
    coarse = LayerGradCam(model, layer).attribute(x, target=target, relu_attributions=relu)
    return target, LayerAttribution.interpolate(coarse, x.shape[2:], "bilinear").detach()[:, 0]


@pytest.mark.filterwarnings("ignore")  # of the peer
def test_it_is_captums():
    model, x = resnet(), images(5, 3, 18, 22)
    for name, ours, signed in (("layer3", None, False), ("layer1", "layer1", True), ("layer3.0.conv2",) * 2 + (True,)):
        target, theirs = captums(model, model.net.get_submodule(name), x, relu=not signed)
        found = explained(model, x, target=target, ids=IDS[:5], layer=ours, signed=signed)
        torch.testing.assert_close(found.sum(1), theirs, rtol=0, atol=2e-5)
        assert theirs.any()


@pytest.mark.parametrize(
    ("name", "last"),
    [("squeezenet1_1", "classifier.2"), ("shufflenet_v2_x0_5", "conv5"), ("mobilenet_v3_small", "features")],
)
def test_architectures_of_torchvision(name, last):
    """Fire modules, in-place activations, squeeze and excitation, a head that is a convolution."""
    from torchvision import models

    net = randomise(models.get_model(name, weights=None, num_classes=K))
    model, x = Classifier(net, mean=[0.5] * 3, std=[0.25] * 3).eval(), images(3, 3, 64, 80)
    found = explained(model, x, target=TARGET[:3], ids=IDS[:3], signed=True)
    assert found.abs().amax((1, 2, 3)).min() > 0
    named = explained(model, x, target=TARGET[:3], ids=IDS[:3], signed=True, layer=last)
    torch.testing.assert_close(found, named, rtol=1e-4, atol=float(1e-5 * found.abs().max()))


def test_a_layer_that_is_changed_in_place_is_taken_before():
    model = convnet()
    model.net.relu1 = nn.ReLU(inplace=True)
    plain = convnet()
    layered = [explained(m, layer="bn1", signed=True) for m in (model, plain)]
    assert torch.equal(*layered) and (layered[0] < 0).any()
    assert not torch.equal(layered[0], explained(plain, layer="relu1", signed=True))


class Twice(nn.Module):
    """A layer that does not reach the output, and one that does not run."""

    def __init__(self):
        super().__init__()
        self.conv, self.side, self.idle = nn.Conv2d(C, 4, 3), nn.Conv2d(C, 4, 3), nn.Conv2d(C, 4, 3)
        self.fc = nn.Linear(4, K)

    def forward(self, x):
        self.side(x)
        return self.fc(self.conv(x).mean((2, 3)))


MLP = nn.Sequential(nn.Flatten(), nn.Linear(C * H * W, 8), nn.ReLU(), nn.Linear(8, K))


@pytest.mark.parametrize(
    ("model", "layer", "message"),
    [
        (lambda: linear(), None, "no feature map"),
        (lambda: model_of(MLP), None, "no feature map"),
        (lambda: model_of(Transformer()), None, "no feature map"),
        (lambda: model_of(Transformer()), "qkv", r"layer qkv gives \[6, 24\] per image, expected a feature map"),
        (lambda: convnet(), "fc", r"layer fc gives \[4\] per image"),
        (lambda: convnet(), "conv9", "no layer 'conv9'; the network has conv1"),
        (lambda: model_of(Twice()), "side", "layer side does not reach the output"),
        (lambda: model_of(Twice()), "idle", "layer idle does not run"),
    ],
)
def test_a_network_without_the_map_is_refused(model, layer, message):
    with pytest.raises(ValueError, match=message):
        explained(model(), layer=layer)


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class First(nn.Module):
    def forward(self, x):
        return x[:, 0]


def test_torchs_own_transformer_layer_has_no_map():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    net = nn.Sequential(nn.Conv2d(C, 8, 2, stride=2), nn.Flatten(2), Transposed(), block, First(), nn.Linear(8, K))
    with pytest.raises(ValueError, match="no feature map"):
        explained(model_of(net))


@pytest.mark.parametrize("model", [convnet(), model_of(Net(F.relu, POOLS["mean"]))])
def test_a_map_depends_on_no_other_image(model):
    for spec in ({}, {"signed": True}):
        whole = explained(model, **spec)
        order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
        assert torch.equal(explained(model, X[order], target=TARGET[order], ids=IDS[order], **spec), whole[order])
        assert torch.equal(explained(model, X[4:5], target=TARGET[4:5], ids=IDS[4:5], **spec)[0], whole[4])


def test_many_blocks_and_none():
    model, x = convnet(), images(70)
    target = torch.arange(70) % K
    whole = explained(model, x, target=target, ids=torch.arange(70))
    late = explained(model, x[60:], target=target[60:], ids=torch.arange(60, 70))
    assert torch.equal(whole[60:], late)
    assert explained(model, X[:0], target=TARGET[:0], ids=IDS[:0]).shape == (0, C, H, W)
