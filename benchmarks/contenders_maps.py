"""Attributions by us, by captum and by shap."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from bed import Bed, Setting, own_floors
from harness import Group, Work
from torch import Tensor, nn

from rbkit.tools.attribution import Saliency
from rbkit.tools.saliency import explain
from rbkit.tools.shapley import grid

REPEATS = 32  # of each kind of pass, for floors: as long as the maps take
POINTS = 50  # of a path, and background draws
WINDOW, STRIDE = 8, 4  # of occlusion, in pixels
WALKS, PLAYERS = 10, 64  # of permutation Shapley values: permutations walked both ways, blocks of pixels
Peer = Callable[[Bed, nn.Module], None]


def ours(place: Bed, method: str) -> None:
    """As rb-saliency makes them."""
    samples = WALKS if method == "permutation-shap" else POINTS
    spec = Saliency(method, steps=POINTS, samples=samples, window=WINDOW, stride=STRIDE, masker="black", players=8)
    explain(place.best, place.images, place.labels, spec, ids=place.ids, background=place.background)


def captum_ig(place: Bed, net: nn.Module) -> None:
    """captum's integrated gradients by the trapezoid rule, 64 points at a time; its n points are n - 1 of our intervals."""
    from captum.attr import IntegratedGradients

    IntegratedGradients(net).attribute(
        place.images, target=place.labels, n_steps=POINTS + 1, method="riemann_trapezoid", internal_batch_size=64
    )


@torch.no_grad()
def captum_occlusion(place: Bed, net: nn.Module) -> None:
    """captum's occlusion on the same windows, one at a time, of which its batch is made."""
    from captum.attr import Occlusion

    Occlusion(net).attribute(
        place.images, (3, WINDOW, WINDOW), (3, STRIDE, STRIDE), 0, place.labels, perturbations_per_eval=1
    )


def shap_permutation(place: Bed, net: nn.Module) -> None:
    """shap's permutations, image by image, 64 coalitions at a time; a function composes the images of a batch."""
    import shap

    players = grid(Saliency("permutation-shap"), 32, 32, default=8)
    for image, goal in zip(place.images, place.labels.tolist(), strict=True):

        @torch.no_grad()
        def play(kept: np.ndarray, image: Tensor = image, goal: int = goal) -> np.ndarray:
            shown = image * torch.from_numpy(np.asarray(kept, dtype=np.float32))[:, players][:, None]
            return net(shown)[:, goal].double().numpy()

        explainer = shap.explainers.Permutation(play, np.zeros((1, PLAYERS)), seed=0)
        explainer(np.ones((1, PLAYERS)), max_evals=WALKS * (2 * PLAYERS + 1), silent=True, batch_size=64)


@torch.no_grad()
def captum_shapley(place: Bed, net: nn.Module) -> None:
    """captum's Shapley values, which know no reverse: as many permutations as we walk forth and back, 64 rows at a time."""
    from captum.attr import ShapleyValueSampling

    players = grid(Saliency("permutation-shap"), 32, 32, default=8)
    ShapleyValueSampling(net).attribute(
        place.images, 0, place.labels, feature_mask=players[None, None], n_samples=2 * WALKS,
        perturbations_per_eval=64 // len(place.images),
    )  # fmt: skip


def captum_shap(place: Bed, net: nn.Module) -> None:
    """captum's GradientShap, 16 images at a time."""
    from captum.attr import GradientShap

    method = GradientShap(net)
    for images, labels in zip(place.images.split(16), place.labels.split(16), strict=True):
        method.attribute(images, baselines=place.background, n_samples=POINTS, target=labels)


def shap_gradient(place: Bed, net: nn.Module) -> None:
    """shap's GradientExplainer of the highest output."""
    import shap

    explainer = shap.GradientExplainer(net, place.background, batch_size=64)
    explainer.shap_values(place.images, nsamples=POINTS, ranked_outputs=1)


def map_group(
    place: Bed,
    title: str,
    method: str,
    peers: dict[str, Peer],
    *,
    few: int | None = None,
    rounds: int | None = None,
    asked: str = "",
) -> Group:
    """An attribution by us and by peers: on the network as their user has it, and on ours in our process, which leaves the
    harnesses alone. A method that takes thousands of passes gets a `few` of the images; its floor is that of full blocks."""
    floors = own_floors(place, repeats=REPEATS)
    place = place if few is None else place.few(few)
    work: dict[str, Work] = {"rbkit": functools.partial(ours, place, method)}
    work |= {f"{name}, our network": functools.partial(peer, place, place.best) for name, peer in peers.items()}
    theirs: dict[str, Work] = {name: functools.partial(peer, place, place.plain) for name, peer in peers.items()}
    return Group(f"{title}, resnet8", len(place.images), work, theirs, rounds=rounds, asked=asked, **floors)


def maps(setting: Setting) -> Iterator[Group]:
    """On one block of images; Shapley values, which take a thousand passes each, of a few."""
    place = setting.bed("robust", setting.size(64))
    yield map_group(
        place, f"Integrated gradients, {POINTS} intervals", "ig", {"captum": captum_ig},
        asked="95 % of the floor, and 1.5 times the speed of captum",
    )  # fmt: skip
    gradient_shap: dict[str, Peer] = {"captum GradientShap": captum_shap, "shap GradientExplainer": shap_gradient}
    yield map_group(
        place, f"Expected gradients, {POINTS} samples", "shap", gradient_shap, rounds=7,
        asked="95 % of the floor, 1.5 times the speed of captum, 1.7 times that of shap",
    )  # fmt: skip
    yield map_group(
        place, f"Occlusion, windows of {WINDOW}, stride {STRIDE}", "occlusion", {"captum": captum_occlusion}
    )
    shapley: dict[str, Peer] = {"shap": shap_permutation, "captum": captum_shapley}
    title = f"Permutation Shapley values, {PLAYERS} players, {WALKS} permutations both ways"
    yield map_group(place, title, "permutation-shap", shapley, few=2 if setting.quick else 8, rounds=3)
