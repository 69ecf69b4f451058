"""Sanity: does the map depend on what the model has learnt, and on the class that it explains? (Adebayo et al. 2018)

Layers are drawn anew from the head down, each from a stream of random numbers of its own. A drawn layer keeps the mean
and the deviation of each of its outputs on noise images, which is what estimating BatchNorm's statistics again would
do, but does not depend on the rows that are judged. Attention, whose output is not linear in its weights, keeps the mean
square of each of them instead. The model itself is never changed.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbkit.tools import random
from rbkit.tools.batch import Batch, reduce_channels
from rbkit.tools.likeness import structural_similarity
from rbkit.tools.models import Evaluation, copied
from rbkit.tools.rowwise import rank_correlation

PROBES = 32  # noise images on which a layer's statistics are taken
GRAIN = 4  # side, in pixels, of what is even in them


def probes(evaluation: Evaluation, shape: tuple[int, ...]) -> Tensor:
    """Smooth noise around the model's mean colour, (PROBES, C, H, W)."""
    channels, height, width = shape
    coarse = (channels, -(-height // GRAIN), -(-width // GRAIN))
    noise = random.normal(torch.arange(PROBES, device=evaluation.device), coarse, seed=0, purpose="probe")
    smooth = F.interpolate(noise, (height, width), mode="bilinear")
    return (evaluation.model.mean + evaluation.model.std * smooth).clamp(0, 1)


def layers(evaluation: Evaluation, images: Tensor) -> dict[str, tuple[Tensor, Tensor] | None]:
    """Layers with weights in the order in which they run, each with its (last) input and output on `images`; None of
    attention."""
    seen: dict[str, tuple[Tensor, Tensor] | None] = {}

    def note(module: nn.Module, given: Any, output: Any, *, name: str) -> None:
        plain = not isinstance(module, nn.MultiheadAttention)
        seen[name] = (given[0].clone(), output.clone()) if plain else None

    with ExitStack() as hooks, torch.no_grad():
        for name, module in evaluation.model.net.named_modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.MultiheadAttention):
                hooks.enter_context(module.register_forward_hook(partial(note, name=name)))
        evaluation(images)
    return seen


def _draw(layer: nn.Module, before: Tensor, after: Tensor, *, name: str, draw: int) -> None:
    """New normal weights for a layer, with the mean and deviation of each output on `before` that `after` has."""
    assert isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    weight, bias = layer.weight, layer.bias
    rows = torch.arange(len(weight), device=weight.device)
    weight.copy_(random.normal(rows, tuple(weight.shape[1:]), seed=0, purpose=f"randomised {name}", draw=draw))
    if bias is not None:
        bias.zero_()
    dims = [d for d in range(after.dim()) if d != (after.dim() - 1 if isinstance(layer, nn.Linear) else 1)]
    found = layer(before)
    scale = after.std(dims, correction=0) / found.std(dims, correction=0).clamp_min(1e-12)
    weight.mul_(scale.reshape(-1, *[1] * (weight.dim() - 1)))
    if bias is not None:
        bias.copy_(after.mean(dims) - scale * found.mean(dims))


def _draw_attention(attention: nn.Module, *, name: str, draw: int) -> None:
    """New normal weights of the mean square that each matrix had, without biases."""
    for part, weight in attention.named_parameters():
        if weight.dim() < 2:
            weight.zero_()
            continue
        rows = torch.arange(len(weight), device=weight.device)
        new = random.normal(rows, tuple(weight.shape[1:]), seed=0, purpose=f"randomised {name}.{part}", draw=draw)
        weight.copy_(new * weight.square().mean().sqrt())


@torch.no_grad()
def randomised(
    evaluation: Evaluation, shape: tuple[int, ...], *, count: int | None = None, draw: int = 0
) -> Evaluation:
    """A copy whose last `count` layers (None: all) are drawn anew. shape: (C, H, W) of the images."""
    changed = copied(evaluation)
    recorded = layers(evaluation, probes(evaluation, shape))
    for name in list(reversed(recorded))[:count]:
        layer, seen = changed.model.net.get_submodule(name), recorded[name]
        if seen is None:
            _draw_attention(layer, name=name, draw=draw)
        else:
            _draw(layer, *seen, name=name, draw=draw)
    return changed


def stages(total: int) -> list[int]:
    """How many layers from the head down are random at each stage: the head, a third, two thirds, all."""
    return sorted({1, -(-total // 3), -(-2 * total // 3), total})


def _cascade(batch: Batch) -> list[Tensor]:
    """The attribution (N, C, H, W) under each stage."""
    assert batch.explained is not None
    if "cascade" not in batch.own:
        shape = tuple(batch.explained.shape[1:])
        total = len(layers(batch.evaluation, probes(batch.evaluation, shape)))
        batch.own["cascade"] = [
            batch.explain_again(batch.explained, evaluation=randomised(batch.evaluation, shape, count=count))
            for count in stages(total)
        ]
    return batch.own["cascade"]


def _absolute(batch: Batch, attribution: Tensor) -> Tensor:
    """Absolute values of the map per location, (N, H W)."""
    return reduce_channels(attribution, signed=batch.signed).abs().flatten(1)


def randomisation(batch: Batch) -> Tensor:
    """Spearman's correlation of absolute maps with those of the model randomised from the head down (Adebayo et al. 2018),
    mean over 4 stages: the head, a third, two thirds and all of the layers."""
    own = batch.maps.abs().flatten(1)
    return torch.stack([rank_correlation(own, _absolute(batch, other)) for other in _cascade(batch)], 1).nanmean(1)


def randomisation_signed(batch: Batch) -> Tensor:
    """The same with the signs of the maps, channels summed (Adebayo et al. 2018)."""
    assert batch.attribution is not None
    own = batch.attribution.sum(1).flatten(1)
    return torch.stack([rank_correlation(own, other.sum(1).flatten(1)) for other in _cascade(batch)], 1).nanmean(1)


def randomisation_ssim(batch: Batch) -> Tensor:
    """The same by structural similarity of absolute maps, each divided by its maximum (Adebayo et al. 2018)."""

    def shown(maps: Tensor) -> Tensor:
        picture = maps.abs().reshape(len(maps), 1, *batch.maps.shape[1:])
        return picture / picture.amax((2, 3), keepdim=True).clamp_min(1e-30)

    own = shown(batch.maps)
    return torch.stack([structural_similarity(own, shown(_absolute(batch, x))) for x in _cascade(batch)], 1).mean(1)


def randomisation_floor(batch: Batch) -> Tensor:
    """Spearman's correlation of the absolute maps of two models of random weights: what image and network alone explain,
    the floor of randomisation."""
    assert batch.explained is not None
    shape = tuple(batch.explained.shape[1:])
    other = batch.explain_again(batch.explained, evaluation=randomised(batch.evaluation, shape, draw=1))
    return rank_correlation(_absolute(batch, _cascade(batch)[-1]), _absolute(batch, other))


def random_logit(batch: Batch) -> Tensor:
    """Spearman's correlation of absolute maps with those of another class, drawn by id (after Sixt et al. 2020)."""
    assert batch.explained is not None and batch.target is not None
    classes = batch.evaluation.logits(batch.explained[:1]).shape[1]
    if classes < 2:
        return torch.full((len(batch.ids),), torch.nan, dtype=torch.float64, device=batch.ids.device)
    step = 1 + random.integers(batch.ids, classes - 1, seed=0, purpose="random logit")
    again = batch.explain_again(batch.explained, target=(batch.target + step) % classes)
    return rank_correlation(batch.maps.abs().flatten(1), _absolute(batch, again))
