"""Stability: how far a map moves while the prediction stays, under noise and under an attack on the map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rbkit.tools.attribution import output_of
from rbkit.tools.batch import Batch, defined, reduce_channels
from rbkit.tools.infidelity import GRADIENTS
from rbkit.tools.models import Evaluation, copied, in_blocks, twice_differentiable
from rbkit.tools.norms import NORMS

NOISE_RADIUS = 0.02  # Linf, in [0, 1] pixels: the same for all models, and for the attack
NOISE_DRAWS = 2
ATTACK_STEPS = 10
SHARPNESS = 10.0  # of the softplus that stands for ReLU while the attack climbs
TOP = 0.1  # share of the locations that count as the highest


def _change(batch: Batch, again: Tensor) -> Tensor:
    """Relative change of the attribution to another one (N, C, H, W), float64 (N,); NaN where it was zero."""
    assert batch.attribution is not None
    size = batch.attribution.flatten(1).double().norm(dim=1)
    moved = (again - batch.attribution).flatten(1).double().norm(dim=1)
    return defined(size > 0, moved / size.clamp_min(1e-300))


def _noisy(batch: Batch, draw: int) -> Tensor:
    assert batch.explained is not None
    shape = tuple(batch.explained.shape[1:])

    def noise(ids: Tensor) -> Tensor:
        return NORMS["linf"].start(ids, shape, NOISE_RADIUS, seed=0, draw=draw)

    # Not in lanes: of so many short steps each would wait for the interpreter, which the other holds.
    drawn = in_blocks(noise, batch.ids, block=batch.evaluation.block)
    return drawn.add_(batch.explained).clamp_(0, 1)


def _predicted(batch: Batch, images: Tensor) -> Tensor:
    return batch.evaluation.logits(images).argmax(1)


def max_sensitivity(batch: Batch) -> Tensor:
    """Largest relative change of the attribution among noisy copies that keep the prediction (Yeh et al. 2019, eq. 3).

    Noise is uniform in a Linf ball of 0.02; an example of which no copy keeps its prediction has none.
    """
    assert batch.explained is not None
    if "noise" not in batch.own:
        worst = torch.full((len(batch.ids),), torch.nan, dtype=torch.float64, device=batch.ids.device)
        prediction = batch.explained_logits.argmax(1)
        for draw in range(NOISE_DRAWS):
            noisy = _noisy(batch, draw)
            again = batch.explanation(noisy)
            kept = (_predicted(batch, noisy) if again.prediction is None else again.prediction) == prediction
            worst = torch.where(kept, torch.fmax(worst, _change(batch, again.attribution)), worst)
        batch.own["noise"] = worst
    return batch.own["noise"]


def softened(evaluation: Evaluation) -> Evaluation:
    """A copy with softplus for ReLU modules, so that its gradient has a gradient (Dombrowski et al. 2019).

    Where ReLU is no module the ascent has no direction, and the attack is no more than one noisy copy.
    """
    changed = copied(evaluation)
    for parent in list(changed.model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Softplus(beta=SHARPNESS))
    return changed


def _surrogate(evaluation: Evaluation, images: Tensor, target: Tensor, batch: Batch) -> Tensor:
    """Gradient of the output, times the image for methods that tell contributions; can be differentiated again."""
    assert batch.saliency is not None
    with twice_differentiable():
        total = output_of(evaluation(images), target, batch.output).sum()
    gradient = torch.autograd.grad(total, images, create_graph=True)[0]
    return gradient if batch.saliency.method in GRADIENTS else gradient * images


def _uphill(batch: Batch, soft: Evaluation, images: Tensor) -> Tensor:
    """Sign of the gradient of the surrogate map's squared change; 0 where that does not depend on the image."""
    assert batch.explained is not None and batch.target is not None

    @torch.enable_grad()
    def measure(moved: Tensor, clean: Tensor, target: Tensor) -> Tensor:
        goal = _surrogate(soft, clean.detach().requires_grad_(), target, batch).detach()
        moved = moved.detach().requires_grad_()
        change = (_surrogate(soft, moved, target, batch) - goal).square().sum()
        if not change.requires_grad:  # a linear model: its gradient is one and the same everywhere
            return torch.zeros_like(moved)
        found = torch.autograd.grad(change, moved, allow_unused=True)[0]
        return torch.zeros_like(moved) if found is None else found.sign()

    return in_blocks(measure, images, batch.explained, batch.target, block=batch.evaluation.block)


def attacked(batch: Batch) -> Tensor:
    """Images in the Linf ball of 0.02 that keep the prediction and whose maps an ascent has moved away, (N, C, H, W).

    Sign steps on the surrogate map of a softened copy, from a noisy start (Ghorbani et al. 2019); a step that changes
    the true model's prediction is not taken and halves the next one. The result is a lower bound of what is possible.
    """
    assert batch.explained is not None
    if "attacked" not in batch.own:
        clean, prediction, soft = batch.explained, batch.explained_logits.argmax(1), softened(batch.evaluation)

        def keep(fresh: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
            kept = (_predicted(batch, fresh) == prediction)[:, None, None, None]
            return torch.where(kept, fresh, old), kept

        moved, _ = keep(clean + 0.1 * (_noisy(batch, NOISE_DRAWS) - clean), clean)
        moved, _ = keep(_noisy(batch, NOISE_DRAWS), moved)
        step = torch.full_like(clean[:, :1, :1, :1], NOISE_RADIUS / 4)
        for _ in range(ATTACK_STEPS):
            offset = moved + step * _uphill(batch, soft, moved) - clean
            fresh = (clean + offset.clamp(-NOISE_RADIUS, NOISE_RADIUS)).clamp(0, 1)
            moved, kept = keep(fresh, moved)
            step = torch.where(kept, step, step / 2)
        batch.own["attacked"] = moved
    return batch.own["attacked"]


def attack_sensitivity(batch: Batch) -> Tensor:
    """Largest relative change of the attribution under an attack on the map that keeps the prediction, Linf 0.02
    (Ghorbani et al. 2019; softplus for ReLU in the ascent alone, Dombrowski et al. 2019), or under noise.

    Never below max_sensitivity, whose noisy copies are candidates too.
    """
    return torch.fmax(_change(batch, batch.explain_again(attacked(batch))), max_sensitivity(batch))


def attack_overlap(batch: Batch) -> Tensor:
    """Share of the highest tenth of the locations of the absolute map that stay the highest under the same attack
    (top-k intersection, Ghorbani et al. 2019)."""
    count = max(1, round(TOP * batch.maps[0].numel()))

    def highest(maps: Tensor) -> Tensor:
        values = maps.abs().flatten(1)
        order = values.argsort(dim=1, descending=True, stable=True)[:, :count]
        return torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, True)

    again = reduce_channels(batch.explain_again(attacked(batch)), signed=batch.signed)
    return (highest(batch.maps) & highest(again)).sum(1).double() / count
