"""Wall time of attributions against captum and shap: one process, one thread, interleaved, medians of 5.

python benchmarks/saliency.py prints the rows of the tables of benchmarks/SALIENCY.md. Each peer runs twice: on the network as its user
has it, and on ours (BatchNorm folded, channels last), which leaves the difference of the two harnesses alone.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor, nn

from rbkit.tools.architectures import build
from rbkit.tools.models import Classifier, Evaluation
from rbkit.tools.saliency import Saliency, explain
from rbkit.tools.shapley import grid

ROUNDS, BLOCK = 5, 64
WINDOW, STRIDE, STEPS, DRAWS, PLAYERS = 8, 4, 50, 10, 64


def occlusions(net: nn.Module, images: Tensor, target: Tensor, together: int) -> Tensor:
    """captum's, on the same windows, none of which is cut."""
    from captum.attr import Occlusion

    with torch.no_grad():
        return Occlusion(net).attribute(
            images, (3, WINDOW, WINDOW), (3, STRIDE, STRIDE), 0, target, perturbations_per_eval=together
        )


def path(net: nn.Module, images: Tensor, target: Tensor, rows: int | None) -> Tensor:
    """captum's integrated gradients by the trapezoid rule; its n points are n - 1 of our intervals."""
    from captum.attr import IntegratedGradients

    return IntegratedGradients(net).attribute(
        images, target=target, n_steps=STEPS + 1, method="riemann_trapezoid", internal_batch_size=rows
    )


def sampled(net: nn.Module, images: Tensor, target: Tensor, players: Tensor, together: int) -> Tensor:
    """captum's Shapley values: as many permutations as we walk, forth and back."""
    from captum.attr import ShapleyValueSampling

    with torch.no_grad():
        return ShapleyValueSampling(net).attribute(
            images, 0, target, feature_mask=players[None, None], n_samples=2 * DRAWS, perturbations_per_eval=together
        )


def permuted(net: nn.Module, images: Tensor, target: Tensor, players: Tensor, rows: int | None) -> Tensor:
    """shap's permutations, image by image; a function composes the images of a batch of coalitions."""
    import shap

    found = []
    for image, goal in zip(images, target.tolist(), strict=True):

        @torch.no_grad()
        def play(kept: np.ndarray, image: Tensor = image, goal: int = goal) -> np.ndarray:
            shown = image * torch.from_numpy(np.asarray(kept, dtype=np.float32))[:, players][:, None]
            return net(shown)[:, goal].double().numpy()

        explainer = shap.explainers.Permutation(play, np.zeros((1, PLAYERS)), seed=0)
        batch = {} if rows is None else {"batch_size": rows}
        values = explainer(np.ones((1, PLAYERS)), max_evals=DRAWS * (2 * PLAYERS + 1), silent=True, **batch).values[0]
        found.append(torch.from_numpy(values))
    return torch.stack(found)


def timed(runs: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float, float]]:
    """Median, least and largest seconds of each, in turns, after one turn to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: (statistics.median(t), min(t), max(t)) for name, t in taken.items()}


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = Classifier(build("resnet8", num_classes=10), mean=[0.5] * 3, std=[0.25] * 3).eval().requires_grad_(False)
    judged = Evaluation(plain, block=BLOCK)
    nets: dict[str, nn.Module] = {"": plain, ", our network": judged}
    players = grid(Saliency("permutation-shap"), 32, 32, default=8)

    def ours(method: str, images: Tensor, target: Tensor) -> Callable[[], object]:
        spec = Saliency(method, steps=STEPS, samples=DRAWS, window=WINDOW, stride=STRIDE, masker="black", players=8)
        return lambda: explain(judged, images, target, spec, ids=torch.arange(len(images)))

    few, many = torch.rand(8, 3, 32, 32), torch.rand(32, 3, 32, 32)
    target = torch.arange(32) % 10
    tables: dict[str, dict[str, Callable[[], object]]] = {
        "occlusion": {"rbkit": ours("occlusion", many, target)},
        "ig": {"rbkit": ours("ig", many, target)},
        "permutation-shap": {"rbkit": ours("permutation-shap", few, target[:8])},
    }
    for label, net in nets.items():
        tables["occlusion"] |= {
            f"captum, 1 window at a time{label}": lambda net=net: occlusions(net, many, target, 1),
            f"captum, 2 windows at a time{label}": lambda net=net: occlusions(net, many, target, 2),
        }
        tables["ig"] |= {
            f"captum, all points at once{label}": lambda net=net: path(net, many, target, None),
            f"captum, 64 rows at a time{label}": lambda net=net: path(net, many, target, 64),
        }
        tables["permutation-shap"] |= {
            f"shap{label}": lambda net=net: permuted(net, few, target[:8], players, None),
            f"shap, batches of 64{label}": lambda net=net: permuted(net, few, target[:8], players, 64),
            f"captum, 1 coalition at a time{label}": lambda net=net: sampled(net, few, target[:8], players, 1),
            f"captum, 8 coalitions at a time{label}": lambda net=net: sampled(net, few, target[:8], players, 8),
        }
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "captum", "shap")))
    for method, runs in tables.items():
        found = timed(runs)
        own = found["rbkit"][0]
        for name, (middle, low, high) in found.items():
            print(f"| {method} | {name} | {middle:.2f} ({low:.2f} to {high:.2f}) | {middle / own:.2f} |", flush=True)


if __name__ == "__main__":
    main()
