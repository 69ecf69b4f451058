"""The evaluation form: folding, blocks, features, straight-through ReLUs, and weights that other people saved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rbkit.tools.architectures import build, resnet8, resnet18
from rbkit.tools.fake_relu import fake_last_relu
from rbkit.tools.models import Classifier, Evaluation, check_logits, copied, in_blocks, padded
from rbkit.tools.weights import load_weights, strip_wrapping

N, C, H, W, K = 5, 3, 8, 12, 4
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shuffled(net: nn.Module, seed: int = 0) -> nn.Module:
    """Weights, biases and running statistics away from their defaults, where folding by mistake would show."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=source) * (0.3 if p.dim() == 1 else (2 / p[0].numel()) ** 0.5))
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                if m.weight is not None:
                    m.weight.copy_(0.5 + torch.rand(m.weight.shape, generator=source))
                if m.running_mean is not None:
                    m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=source) * 0.3)
                    m.running_var.copy_(0.5 + torch.rand(m.running_var.shape, generator=source))
    return net


def classifier(net: nn.Module, seed: int = 0) -> Classifier:
    return Classifier(shuffled(net, seed), mean=MEAN, std=STD).eval()


def images(n: int = N, seed: int = 1) -> torch.Tensor:
    return torch.rand(n, C, H, W, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A trunk of the test's choice behind a linear head."""

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk, self.fc = trunk, nn.Linear(width, K)

    def forward(self, x):
        return self.fc(self.trunk(x).mean((2, 3)))


def assert_equal(model: Classifier, evaluation: Evaluation, x: torch.Tensor | None = None) -> None:
    """Logits within 1e-5 of their range, and not because they are all alike."""
    x = images() if x is None else x
    with torch.no_grad():
        plain = model(x)
    assert plain.std(0).max() > 1e-3
    assert (evaluation.logits(x) - plain).abs().max() <= 1e-5 * plain.abs().max()


# --------------------------------------------------------------------------------------------- the classifier


def test_the_classifier_normalises_each_channel():
    net = nn.Identity()
    found = Classifier(net, mean=MEAN, std=STD)(images())
    for c in range(C):
        assert torch.allclose(found[:, c], (images()[:, c] - MEAN[c]) / STD[c], atol=1e-6)


# --------------------------------------------------------------------------------------------------- folding


class Twice(nn.Module):
    """One convolution and its norm, both used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)

    def forward(self, x):
        return self.bn(self.conv(torch.relu(self.bn(self.conv(x)))))


class ConvTwice(Twice):
    """The norm stands after the second use of the convolution alone."""

    def forward(self, x):
        return self.bn(self.conv(torch.relu(self.conv(x))))


class NormTwice(Twice):
    """The norm is used once behind the convolution and once elsewhere."""

    def forward(self, x):
        return self.bn(torch.relu(self.bn(self.conv(x))))


class Shared(Twice):
    """The convolution's output is used beside the norm."""

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + torch.relu(y)


class Touched(Twice):
    """The convolution's weight is used by the code."""

    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv.weight.abs().mean()


class Tied(Twice):
    """Two convolutions of one weight, of which one has a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(C, C, 3, padding=1)
        self.other.weight = self.conv.weight

    def forward(self, x):
        return self.other(torch.relu(self.bn(self.conv(x))))


class Branching(Twice):
    """Control flow on data, which cannot be traced."""

    def forward(self, x):
        return self.bn(self.conv(x if float(x.mean()) > -100 else -x))


@pytest.mark.parametrize("trunk", [Twice, ConvTwice, NormTwice, Shared, Touched, Tied, Branching])
def test_a_norm_that_cannot_be_folded_is_kept(trunk):
    model = classifier(Net(trunk(), C))
    evaluation = Evaluation(model)
    assert evaluation.pairs == []
    assert_equal(model, evaluation)


def test_the_same_convolution_under_two_names_is_not_folded():
    conv = nn.Conv2d(C, C, 3, padding=1)
    model = classifier(Net(nn.Sequential(conv, nn.ReLU(), conv, nn.BatchNorm2d(C)), C))
    evaluation = Evaluation(model)
    assert evaluation.pairs == []
    assert_equal(model, evaluation)


def trunks() -> dict[str, tuple[nn.Module, int]]:
    """Convolutions that fold: name to (trunk, channels it returns)."""
    return {
        "grouped": (nn.Sequential(nn.Conv2d(C, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6)), 6),
        "depthwise, dilated": (nn.Sequential(nn.Conv2d(C, C, 3, groups=C, dilation=2), nn.BatchNorm2d(C)), C),
        "with bias": (nn.Sequential(nn.Conv2d(C, 7, (3, 1), stride=2, bias=True), nn.BatchNorm2d(7)), 7),
        "eps": (nn.Sequential(nn.Conv2d(C, 7, 1, bias=False), nn.BatchNorm2d(7, eps=0.3)), 7),
        "no affine": (nn.Sequential(nn.Conv2d(C, 7, 1), nn.BatchNorm2d(7, affine=False)), 7),
    }


@pytest.mark.parametrize("name", sorted(trunks()))
def test_a_norm_behind_its_own_convolution_is_folded(name):
    model = classifier(Net(*trunks()[name]))
    evaluation = Evaluation(model)
    assert evaluation.pairs == [("trunk.0", "trunk.1")]
    assert isinstance(evaluation.model.net.get_submodule("trunk.1"), nn.Identity)
    assert_equal(model, evaluation)


def test_a_norm_without_running_statistics_is_kept():
    norm = nn.BatchNorm2d(7, track_running_stats=False)
    model = classifier(Net(nn.Sequential(nn.Conv2d(C, 7, 1), norm), 7))
    evaluation = Evaluation(model, block=32)
    assert evaluation.pairs == []
    assert_equal(model, evaluation, images(32))  # such a norm looks at its block, so the block is the batch


@pytest.mark.parametrize(("build_net", "pairs"), [(resnet8, 10), (resnet18, 20)])
def test_shipped_networks_are_folded_whole_and_equal_the_plain_model(build_net, pairs):
    model = classifier(build_net(num_classes=K, width=8))
    evaluation = Evaluation(model)
    assert len(evaluation.pairs) == pairs
    assert not any(isinstance(m, nn.BatchNorm2d) for m in evaluation.model.modules())
    assert_equal(model, evaluation)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18"])
def test_torchvision_networks_equal_the_plain_model_and_keep_rows_apart(name):
    model = classifier(build(f"torchvision:{name}", num_classes=K))
    evaluation = Evaluation(model, block=64)
    assert evaluation.pairs
    x = torch.rand(64, 3, 40, 48, generator=torch.Generator().manual_seed(1))
    assert_equal(model, evaluation, x)
    logits, order = evaluation.logits(x), torch.randperm(64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(evaluation.logits(x[order]), logits[order])
    kept = torch.arange(64) % 3 == 0
    mixed = torch.where(kept[:, None, None, None], x, x.flip(0) * 0.5)
    assert torch.equal(evaluation.logits(mixed)[kept], logits[kept])


def test_an_evaluation_leaves_the_classifier_as_it_was():
    """Byte for byte, in train mode, with gradients, through logits, gradients, features and refresh."""
    model = classifier(resnet8(num_classes=K, width=4)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    layouts = {k: v.stride() for k, v in model.state_dict().items()}
    evaluation = Evaluation(model)
    x = images().requires_grad_()
    torch.autograd.grad(evaluation(x).sum(), x)
    evaluation.logits(images())
    evaluation.features(images())
    evaluation.refresh(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[k].numpy().tobytes() == before[k].numpy().tobytes() for k in before)
    assert {k: v.stride() for k, v in after.items()} == layouts
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not any(p.requires_grad for p in evaluation.parameters())


def test_refresh_follows_weights_and_statistics():
    model = classifier(Net(nn.Sequential(nn.Conv2d(C, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), 6))
    evaluation = Evaluation(model)
    before = evaluation.logits(images())
    shuffled(model.net, seed=9)
    assert torch.equal(evaluation.logits(images()), before)
    evaluation.refresh(model)
    assert not torch.allclose(evaluation.logits(images()), before)
    assert_equal(model, evaluation)


# ---------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("block", [0, -32, 33, 16])
def test_a_block_is_a_positive_multiple_of_32(block):
    with pytest.raises(ValueError, match="positive multiple of 32"):
        Evaluation(classifier(Net(nn.Identity(), C)), block=block)


@pytest.mark.parametrize(("n", "counts"), [(0, [0]), (1, [1]), (32, [32]), (70, [32, 32, 6])])
def test_blocks_are_full_and_count_real_rows(n, counts):
    x = images(n)
    found = list(padded(x, 32))
    assert [count for _, count in found] == counts and all(len(part) == 32 for part, _ in found)
    assert torch.equal(torch.cat([part[:count] for part, count in found]), x)
    assert all(torch.equal(row, part[0]) for part, count in found for row in part[count:])


def test_logits_of_many_rows_are_those_of_single_rows():
    evaluation = Evaluation(classifier(resnet8(num_classes=K, width=4)), block=32)
    x = images(37)
    whole = evaluation.logits(x)
    assert whole.shape == (37, K)
    assert all(torch.equal(evaluation.logits(x[i : i + 1])[0], whole[i]) for i in (0, 5, 31, 32, 36))
    assert evaluation.logits(x[:0]).shape == (0, K)


def test_in_blocks_joins_rows_of_all_tensors():
    a, b = torch.arange(70.0), torch.arange(70.0) * 2
    seen = []
    found = in_blocks(lambda x, y: seen.append(len(x)) or x + y, a, b, block=32)
    assert torch.equal(found, a * 3) and seen == [32, 32, 32]


# -------------------------------------------------------------------------------------------------- features


def test_features_are_the_input_of_the_head():
    model = classifier(resnet8(num_classes=K, width=4))
    evaluation, x = Evaluation(model, block=32), images(32)
    found = evaluation.features(x)
    assert found.shape == (32, 32) and found.min() >= 0
    assert torch.allclose(model.net.fc(found), evaluation(x), atol=1e-5)


def output_of_layer(model: Classifier, name: str, x: torch.Tensor) -> torch.Tensor:
    """What a layer of the network itself gives."""
    seen = []
    handle = model.net.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(o.detach().clone()))
    model(x)
    handle.remove()
    return seen[-1]


@pytest.mark.parametrize("name", [name for name, _ in resnet8(num_classes=K, width=4).named_modules() if name])
def test_features_of_any_layer_are_its_output_also_where_a_batchnorm_follows(name):
    model, x = classifier(resnet8(num_classes=K, width=4)), images(32)
    evaluation = Evaluation(model, block=32, layer=name)
    assert torch.allclose(evaluation.features(x, layer=name), output_of_layer(model, name, x), atol=1e-4)
    assert torch.allclose(evaluation(x), model(x), atol=1e-4)
    assert not evaluation.layer(name)._forward_hooks and not evaluation.model.net.fc._forward_pre_hooks


def test_a_layer_that_ends_with_the_convolution_is_kept_apart_too():
    trunk = nn.Sequential(nn.Sequential(nn.Identity(), nn.Conv2d(C, 6, 3)), nn.BatchNorm2d(6), nn.ReLU())
    model, x = classifier(Net(trunk, 6)), images(32)
    evaluation = Evaluation(model, block=32, layer="trunk.0")
    assert torch.allclose(evaluation.features(x, layer="trunk.0"), output_of_layer(model, "trunk.0", x), atol=1e-5)
    assert Evaluation(model, layer="trunk").pairs == Evaluation(model).pairs == [("trunk.0.1", "trunk.1")]


class Odd(nn.Module):
    """Layers that do not run, give two things, or have no row per image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(C, C, 1), nn.Linear(C, K)
        self.idle, self.pair, self.mean = (nn.Identity() for _ in range(3))
        self.pair.forward, self.mean.forward = lambda x: (x, x), torch.mean

    def forward(self, x):
        x, _ = self.pair(self.conv(x))
        return self.fc(x.mean((2, 3))) + self.mean(x)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("idle", "layer idle does not run"),
        ("pair", "layer pair: a tuple, expected a tensor"),
        ("mean", r"layer mean: \(\) for 32 images, expected a row for each"),
    ],
)
def test_a_layer_without_a_row_per_image_is_refused(layer, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(classifier(Odd()), block=32).features(images(32), layer=layer)


def test_a_layer_into_which_a_batchnorm_is_folded_is_refused():
    evaluation = Evaluation(classifier(resnet8(num_classes=K, width=4)), block=32)
    with pytest.raises(ValueError, match=r"a BatchNorm is folded into layer 'conv1'; try .*layer='conv1'"):
        evaluation.features(images(32), layer="conv1")


def test_features_are_not_changed_by_a_later_in_place_operation():
    trunk = nn.Sequential(nn.Conv2d(C, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
    evaluation = Evaluation(classifier(Net(trunk, 6)), block=32)
    found = evaluation.features(images(32), layer="trunk.1")
    assert found.min() < 0
    assert torch.equal(found.clamp_min(0), evaluation.features(images(32), layer="trunk.2"))


def test_features_carry_gradients():
    evaluation = Evaluation(classifier(resnet8(num_classes=K, width=4)), block=32)
    x = images(32).requires_grad_()
    assert torch.autograd.grad(evaluation.features(x).sum(), x)[0].abs().sum() > 0


def test_an_unknown_layer_is_refused_with_the_names_there_are():
    evaluation = Evaluation(classifier(resnet8(num_classes=K, width=4)))
    with pytest.raises(ValueError, match=r"no layer 'layer9'; the network has .*layer1, .*fc"):
        evaluation.features(images(64), layer="layer9")


class HeadFirst(nn.Module):
    """Its head is defined first, and layers that do not run by themselves, or not at all, last."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.conv, self.inner = nn.Linear(8, K), nn.Conv2d(C, 8, 1), nn.Linear(8, 8)
        self.attention, self.projection = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        tokens = self.attention(tokens, tokens, tokens)[0]
        return self.head(self.inner(tokens).mean(1))


def test_the_head_is_the_linear_layer_that_runs_last():
    model, x = classifier(HeadFirst()), images(32)
    found = Evaluation(model, block=32).features(x)
    torch.testing.assert_close(found, output_of_layer(model, "inner", x).mean(1), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no linear head"):
        convolution = nn.Sequential(nn.Conv2d(C, K, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        Evaluation(classifier(convolution), block=32).features(x)


# -------------------------------------------------------------------------------------------------- FakeReLU


class TwiceUsed(nn.Module):
    """A block whose one in-place ReLU runs twice, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.conv2 = nn.Conv2d(C, C, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.conv2(out)
        out += x
        return self.relu(out)


def gradient(function, x, weights):
    at = x.clone().requires_grad_()
    values = function(at)
    return values.detach(), torch.autograd.grad((values * weights).sum(), at)[0]


@pytest.mark.parametrize("net", [lambda: resnet8(num_classes=K, width=4), lambda: Net(TwiceUsed(), C)])
def test_fake_relu_keeps_the_forward_pass_and_changes_the_gradient(net):
    evaluation = Evaluation(classifier(net()), block=32)
    faked, x = fake_last_relu(evaluation, images(32)), images(32, seed=4)
    weights = torch.randn(32, K, generator=torch.Generator().manual_seed(3))
    plain, plain_gradient = gradient(evaluation, x, weights)
    values, changed = gradient(faked, x, weights)
    assert torch.equal(values, plain) and not torch.allclose(changed, plain_gradient)
    again, repeated = gradient(faked, x, weights)
    assert torch.equal(again, values) and torch.equal(repeated, changed)
    assert torch.equal(gradient(evaluation, x, weights)[1], plain_gradient)  # the original is not touched


def test_only_the_last_use_lets_gradients_through():
    """d/dx of head(mean(ste(conv2(relu(conv1 x)) + x))) by hand: the last ReLU is the identity, the first is not."""
    model = classifier(Net(TwiceUsed(), C))
    evaluation, x = Evaluation(model, block=32), images(32)
    weights = torch.randn(32, K, generator=torch.Generator().manual_seed(3))
    trunk = model.net.trunk

    def by_hand(at):
        normed = (at - model.mean) / model.std
        first = torch.relu(trunk.bn1(trunk.conv1(normed)))
        return model.net.fc((trunk.conv2(first) + normed).mean((2, 3)))

    expected = gradient(by_hand, x, weights)[1]
    found = gradient(fake_last_relu(evaluation, x), x, weights)[1]
    assert torch.allclose(found, expected, atol=1e-6 + 1e-5 * float(expected.abs().max()))


def test_the_last_relu_before_a_layer_lets_gradients_through():
    """Up to conv2 that is the first use of the only ReLU, of which the second comes later."""
    model, x = classifier(Net(TwiceUsed(), C)), images(32)
    evaluation = Evaluation(model, block=32)
    weights = torch.randn(32, C, H, W, generator=torch.Generator().manual_seed(3))
    trunk = model.net.trunk
    layer = {"layer": "trunk.conv2"}

    def by_hand(at):
        return trunk.conv2(trunk.bn1(trunk.conv1((at - model.mean) / model.std)))

    expected = gradient(by_hand, x, weights)[1]
    faked = fake_last_relu(evaluation, x, **layer)
    values, found = gradient(lambda at: faked.features(at, **layer), x, weights)
    assert torch.equal(values, evaluation.features(x, **layer))
    assert torch.allclose(found, expected, atol=1e-6 + 1e-5 * float(expected.abs().max()))
    again = gradient(lambda at: faked.features(at, **layer), x, weights)
    assert torch.equal(again[1], found)
    with pytest.raises(ValueError, match=r"no ReLU runs before layer trunk.bn1 is done; try without --fake-relu"):
        fake_last_relu(evaluation, x, layer="trunk.bn1")


class Gives(nn.Module):
    """A network that answers with what a function makes of its images."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


def too_deep(x):
    raise AssertionError("Wrong image height!\nExpected 224 but got 8!")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: (x.flatten(1)[:, :K], x), "gives a tuple, expected logits"),
        (lambda x: x.flatten(1), rf"gives \(2, {C * H * W}\) for 2 images, expected logits, \(2, {K}\)"),
        (lambda x: x.flatten(1)[0, :K], rf"gives \({K},\) for 2 images"),
        (
            too_deep,
            rf"images of {C}x{H}x{W} \(Wrong image height! Expected 224 but got 8!\); try rb-data --size or --grey",
        ),
        (lambda x: nn.functional.conv2d(x, x.new_zeros(1, C, 9, 9)), r"Kernel size can't be greater"),
    ],
)
def test_what_gives_no_logits_is_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        check_logits(classifier(Gives(answer)), (C, H, W), K)
    check_logits(classifier(Gives(lambda x: x.flatten(1)[:, :K])), (C, H, W), K)


def test_a_trial_that_lacks_memory_is_no_fault_of_the_network():
    def answer(_):
        raise MemoryError

    with pytest.raises(MemoryError):
        check_logits(classifier(Gives(answer)), (C, H, W), K)


def test_a_network_without_relu_modules_is_refused():
    with pytest.raises(ValueError, match="no ReLU modules"):
        fake_last_relu(Evaluation(classifier(Net(nn.Identity(), C)), block=32), images(32))


# ------------------------------------------------------------------------------------------ weights of others

EXPECTED = resnet8(num_classes=K, width=4).state_dict()


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.module.", "module.net."])
@pytest.mark.parametrize("wrap", [(), ("state_dict",), ("model",), ("net",), ("checkpoint", "ema_state_dict")])
def test_wrappers_are_opened_and_prefixes_removed(prefix, wrap):
    state = {k: torch.randn(v.shape) if v.is_floating_point() else v + 3 for k, v in EXPECTED.items()}
    saved: dict = {prefix + k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    for name in reversed([w for w in wrap if w != "checkpoint"]):
        saved = {"epoch": 3, name: saved, "arch": "resnet"}
    found = strip_wrapping(saved, EXPECTED)
    assert list(found) == list(EXPECTED)
    for k, v in state.items():
        assert torch.equal(found[k], v.double().to(EXPECTED[k].dtype)) and found[k].dtype == EXPECTED[k].dtype


def test_counters_of_norms_may_be_missing_and_tensors_are_copies():
    state = {k: v for k, v in EXPECTED.items() if not k.endswith("num_batches_tracked")}
    found = strip_wrapping(copy.deepcopy(state), EXPECTED)
    assert set(found) == set(EXPECTED)
    found["fc.weight"].zero_()
    assert EXPECTED["fc.weight"].abs().sum() > 0


def test_heads_that_only_training_uses_may_be_there():
    """As in the checkpoints of torchvision's googlenet and inception_v3; our own networks may use the names."""
    state = EXPECTED | {"aux1.fc1.weight": torch.zeros(2), "AuxLogits.fc.bias": torch.zeros(2)}
    assert list(strip_wrapping(state, EXPECTED)) == list(EXPECTED)
    assert "aux1.fc1.weight" in strip_wrapping(state, EXPECTED | {"aux1.fc1.weight": torch.zeros(2)})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
@pytest.mark.filterwarnings("error")
def test_networks_of_torchvision_with_such_heads_are_built_without(name):
    net = build(f"torchvision:{name}", num_classes=K)
    assert not [key for key in net.state_dict() if key.lower().startswith("aux")]
    check_logits(classifier(net).train(), (3, 80, 80), K)


@pytest.mark.slow
def test_networks_that_ask_for_a_version_of_their_weights_take_bare_ones():
    """torchvision's mnasnet: tensors that come out of a file have none."""
    net, other = (build("torchvision:mnasnet0_5", num_classes=K) for _ in range(2))
    bare = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    load_weights(other, bare)
    assert all(torch.equal(tensor, bare[key]) for key, tensor in other.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        load_weights(other, dict(list(bare.items())[1:]))


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({k: v for k, v in EXPECTED.items() if k != "fc.bias"}, r"1 missing keys \(fc\.bias\)"),
        (EXPECTED | {"extra.w": torch.zeros(2)}, r"1 unexpected keys \(extra\.w\)"),
        (EXPECTED | {"fc.bias": torch.zeros(K + 1)}, r"fc\.bias has shape \[5\], the architecture has \[4\]"),
        ({"a": torch.zeros(2)}, "missing keys .*….*; 1 unexpected keys"),
        ({"epoch": 3}, "no state dict found"),
        ([1, 2], "no state dict found"),
        ({}, "no state dict found"),
    ],
)
def test_weights_that_do_not_fit_are_refused(saved, message):
    with pytest.raises(ValueError, match=message):
        strip_wrapping(saved, EXPECTED)


def test_a_weight_that_a_hook_writes_is_not_folded():
    """spectral_norm and weight_norm recompute the weight in each pass, which would undo the folding."""
    net = nn.Sequential(nn.Conv2d(C, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Flatten())
    torch.nn.utils.spectral_norm(net[0])
    with torch.no_grad():
        net(torch.rand(N, C, H, W))
    model = Classifier(net, mean=MEAN, std=STD).eval()
    folded, x = Evaluation(model, block=32), torch.rand(N, C, H, W)
    assert folded.pairs == [("2", "3")]
    assert torch.allclose(folded.logits(x), model(x), atol=1e-5)


# ------------------------------------------------------------------------------------------- ReLU in place


class Branches(nn.Module):
    """ReLUs of which some share their input with another step, or with the network's own memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.watched, self.norm = (nn.Conv2d(C, C, 3, padding=1) for _ in range(3))
        self.bn, self.same = nn.BatchNorm2d(C), nn.Identity()
        self.alone, self.behind_norm, self.of_sum, self.twice = (nn.ReLU() for _ in range(4))
        self.of_input, self.of_same, self.beside, self.of_view, self.of_watched = (nn.ReLU() for _ in range(5))
        self.first_only, self.last_only, self.heard = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.seen: list[torch.Tensor] = []
        self.watched.register_forward_hook(lambda _, __, output: self.seen.append(output))
        self.heard.register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0]))

    def forward(self, x):
        y = self.alone(self.conv(x)) + self.of_input(x)
        z = self.norm(y)
        y = self.behind_norm(self.bn(self.conv(y))) + self.beside(z) - z
        y = self.of_sum(y + x) + self.of_watched(self.watched(x)) + self.of_same(self.same(x))
        y = self.twice(self.norm(self.twice(torch.add(y, x)))) + self.first_only(self.norm(x)) + self.last_only(x)
        y = y + self.heard(self.norm(x))
        return self.first_only(x) + self.last_only(self.norm(x)) + self.of_view(y.flatten(1).view(y.shape))


FREE = {"alone", "behind_norm", "of_sum", "twice"}


def test_a_relu_writes_over_its_input_where_nothing_else_makes_use_of_it():
    model = classifier(Net(Branches(), C))
    evaluation, x = Evaluation(model, block=32), images(32)
    relus = {name: m for name, m in evaluation.model.net.trunk.named_modules() if isinstance(m, nn.ReLU)}
    assert {name for name, relu in relus.items() if relu.inplace} == FREE
    weights = torch.randn(32, K, generator=torch.Generator().manual_seed(3))
    found = gradient(evaluation, x, weights)
    for relu in relus.values():
        relu.inplace = False
    expected = gradient(evaluation, x, weights)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not any(m.inplace for m in model.modules() if isinstance(m, nn.ReLU))  # the model itself is as it was


@pytest.mark.parametrize("make", [lambda: resnet8(num_classes=K, width=4), lambda: Net(TwiceUsed(), C)])
def test_every_relu_of_a_residual_network_writes_over_its_input(make):
    evaluation = Evaluation(classifier(make()), block=32)
    assert all(m.inplace for m in evaluation.modules() if isinstance(m, nn.ReLU))


# ------------------------------------------------------------------------------- what a network keeps of a pass


class Watched(nn.Module):
    """A network that keeps what it computed last, as those do that show their attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.last, self.seen = None, {"maps": []}

    def forward(self, x):
        self.last = self.conv(x)
        self.seen["maps"] = [self.last, (self.last.mean(),)]
        return self.last.relu()


def test_a_network_that_keeps_what_it_computed_is_copied_without_the_graph():
    model, x = classifier(Net(Watched(), C)), images(32)
    expected = model(x).detach()
    assert model.net.trunk.last.grad_fn is not None
    evaluation = Evaluation(model, block=32)
    kept = evaluation.model.net.trunk
    assert torch.equal(kept.last, model.net.trunk.last) and kept.last.grad_fn is None
    assert kept.seen["maps"][0] is kept.last and kept.seen["maps"][1][0].grad_fn is None
    assert torch.allclose(evaluation(x), expected, atol=1e-5)
    values, _ = gradient(evaluation, x, torch.ones(32, K))
    assert torch.equal(gradient(copied(evaluation), x, torch.ones(32, K))[0], values)
    assert model.net.trunk.last.grad_fn is not None  # the network itself is as it was
