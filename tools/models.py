"""A classifier and its one evaluation form: normalisation inside, BatchNorm folded, channels-last, frozen, ReLU in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.fusion import fuse_conv_bn_weights

from rbkit.tools.lanes import Found, Lanes, computed
from rbkit.tools.tracing import single_pairs, sparing_relus, traced

BLOCK, GPU_BLOCK = 64, 512
Module = TypeVar("Module", bound=nn.Module)


class Classifier(nn.Module):
    """A network behind its normalisation: images in [0, 1] to logits.

    Shapes: images (N, C, H, W), mean and std of 1 or C values; logits (N, K).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images - _spread(self.mean, images)) / _spread(self.std, images))


def copied(module: Module) -> Module:
    """A deep copy. What the network's code keeps of a pass, such as attention, comes without its graph: graphs cannot be copied."""
    kept = [tensor for part in module.modules() for tensor in _tensors(vars(part))]
    return copy.deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in kept if tensor.grad_fn is not None})


def _tensors(found: object) -> Iterator[Tensor]:
    """All tensors in a value, also within lists, tuples and dicts."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict | list | tuple):
        for value in found.values() if isinstance(found, dict) else found:
            yield from _tensors(value)


@torch.no_grad()
def check_logits(classifier: Classifier, shape: Sequence[int], classes: int) -> None:
    """Run a classifier, as it is, on two black images of `shape` (C, H, W).

    Raises: ValueError where it does not run on them, or gives something else than logits (2, classes).
    """
    images = torch.zeros(2, *shape, device=classifier.mean.device)
    size = "x".join(map(str, shape))
    try:
        logits = classifier(images)
    except MemoryError:
        raise
    except Exception as error:  # the code of the network is anybody's
        reason = " ".join(str(error).split()) or type(error).__name__
        other = "--rgb" if shape[0] == 1 else "--grey"
        raise ValueError(
            f"the network does not run on images of {size} ({reason[:200]}); try rb-data --size or {other}"
        ) from error
    if not isinstance(logits, Tensor):
        raise ValueError(f"the network gives a {type(logits).__name__}, expected logits ({classes} for each image)")
    if tuple(logits.shape) != (2, classes):
        raise ValueError(f"the network gives {tuple(logits.shape)} for 2 images, expected logits, (2, {classes})")


def _spread(values: Tensor, images: Tensor) -> Tensor:
    """Values per channel (C, 1, 1) for each pixel (1, C, H, W), laid out as `images` are.

    In channels-last, arithmetic with a value per channel is several times slower than with one per pixel.
    """
    last = images.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return values.expand(images.shape[1:])[None].contiguous(memory_format=layout)


def _convolution(net: nn.Module, name: str) -> nn.Conv2d:
    found = net.get_submodule(name)
    assert isinstance(found, nn.Conv2d)
    return found


def _pair(net: nn.Module, conv_name: str, norm_name: str) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    norm = net.get_submodule(norm_name)
    assert isinstance(norm, nn.BatchNorm2d)
    return _convolution(net, conv_name), norm


def _ends_between(pair: tuple[str, str], layer: str) -> bool:
    """Whether a layer has the convolution of a pair in it, or is it, and its BatchNorm not."""
    conv, norm = (f"{name}.".startswith(f"{layer}.") for name in pair)
    return conv and not norm


def default_block(device: torch.device) -> int:
    """Rows of a block where nobody asks for another number: enough to keep the device busy, and no more."""
    return GPU_BLOCK if device.type == "cuda" else BLOCK


class Evaluation(nn.Module):
    """The form in which every tool runs a classifier; rows are computed in padded blocks of a fixed size.

    A copy: the classifier itself, buffers included, is never touched. `refresh` takes in the classifier's current
    weights (as training needs after each step). `lanes`: where several blocks may be computed at once. `layer`: the
    module whose own output will be asked for; no BatchNorm is folded into it. Raises ValueError for a block that is no
    positive multiple of 32.
    """

    def __init__(
        self,
        classifier: Classifier,
        *,
        block: int | None = None,
        lanes: Lanes | None = None,
        layer: str | None = None,
    ) -> None:
        super().__init__()
        self.lanes = lanes
        block = default_block(classifier.mean.device) if block is None else block
        if block <= 0 or block % 32:
            raise ValueError(f"block {block}: expected a positive multiple of 32")
        self.block = block
        self.model = copied(classifier).eval().requires_grad_(False)
        graph = traced(copied(self.model.net))  # tracing leaves its own values in what the code keeps of a pass
        self.pairs = [
            pair for pair in single_pairs(self.model.net, graph) if layer is None or not _ends_between(pair, layer)
        ]
        for relu in sparing_relus(self.model.net, graph):
            relu.inplace = True
        for conv_name, norm_name in self.pairs:
            conv = _convolution(self.model.net, conv_name)
            if conv.bias is None:
                conv.bias = nn.Parameter(torch.zeros(conv.out_channels, device=conv.weight.device), requires_grad=False)
            replace_module(self.model.net, norm_name, nn.Identity())
        self.refresh(classifier)
        self.model.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def refresh(self, classifier: Classifier) -> None:
        """Copy the weights of `classifier`, folding each BatchNorm into its convolution."""
        source = dict(classifier.named_parameters()) | dict(classifier.named_buffers())
        folded = {f"net.{name}" for pair in self.pairs for name in pair}
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if name.rpartition(".")[0] not in folded:
                tensor.copy_(source[name])
        for conv_name, norm_name in self.pairs:
            conv, norm = _pair(classifier.net, conv_name, norm_name)
            assert norm.running_mean is not None and norm.running_var is not None
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            target = _convolution(self.model.net, conv_name)
            assert target.bias is not None
            target.weight.copy_(weight)
            target.bias.copy_(bias)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.mean.device

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) as they come, without blocks: the caller pads."""
        return self.model(images.contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, K) in padded blocks, without gradients."""
        return torch.cat([self(part)[:count] for part, count in self.blocks(images)])

    def blocks(self, images: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Padded blocks (block, C, H, W) and how many of their rows are real; at least one block, also of no rows."""
        return padded(images, self.block)

    def features(self, images: Tensor, *, layer: str | None = None) -> Tensor:
        """Activations (B, D, ...) of one padded block (B, C, H, W): the input of the head, which is the linear layer that
        runs last, or the output of the module named `layer`. Raises: ValueError, as `at_layer`, or where no linear layer runs."""
        if layer is not None:
            return self.at_layer(images, layer)[0]
        seen: list[tuple[str, object]] = []

        def note(module: nn.Module, given: tuple[object, ...], *, name: str) -> None:
            seen.append((name, given[0]))

        with ExitStack() as hooks:
            for name, module in self.model.net.named_modules():
                if isinstance(module, nn.Linear):
                    hooks.enter_context(module.register_forward_pre_hook(partial(note, name=name)))
            self(images)
        if not seen:
            raise ValueError("the network has no linear head, so its features cannot be told; try --layer NAME")
        name, found = seen[-1]
        return _row_per_image(found, images, name=name)

    def at_layer(self, images: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """What a layer gives the last time it runs, (B, ...), and the logits (B, K), of one padded block (B, C, H, W).

        Raises: ValueError where it does not run, or gives no tensor with a row per image.
        """
        found: list[object] = []

        def take(module: nn.Module, inputs: object, output: object) -> object:
            found.append(output)
            return output.clone() if isinstance(output, Tensor) else None  # what follows may change it in place

        with self.layer(name).register_forward_hook(take):
            logits = self(images)
        if not found:
            raise ValueError(f"layer {name} does not run")
        return _row_per_image(found[-1], images, name=name), logits

    def lanes_for(self, images: Tensor) -> Lanes | None:
        """In which blocks of such images (N, C, H, W) may be computed at once; None where one at a time is right."""
        return self.lanes if self.lanes is not None and len(images) and self.lanes.fit(images) else None

    def layer(self, name: str) -> nn.Module:
        """A module by name, which gives what the classifier's own gives. Raises: ValueError listing names that exist, or for
        one into whose last convolution a BatchNorm is folded."""
        if any(_ends_between(pair, name) for pair in self.pairs):
            raise ValueError(f"a BatchNorm is folded into layer {name!r}; try Evaluation(classifier, layer={name!r})")
        try:
            return self.model.net.get_submodule(name)
        except AttributeError:
            names = [n for n, _ in self.model.net.named_modules() if n and "." not in n]
            raise ValueError(f"no layer {name!r}; the network has {', '.join(names)}") from None


def _row_per_image(found: object, images: Tensor, *, name: str) -> Tensor:
    """What was found at a layer. Raises: ValueError where it is no tensor with a row for each image."""
    if not isinstance(found, Tensor):
        raise ValueError(f"layer {name}: a {type(found).__name__}, expected a tensor")
    if not found.dim() or len(found) != len(images):
        raise ValueError(f"layer {name}: {tuple(found.shape)} for {len(images)} images, expected a row for each")
    return found


def twice_differentiable() -> AbstractContextManager[None]:
    """Gradients of passes in here have gradients: attention goes by plain products, since torch's fused kernels have no second one."""
    return sdpa_kernel(SDPBackend.MATH)


def padded(images: Tensor, block: int) -> Iterator[tuple[Tensor, int]]:
    """Blocks (block, ...) of a tensor (N, ...), the last filled up with its first row, and how many rows of each are real."""
    for start in range(0, max(len(images), 1), block):
        part = images[start : start + block]
        count = len(part)
        if count < block:
            fill = part[:1] if count else images.new_zeros(1, *images.shape[1:])
            part = torch.cat([part, fill.expand(block - count, *images.shape[1:])])
        yield part, count


def in_blocks(function: Callable[..., Found], *tensors: Tensor, block: int, lanes: Lanes | None = None) -> Found:
    """`function` over padded blocks (block, ...) of tensors (N, ...), in `lanes` if it may; the rows of its tensor, or of each
    of its tensors, are joined again, (N, ...)."""
    rows = [[part for part, _ in row] for row in zip(*(padded(t, block) for t in tensors), strict=True)]
    found = list(computed(function, rows, lanes=lanes))
    if isinstance(found[0], Tensor):
        return torch.cat(found)[: len(tensors[0])]
    return tuple(torch.cat(each)[: len(tensors[0])] for each in zip(*found, strict=True))


def features_of(evaluation: Evaluation, images: Tensor, *, layer: str | None = None) -> Tensor:
    """Activations of any number of images, (N, D), in padded blocks and without gradients (see `Evaluation.features`)."""
    with torch.no_grad():
        return in_blocks(lambda x: evaluation.features(x, layer=layer).flatten(1), images, block=evaluation.block)


def replace_module(net: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, module)
