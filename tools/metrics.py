"""The metrics: each one small function of a batch to values per example, and one line in the table METRICS.

NaN marks an example for which a metric is not defined; such examples are left out and counted. Attribution metrics
read `batch.maps` alone, so that the same function applied to reference maps gives the chance band.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rbkit.tools import random
from rbkit.tools.attack import clearly_above, is_broken, margin
from rbkit.tools.models import Evaluation, in_blocks
from rbkit.tools.norms import NORMS
from rbkit.tools.quantise import leaves_ball, round_inside
from rbkit.tools.saliency import Saliency, blurred, explain

GRID = 11  # points of a flipping curve, both ends included
NOISE_RADIUS = 0.02  # of max-sensitivity, Linf in [0, 1] pixels
NOISE_DRAWS = 2


@dataclass
class Batch:
    """Rows to be judged and the model that judges them.

    image float32 (N, C, H, W) is the clean image; adversarial, attribution, inverted, mask are None where the stream
    has none. `explained` is what the attribution is of. Derived quantities are computed once.
    """

    evaluation: Evaluation
    ids: Tensor
    image: Tensor
    label: Tensor | None = None
    adversarial: Tensor | None = None
    norm: str = "l2"
    eps: float | None = None
    attack_target: Tensor | None = None
    attribution: Tensor | None = None
    explained: Tensor | None = None
    target: Tensor | None = None
    saliency: Saliency | None = None
    mask: Tensor | None = None
    completeness: Tensor | None = None
    inverted: Tensor | None = None
    fit: Tensor | None = None
    background: Tensor | None = None
    judge: Evaluation | None = None
    signed: bool = True
    shared: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def clean_logits(self) -> Tensor:
        """Logits of the clean images."""
        return self.evaluation.logits(self.image)

    @cached_property
    def adversarial_logits(self) -> Tensor:
        """Logits of the stored adversarial bytes."""
        assert self.adversarial is not None
        return self.evaluation.logits(self.adversarial)

    @cached_property
    def maps(self) -> Tensor:
        """The attribution per location (N, H, W): channels summed, signed or absolute."""
        assert self.attribution is not None
        return reduce_channels(self.attribution, signed=self.signed)

    def with_maps(self, maps: Tensor) -> Batch:
        """The same batch with other maps, sharing what does not depend on them."""
        return replace(self, attribution=maps[:, None], signed=True)


def reduce_channels(attribution: Tensor, *, signed: bool) -> Tensor:
    """Attributions (N, C, H, W) as maps (N, H, W): the sum over channels, or of absolute values."""
    return attribution.sum(1) if signed else attribution.abs().sum(1)


Metric = Callable[[Batch], Tensor]


# ------------------------------------------------------------------------------------------------- robustness


def clean_accuracy(batch: Batch) -> Tensor:
    """1 where the prediction on the clean image is the label."""
    assert batch.label is not None
    return (batch.clean_logits.argmax(1) == batch.label).double()


def robust_accuracy(batch: Batch) -> Tensor:
    """1 where clean and adversarial image are both classified as the label, from the stored bytes."""
    assert batch.label is not None
    return clean_accuracy(batch) * (~is_broken(batch.adversarial_logits, batch.label)).double()


def robust_accuracy_png(batch: Batch) -> Tensor:
    """The same after rounding to 8 bits inside the ball, as rb-view writes it."""
    assert batch.label is not None and batch.adversarial is not None and batch.eps is not None
    rounded = round_inside(batch.adversarial, batch.image, norm=batch.norm, eps=batch.eps)
    return clean_accuracy(batch) * (~is_broken(batch.evaluation.logits(rounded), batch.label)).double()


def ties(batch: Batch) -> Tensor:
    """1 where another class is ahead of the label by no more than the tie margin: neither broken nor safe."""
    assert batch.label is not None
    logits = batch.adversarial_logits
    ahead = margin(logits, batch.label)
    return ((ahead >= 0) & ~clearly_above(ahead, logits)).double()


def target_rate(batch: Batch) -> Tensor:
    """1 where the adversarial image is classified as the attack's target."""
    assert batch.attack_target is not None
    return (batch.adversarial_logits.argmax(1) == batch.attack_target).double()


def perturbation(batch: Batch) -> Tensor:
    """Norm of the perturbation, in [0, 1] pixels."""
    assert batch.adversarial is not None
    return NORMS[batch.norm].size(batch.adversarial.double() - batch.image.double())


def ball_violation(batch: Batch) -> Tensor:
    """1 where the stored image lies outside the ball or the box."""
    assert batch.adversarial is not None and batch.eps is not None
    return leaves_ball(batch.adversarial, batch.image, norm=batch.norm, eps=batch.eps).double()


# ----------------------------------------------------------------------------------------------- faithfulness


def _flip_curve(batch: Batch, order: Tensor, *, insert: bool, fill: Tensor) -> Tensor:
    """Probability of the target while locations are removed (or inserted) in `order`, float64 (N, GRID).

    order (N, H W): location indices, first to be flipped first. All channels of a location flip together (M4).
    """
    assert batch.explained is not None and batch.target is not None
    n, _, height, width = batch.explained.shape
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(height * width, device=order.device).expand_as(order)
    )
    counts = torch.linspace(0, height * width, GRID, device=order.device).round().long()
    rows = torch.arange(n, device=order.device).repeat_interleave(GRID)
    wanted = counts.repeat(n)

    def probability(row: Tensor, count: Tensor) -> Tensor:
        flipped = (rank[row] < count[:, None]).reshape(-1, 1, height, width)
        base, other = (fill, batch.explained) if insert else (batch.explained, fill)
        assert base is not None and other is not None
        images = torch.where(flipped, other[row], base[row])
        with torch.no_grad():
            scores = F.softmax(batch.evaluation(images).double(), dim=1)
        assert batch.target is not None
        return scores.gather(1, batch.target[row][:, None])[:, 0]

    return in_blocks(probability, rows, wanted, block=batch.evaluation.block).reshape(n, GRID)


def _area(curve: Tensor) -> Tensor:
    """Mean height of a curve by the trapezoid rule, (N,)."""
    return ((curve[:, 1:] + curve[:, :-1]) / 2).mean(1)


def _random_order(batch: Batch) -> Tensor:
    size = batch.image[0, 0].numel()
    return random.uniform(batch.ids, (size,), seed=0, purpose="random order").argsort(dim=1, stable=True)


def _fill(batch: Batch, imputation: str) -> Tensor:
    assert batch.explained is not None
    if imputation == "mean":
        return batch.evaluation.model.mean.clamp(0, 1).expand_as(batch.explained)
    return blurred(batch.explained)


def _flipping(batch: Batch, *, insert: bool, imputation: str) -> Tensor:
    """Area under the curve minus that of a random order on the same image and model (M3)."""
    fill = _fill(batch, imputation)
    key = f"random {insert} {imputation}"
    if key not in batch.shared:
        batch.shared[key] = _area(_flip_curve(batch, _random_order(batch), insert=insert, fill=fill))
    # Ties are broken by the random order, so that a constant map equals it exactly (M1).
    shuffle = _random_order(batch)
    maps = batch.maps.flatten(1).gather(1, shuffle)
    order = shuffle.gather(1, maps.argsort(dim=1, descending=True, stable=True))
    return _area(_flip_curve(batch, order, insert=insert, fill=fill)) - batch.shared[key]


def insertion(batch: Batch) -> Tensor:
    """Insertion into the blurred image (Petsiuk et al. 2018), above random order."""
    return _flipping(batch, insert=True, imputation="blur")


def deletion(batch: Batch) -> Tensor:
    """Deletion to the blurred image (Petsiuk et al. 2018), above random order; lower is better."""
    return _flipping(batch, insert=False, imputation="blur")


def insertion_mean(batch: Batch) -> Tensor:
    """Insertion into the mean colour: the second imputation (M2)."""
    return _flipping(batch, insert=True, imputation="mean")


def deletion_mean(batch: Batch) -> Tensor:
    """Deletion to the mean colour: the second imputation (M2)."""
    return _flipping(batch, insert=False, imputation="mean")


# ----------------------------------------------------------------------------------------------- localisation


def _usable_mask(batch: Batch) -> tuple[Tensor, Tensor]:
    """(mask bool (N, H W), rows with a mask that is neither empty nor full)."""
    assert batch.mask is not None
    inside = batch.mask.flatten(1) > 0
    return inside, inside.any(1) & ~inside.all(1)


def _where(valid: Tensor, values: Tensor) -> Tensor:
    return torch.where(valid, values.double(), torch.nan)


def relevance_mass(batch: Batch) -> Tensor:
    """Share of the positive relevance inside the mask (Arras et al. 2022); NaN without positive relevance (M8)."""
    inside, valid = _usable_mask(batch)
    positive = batch.maps.flatten(1).double().clamp_min(0)
    total = positive.sum(1)
    return _where(valid & (total > 0), (positive * inside).sum(1) / total.clamp_min(1e-300))


def relevance_rank(batch: Batch) -> Tensor:
    """Share of the k highest locations that lie inside a mask of k locations (Arras et al. 2022); ties count in part."""
    inside, valid = _usable_mask(batch)
    maps = batch.maps.flatten(1)
    k = inside.sum(1)
    bar = maps.sort(1, descending=True).values.gather(1, (k - 1).clamp_min(0)[:, None])
    above, equal = maps > bar, maps == bar
    share = (k - above.sum(1)).double() / equal.sum(1).clamp_min(1)
    hits = (above & inside).sum(1) + share * (equal & inside).sum(1)
    return _where(valid, hits / k.clamp_min(1))


def pointing_game(batch: Batch) -> Tensor:
    """Whether the highest location lies in the mask (Zhang et al. 2018); ties count in part, empty masks not (M7)."""
    inside, valid = _usable_mask(batch)
    maps = batch.maps.flatten(1)
    highest = maps == maps.amax(1, keepdim=True)
    return _where(valid, (highest & inside).sum(1) / highest.sum(1))


# ------------------------------------------------------------------------------------------------- complexity


def gini(batch: Batch) -> Tensor:
    """Gini index of absolute relevance (Hurley and Rickard 2009; Chalasani et al. 2020): 0 constant, 1 - 1/d one-hot."""
    values = batch.maps.flatten(1).abs().double().sort(1).values
    d, total = values.shape[1], values.sum(1)
    rank = torch.arange(1, d + 1, device=values.device, dtype=torch.float64)
    index = 1 - 2 * (values / total.clamp_min(1e-300)[:, None] * (d - rank + 0.5) / d).sum(1)
    return _where(total > 0, index)


def entropy(batch: Batch) -> Tensor:
    """Entropy of the shares of absolute relevance (Bhatt et al. 2020), in nats."""
    values = batch.maps.flatten(1).abs().double()
    total = values.sum(1)
    share = values / total.clamp_min(1e-300)[:, None]
    return _where(total > 0, -torch.xlogy(share, share).sum(1))


# ----------------------------------------------------------------------------------------- alignment, stability


def alignment(batch: Batch) -> Tensor:
    """|cosine| between map and image, both per location and centred: does the map look like the image?"""
    assert batch.explained is not None
    image = batch.explained.sum(1).flatten(1).double()
    maps = batch.maps.flatten(1).double()
    image, maps = (x - x.mean(1, keepdim=True) for x in (image, maps))
    sizes = image.norm(dim=1) * maps.norm(dim=1)
    return _where(sizes > 0, (image * maps).sum(1).abs() / sizes.clamp_min(1e-300))


def etmann_alignment(batch: Batch) -> Tensor:
    """|<x, g>| / |g| with g the gradient of the margin between the first two classes (Etmann et al. 2019, Def. 3),
    in [0, 1] pixels; for a linear binary model without bias the distance to the decision boundary."""
    assert batch.explained is not None

    def measure(images: Tensor) -> Tensor:
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            top = batch.evaluation(images).topk(2, dim=1).values
            gradient = torch.autograd.grad((top[:, 0] - top[:, 1]).sum(), images)[0]
        inner = (images.detach() * gradient).flatten(1).double().sum(1).abs()
        size = gradient.flatten(1).double().norm(dim=1)
        return _where(size > 0, inner / size.clamp_min(1e-300))

    return in_blocks(measure, batch.explained, block=batch.evaluation.block)


def completeness_error(batch: Batch) -> Tensor:
    """|sum of attributions - change of output|, as stored by the method."""
    assert batch.completeness is not None
    return batch.completeness.double()


def max_sensitivity(batch: Batch) -> Tensor:
    """Largest relative change of the attribution among noisy copies that keep the prediction (Yeh et al. 2019, eq. 3).

    Noise is uniform in a Linf ball of 0.02; an example of which no copy keeps its prediction has none (M6).
    """
    assert batch.explained is not None and batch.attribution is not None
    assert batch.saliency is not None and batch.target is not None
    worst = torch.full((len(batch.ids),), torch.nan, dtype=torch.float64, device=batch.ids.device)
    prediction = batch.evaluation.logits(batch.explained).argmax(1)
    size = batch.attribution.flatten(1).double().norm(dim=1)
    for draw in range(NOISE_DRAWS):
        noise = NORMS["linf"].start(batch.ids, tuple(batch.explained.shape[1:]), NOISE_RADIUS, seed=0, draw=draw)
        noisy = (batch.explained + noise).clamp(0, 1)
        kept = batch.evaluation.logits(noisy).argmax(1) == prediction
        again = explain(
            batch.evaluation, noisy, batch.target, batch.saliency, ids=batch.ids, background=batch.background
        ).attribution
        change = (again - batch.attribution).flatten(1).double().norm(dim=1) / size.clamp_min(1e-300)
        worst = torch.where(kept & (size > 0), torch.fmax(worst, change), worst)
    return worst


# -------------------------------------------------------------------------------------------------- inversions


def features_of(evaluation: Evaluation, images: Tensor) -> Tensor:
    """Features before the head, (N, D) float64."""
    with torch.no_grad():
        return in_blocks(lambda x: evaluation.features(x).flatten(1), images, block=evaluation.block).double()


def latent_error(batch: Batch) -> Tensor:
    """|R(inverted) - R(image)| / |R(image)| in the features before the head, per example (I1)."""
    assert batch.inverted is not None
    goal = features_of(batch.evaluation, batch.image)
    size = goal.norm(dim=1)
    return _where(size > 0, (features_of(batch.evaluation, batch.inverted) - goal).norm(dim=1) / size.clamp_min(1e-300))


def pixel_error(batch: Batch) -> Tensor:
    """Root mean square difference to the image, in [0, 1] pixels."""
    assert batch.inverted is not None
    return (batch.inverted.double() - batch.image.double()).flatten(1).square().mean(1).sqrt()


def low_frequency_error(batch: Batch) -> Tensor:
    """Root mean square difference after a blur of 4 pixels: layout and colour without detail."""
    assert batch.inverted is not None
    return (blurred(batch.inverted) - blurred(batch.image)).double().flatten(1).square().mean(1).sqrt()


def _window(size: int, device: torch.device) -> Tensor:
    offset = torch.arange(size, device=device, dtype=torch.float64) - (size - 1) / 2
    kernel = torch.exp(-0.5 * (offset / 1.5) ** 2)
    return kernel / kernel.sum()


def ssim(batch: Batch) -> Tensor:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 pixels and sigma 1.5, valid region, channel mean."""
    assert batch.inverted is not None
    a, b = (x.double().flatten(0, 1)[:, None] for x in (batch.image, batch.inverted))
    size = min(11, a.shape[2] - (a.shape[2] + 1) % 2, a.shape[3] - (a.shape[3] + 1) % 2)
    line = _window(size, a.device)
    kernel = (line[:, None] * line[None, :])[None, None]

    def smooth(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel)

    ma, mb = smooth(a), smooth(b)
    va, vb, cov = smooth(a * a) - ma * ma, smooth(b * b) - mb * mb, smooth(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    index = ((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return index.flatten(1).mean(1).reshape(len(batch.image), -1).mean(1)


def judge_accuracy(batch: Batch) -> Tensor:
    """1 where an independent model sees the label in the inverted or generated image (I9)."""
    assert batch.inverted is not None and batch.judge is not None and batch.label is not None
    return (batch.judge.logits(batch.inverted).argmax(1) == batch.label).double()


def own_accuracy(batch: Batch) -> Tensor:
    """1 where the model itself sees the label in the inverted or generated image."""
    assert batch.inverted is not None and batch.label is not None
    return (batch.evaluation.logits(batch.inverted).argmax(1) == batch.label).double()


# ------------------------------------------------------------------------------------------------ chance bands


def reference_maps(batch: Batch) -> dict[str, Tensor]:
    """Maps that know nothing of the model, of the same images: the chance band. `oracle` where there is a mask.

    Shapes: each (N, H, W).
    """
    assert batch.explained is not None
    n, _, height, width = batch.explained.shape
    grey = batch.explained.mean(1)
    rows = torch.linspace(-1, 1, height, device=grey.device)[:, None]
    columns = torch.linspace(-1, 1, width, device=grey.device)[None, :]
    maps = {
        "random": random.normal(batch.ids, (height, width), seed=0, purpose="random map").abs(),
        "edges": _sobel(grey),
        "magnitude": (grey - grey.mean((1, 2), keepdim=True)).abs(),
        "centre": torch.exp(-2 * (rows**2 + columns**2)).expand(n, height, width),
    }
    if batch.mask is not None:
        maps["oracle"] = batch.mask.to(grey.dtype)
    return maps


def _sobel(grey: Tensor) -> Tensor:
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=grey.device)
    weights = torch.stack([kernel, kernel.T])[:, None]
    edges = F.conv2d(F.pad(grey[:, None], (1, 1, 1, 1), mode="replicate"), weights)
    return edges.square().sum(1).sqrt()


# ------------------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Entry:
    """A line of the table: the function and what a reader of the number must know.

    needs: attributes of the batch that must be there. kind: of the stream. share: 0/1 per example (Wilson interval).
    band: whether the metric is also computed on reference maps.
    """

    function: Metric
    kind: str
    unit: str
    better: str
    source: str
    needs: tuple[str, ...] = ()
    share: bool = False
    band: bool = False


_MAP = ("attribution", "explained", "target")
METRICS: dict[str, Entry] = {
    "clean_accuracy": Entry(clean_accuracy, "any", "share", "higher", "-", ("label",), share=True),
    "robust_accuracy": Entry(robust_accuracy, "adversarial", "share", "higher", "Madry et al. 2018", ("label", "adversarial"), share=True),
    "robust_accuracy_png": Entry(robust_accuracy_png, "adversarial", "share", "higher", "-", ("label", "adversarial", "eps"), share=True),
    "target_rate": Entry(target_rate, "adversarial", "share", "lower", "-", ("attack_target",), share=True),
    "ties": Entry(ties, "adversarial", "share", "lower", "-", ("label", "adversarial"), share=True),
    "perturbation": Entry(perturbation, "adversarial", "pixels", "lower", "-", ("adversarial",)),
    "ball_violation": Entry(ball_violation, "adversarial", "share", "lower", "-", ("adversarial", "eps"), share=True),
    "insertion": Entry(insertion, "attributions", "probability", "higher", "Petsiuk et al. 2018", _MAP, band=True),
    "deletion": Entry(deletion, "attributions", "probability", "lower", "Petsiuk et al. 2018", _MAP, band=True),
    "insertion_mean": Entry(insertion_mean, "attributions", "probability", "higher", "Petsiuk et al. 2018", _MAP, band=True),
    "deletion_mean": Entry(deletion_mean, "attributions", "probability", "lower", "Petsiuk et al. 2018", _MAP, band=True),
    "relevance_mass": Entry(relevance_mass, "attributions", "share", "higher", "Arras et al. 2022", (*_MAP, "mask"), band=True),
    "relevance_rank": Entry(relevance_rank, "attributions", "share", "higher", "Arras et al. 2022", (*_MAP, "mask"), band=True),
    "pointing_game": Entry(pointing_game, "attributions", "share", "higher", "Zhang et al. 2018", (*_MAP, "mask"), band=True),
    "gini": Entry(gini, "attributions", "index", "higher", "Chalasani et al. 2020", _MAP, band=True),
    "entropy": Entry(entropy, "attributions", "nats", "lower", "Bhatt et al. 2020", _MAP, band=True),
    "alignment": Entry(alignment, "attributions", "cosine", "higher", "after Etmann et al. 2019", _MAP, band=True),
    "etmann_alignment": Entry(etmann_alignment, "attributions", "pixels", "higher", "Etmann et al. 2019", ("explained",)),
    "completeness_error": Entry(completeness_error, "attributions", "output", "lower", "Sundararajan et al. 2017", ("completeness",)),
    "max_sensitivity": Entry(max_sensitivity, "attributions", "relative", "lower", "Yeh et al. 2019", (*_MAP, "saliency")),
    "latent_error": Entry(latent_error, "inversions", "relative", "lower", "Engstrom et al. 2019", ("inverted", "fit")),
    "pixel_error": Entry(pixel_error, "inversions", "pixels", "lower", "-", ("inverted", "fit")),
    "low_frequency_error": Entry(low_frequency_error, "inversions", "pixels", "lower", "-", ("inverted", "fit")),
    "ssim": Entry(ssim, "inversions", "index", "higher", "Wang et al. 2004", ("inverted", "fit")),
    "own_accuracy": Entry(own_accuracy, "inversions", "share", "higher", "-", ("inverted", "label"), share=True),
    "judge_accuracy": Entry(judge_accuracy, "inversions", "share", "higher", "-", ("inverted", "label", "judge"), share=True),
}  # fmt: skip


def applicable(kind: str, batch: Batch) -> list[str]:
    """Names of the metrics for a kind of stream that this batch has everything for."""
    found = []
    for name, entry in METRICS.items():
        if entry.kind in ("any", kind) and all(getattr(batch, need) is not None for need in entry.needs):
            found.append(name)
    return found


def evaluate(batch: Batch, names: list[str]) -> dict[str, Tensor]:
    """Values per example, float64 (N,), by metric name."""
    return {name: METRICS[name].function(batch).double() for name in names}


def chance(batch: Batch, names: list[str]) -> dict[str, Tensor]:
    """Values of the banded metrics on the reference maps, under `metric@reference`; they do not depend on the method."""
    columns = {}
    for reference, maps in reference_maps(batch).items():
        other = batch.with_maps(maps)
        for name in names:
            columns[f"{name}@{reference}"] = METRICS[name].function(other).double()
    return columns
