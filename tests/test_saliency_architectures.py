"""Every method on every kind of network: activations that are no modules, in-place code, transformers, no maps at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import IDS, TARGET, C, H, K, N, W, evaluation, images, randomise

from rbkit.tools.attribution import Saliency
from rbkit.tools.models import Classifier
from rbkit.tools.saliency import METHODS, explain

X, BACKGROUND = images(), images(5, seed=6)


class Residual(nn.Module):
    """Two convolutions with BatchNorm and a shortcut; one ReLU module that runs thrice."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(C, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.relu, self.fc = nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(8, K)

    def forward(self, x):
        x = self.relu(self.stem(x))
        x = self.relu(self.two(self.relu(self.norm(self.one(x)))) + x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Functional(Residual):
    """The same with functions for modules."""

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = torch.relu(self.two(self.norm(self.one(x)).relu()) + x)
        return self.fc(x.mean((2, 3)))


class InPlace(Residual):
    """The same, changed in place, also by statements whose value nobody takes."""

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        out = self.norm(self.one(x))
        out.relu_()
        out = self.two(out)
        out += x
        torch.relu_(out)
        return self.fc(out.mean((2, 3)))


class Vision(nn.Module):
    """A vision transformer: patches, a class token, positions, torch's encoder with GELU, the token to the head."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(C, 8, 2, stride=2)
        self.token, self.place = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 7, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, K)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.place
        return self.head(self.norm(self.layer(tokens))[:, 0])


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(C * H * W, 16), nn.ReLU(), nn.Linear(16, K))


def explained(net, method, rows=slice(None)):
    judged = evaluation(Classifier(randomise(net), mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3]).eval())
    spec = Saliency(method, steps=3, samples=2, players=2, window=2)
    return explain(judged, X[rows], TARGET[rows], spec, ids=IDS[rows], background=BACKGROUND).attribution


@pytest.mark.parametrize("method", METHODS)
def test_functions_and_in_place_code_are_the_modules_they_stand_for(method):
    expected = explained(Residual(), method)
    assert expected.any() and expected.shape == (N, C, H, W)
    for other in (Functional, InPlace):
        torch.testing.assert_close(explained(other(), method), expected, rtol=0, atol=1e-5)


REFUSED = {
    (Vision, "grad-cam"): "no feature map",
    (mlp, "grad-cam"): "no feature map",
    (Vision, "guided-backprop"): "no ReLU",
}


@pytest.mark.parametrize(("network", "method"), REFUSED)
def test_without_what_a_method_reads_it_is_refused(network, method):
    with pytest.raises(ValueError, match=REFUSED[network, method]):
        explained(network(), method)


HELD = [(n, m) for n in (Functional, InPlace, Vision, mlp) for m in METHODS if (n, m) not in REFUSED]


@pytest.mark.parametrize(("network", "method"), HELD)
def test_a_map_says_something_and_depends_on_no_other_image(network, method):
    whole = explained(network(), method)
    assert whole.isfinite().all() and (whole.abs().amax((1, 2, 3)) > 0).all()
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    assert torch.equal(explained(network(), method, order), whole[order])
    assert torch.equal(explained(network(), method, slice(5, 6))[0], whole[5])


class Rounded(nn.Module):
    """A network without a gradient by its input."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(C * H * W, K)

    def forward(self, x):
        return self.fc((x.flatten(1) * 4).round())


@pytest.mark.parametrize("method", ["occlusion", "permutation-shap", "exact-shap"])
def test_methods_that_hide_need_no_gradient(method):
    class Detached(Rounded):
        def forward(self, x):
            return super().forward(x.detach())

    assert torch.equal(explained(Detached(), method), explained(Rounded(), method))
    assert (explained(Rounded(), method).abs().amax((1, 2, 3)) > 0).all()
