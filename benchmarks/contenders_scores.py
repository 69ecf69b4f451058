"""Metrics of attributions by us, by Quantus and by captum, each against the floor of the passes that it makes."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import quantus
import torch
from bed import Bed, Setting, own_floors
from harness import Group, Work
from torch import Tensor, nn

from rbkit.formats.chunk import ROWS
from rbkit.tools.attribution import Saliency
from rbkit.tools.batch import Batch
from rbkit.tools.infidelity import SQUARES, squares
from rbkit.tools.metrics import evaluate
from rbkit.tools.saliency import explain

# Parameters by which Quantus makes about as many passes as we: 24 points, the nearest that it takes, for our 20 of two curves
# with common ends; 2 noisy copies; 2 times 16 blocks of 8 x 8 for 32 squares.
QUANTUS = {
    "deletion_mean": functools.partial(quantus.PixelFlipping, features_in_step=128, perturb_baseline="mean"),
    "max_sensitivity": functools.partial(quantus.MaxSensitivity, nr_samples=2),
    "infidelity": functools.partial(
        quantus.Infidelity, perturb_patch_sizes=[8], n_perturb_samples=2, perturb_baseline="mean"
    ),
}

ASKED = dict.fromkeys(QUANTUS, "90 % of the floor, and 1.7 times the speed of Quantus for as many passes")
ASKED["infidelity"] = "1.3 times the speed of Quantus for as many passes"


def ours(place: Bed, name: str) -> None:
    """A metric as rb-score computes it, of gradient maps, which are made too."""
    spec = Saliency("gradient")
    found = explain(place.best, place.images, place.labels, spec, ids=place.ids)
    judged = Batch(
        place.best, place.ids, place.images, explained=place.images, target=place.labels, saliency=spec,
        attribution=found.attribution,
    )  # fmt: skip
    evaluate(judged, [name])


def gradients(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The maps."""
    x = images.detach().requires_grad_()
    return torch.autograd.grad(net(x).gather(1, labels[:, None]).sum(), x)[0]


def by_quantus(place: Bed, name: str) -> None:
    """The same by Quantus."""

    def maps(model: nn.Module, inputs: object, targets: object, **_: object) -> object:
        found = gradients(place.plain, torch.as_tensor(inputs).float(), torch.as_tensor(targets).long())
        return found.sum(1, keepdim=True).numpy()

    QUANTUS[name](disable_warnings=True, normalise=False)(
        model=place.plain, x_batch=place.images.numpy(), y_batch=place.labels.numpy(), a_batch=None, explain_func=maps,
        device="cpu", batch_size=64, channel_first=True, softmax=True,
    )  # fmt: skip


def captum_infidelity(place: Bed, net: nn.Module) -> None:
    """captum's infidelity on our squares, 64 images at a time."""
    from captum.metrics import infidelity

    mean = place.plain.mean.clamp(0, 1)
    removed = squares(place.ids, 32, 32).reshape(len(place.images), SQUARES, 1, 32, 32)
    draws = iter(range(SQUARES))

    def perturb(images: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        gone = removed[:, next(draws)]
        return torch.where(gone, images - mean, 0), torch.where(gone, mean, images)

    maps = gradients(net, place.images, place.labels)
    infidelity(
        net, perturb, place.images, maps, target=place.labels, n_perturb_samples=SQUARES,
        max_examples_per_batch=len(place.images),
    )  # fmt: skip


def scores(setting: Setting) -> Iterator[Group]:
    """On as many images as rb-score takes from a file at a time; what each makes of passes is counted in the round before."""
    place = setting.bed("robust", setting.size(ROWS))
    titles = {"deletion_mean": "Pixel flipping (deletion to the mean colour)", "max_sensitivity": "Max-sensitivity"}
    for name, title in (titles | {"infidelity": "Infidelity"}).items():
        work: dict[str, Work] = {"rbkit": functools.partial(ours, place, name)}
        peers: dict[str, Work] = {"Quantus": functools.partial(by_quantus, place, name)}
        if name == "infidelity":
            peers["captum"] = functools.partial(captum_infidelity, place, place.plain)
            work["captum, our network"] = functools.partial(captum_infidelity, place, place.best)
        yield Group(f"{title}, resnet8", len(place.images), work, peers, asked=ASKED[name], **own_floors(place))
