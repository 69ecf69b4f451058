"""Our tools, the commands that wrap them, and other libraries, side by side on one model: `make bench`.

Every group of contenders does the same work. They take turns within a round, so that a machine that drifts is unfair to
none; the table gives the median, its spread, and the share of the floor: the time of the model's own passes in the best
form (BatchNorm folded, channels-last, frozen), which no method can beat. A peer that is not installed, or fails, says so.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rbkit.tools import examples, shapes, train
from rbkit.tools.architectures import resnet8, resnet18
from rbkit.tools.ascend import Batch, polling
from rbkit.tools.attack import pgd, run
from rbkit.tools.batch import Batch as Judged
from rbkit.tools.examples import Data, as_float
from rbkit.tools.metrics import evaluate
from rbkit.tools.models import Classifier, Evaluation
from rbkit.tools.recipe import Recipe
from rbkit.tools.saliency import Saliency, explain
from rbkit.tools.shapley import grid

PEERS = ("torchattacks", "foolbox", "adversarial-robustness-toolbox", "captum", "shap", "quantus")
NORM, EPS, STEPS = "l2", 0.5, 20
LINF = 8 / 255
POINTS = 50  # of a path, and background draws
WINDOW, STRIDE = 8, 4  # of occlusion, in pixels
WALKS, PLAYERS = 10, 64  # of permutation Shapley values: permutations walked both ways, blocks of pixels


@dataclass
class Bed:
    """A model in the form that peers get and in ours, images (N, 3, 32, 32) in [0, 1] with labels, and background."""

    plain: Classifier
    best: Evaluation
    images: Tensor
    labels: Tensor
    ids: Tensor
    background: Tensor
    data: Data


@dataclass
class Group:
    """Contenders for one piece of work: name to function; passes: forward and input-gradient pairs per image."""

    title: str
    passes: int
    images: int
    contenders: dict[str, Callable[[], object]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def bed(*, arch: str, count: int, epochs: int) -> Bed:
    """A model trained on shapes (a fresh resnet18) and `count` test images."""
    ids = torch.arange(1500)
    drawn = shapes.generate(ids, seed=0, split="train")
    data = Data(drawn["image"], drawn["label"], ids)
    with train.seeded(0):
        net = resnet8(num_classes=8) if arch == "resnet8" else resnet18(num_classes=8)
    mean, std = examples.statistics(data.image)
    recipe = Recipe(epochs=epochs, batch=32, method="pgd", eps=EPS, steps=2, step_size=EPS, augment="none")
    state = train.begin(Classifier(net, mean=mean, std=std), recipe)
    list(train.fit(state, data, None, recipe))
    test = shapes.generate(torch.arange(count), seed=0, split="test")
    plain = state.classifier.eval().requires_grad_(False)
    return Bed(
        plain, Evaluation(plain), as_float(test["image"]), test["label"], torch.arange(count),
        as_float(data.image[:100]), data,
    )  # fmt: skip


def floor(place: Bed, passes: int) -> None:
    """`passes` forward and input-gradient passes of all images, in blocks of 64, and nothing else."""
    for images, labels in zip(place.images.split(64), place.labels.split(64), strict=True):
        for _ in range(passes):
            x = images.detach().requires_grad_()
            torch.autograd.grad(place.best(x).gather(1, labels[:, None]).sum(), x)


# ------------------------------------------------------------------------------------------------------ attacks


def ours_attack(place: Bed, *, norm: str, eps: float, until: str) -> None:
    """PGD as rb-attack does it."""
    spec = pgd(norm=norm, eps=eps, steps=STEPS, until=until)
    list(run(place.best, spec, polling([Batch(place.ids, place.images, {"label": place.labels})])))


def torchattacks_pgd(place: Bed, *, norm: str, eps: float) -> None:
    """torchattacks' PGD, in blocks of 64."""
    import torchattacks

    kind = torchattacks.PGDL2 if norm == "l2" else torchattacks.PGD
    attack = kind(place.plain, eps=eps, alpha=2.5 * eps / STEPS, steps=STEPS, random_start=True)
    for images, labels in zip(place.images.split(64), place.labels.split(64), strict=True):
        attack(images, labels)


def foolbox_pgd(place: Bed, *, norm: str, eps: float) -> None:
    """foolbox' PGD, in blocks of 64."""
    import foolbox

    model = foolbox.PyTorchModel(place.plain, bounds=(0, 1))
    kind = foolbox.attacks.L2ProjectedGradientDescentAttack if norm == "l2" else foolbox.attacks.LinfPGD
    attack = kind(abs_stepsize=2.5 * eps / STEPS, steps=STEPS, random_start=True)
    for images, labels in zip(place.images.split(64), place.labels.split(64), strict=True):
        attack(model, images, labels, epsilons=[eps])


def art_pgd(place: Bed, *, norm: str, eps: float) -> None:
    """The Adversarial Robustness Toolbox' PGD, in blocks of 64."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    model = PyTorchClassifier(
        place.plain, nn.CrossEntropyLoss(), tuple(place.images.shape[1:]), 8, clip_values=(0, 1), device_type="cpu"
    )
    attack = ProjectedGradientDescentPyTorch(
        model, norm=2 if norm == "l2" else "inf", eps=eps, eps_step=2.5 * eps / STEPS, max_iter=STEPS,
        num_random_init=1, batch_size=64, verbose=False,
    )  # fmt: skip
    attack.generate(place.images.numpy(), place.labels.numpy())


def captum_pgd(place: Bed, *, norm: str, eps: float) -> None:
    """captum's PGD, in blocks of 64."""
    from captum.robust import PGD

    attack = PGD(place.plain, lower_bound=0, upper_bound=1)
    for images, labels in zip(place.images.split(64), place.labels.split(64), strict=True):
        attack.perturb(
            images, radius=eps, step_size=2.5 * eps / STEPS, step_num=STEPS, target=labels, random_start=True,
            norm="L2" if norm == "l2" else "Linf",
        )  # fmt: skip


def attack_group(place: Bed, title: str, *, norm: str, eps: float) -> Group:
    """PGD with all of its steps; ours also as it is by default, where broken images leave."""
    bound = functools.partial
    return Group(f"PGD-{STEPS} {title}", STEPS, len(place.images), {
        "rbkit, all steps": bound(ours_attack, place, norm=norm, eps=eps, until="end"),
        "rbkit, until broken (default)": bound(ours_attack, place, norm=norm, eps=eps, until="broken"),
        "torchattacks": bound(torchattacks_pgd, place, norm=norm, eps=eps),
        "foolbox": bound(foolbox_pgd, place, norm=norm, eps=eps),
        "ART": bound(art_pgd, place, norm=norm, eps=eps),
        "captum": bound(captum_pgd, place, norm=norm, eps=eps),
    })  # fmt: skip


# ------------------------------------------------------------------------------------------------------ training


def ours_training(place: Bed) -> None:
    """One epoch of PGD-7 training, as rb-train does it."""
    recipe = Recipe(epochs=1, batch=64, method="pgd", eps=EPS, steps=7, step_size=2.5 * EPS / 7, augment="none")
    with train.seeded(0):
        net = resnet8(num_classes=8)
    data = place.data.rows(torch.arange(len(place.images)))
    classifier = Classifier(net, mean=[0.5] * 3, std=[0.25] * 3).to(memory_format=torch.channels_last)
    train.train_epoch(train.begin(classifier, recipe), data, recipe)


def plain_training(place: Bed) -> None:
    """The same with torchattacks' PGD in the usual loop."""
    import torchattacks

    with train.seeded(0):
        model = Classifier(resnet8(num_classes=8), mean=[0.5] * 3, std=[0.25] * 3)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    attack = torchattacks.PGDL2(model, eps=EPS, alpha=2.5 * EPS / 7, steps=7)
    data = place.data.rows(torch.arange(len(place.images)))
    for images, labels in zip(as_float(data.image).split(64), data.label.split(64), strict=True):
        moved = attack(images, labels)
        model.train()
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(moved), labels).backward()
        optimiser.step()


# --------------------------------------------------------------------------------------------------- attributions


def ours_maps(place: Bed, method: str, count: int) -> None:
    """Attributions as rb-saliency makes them."""
    samples = WALKS if method == "permutation-shap" else POINTS
    spec = Saliency(method, steps=POINTS, samples=samples, window=WINDOW, stride=STRIDE, masker="black", players=8)
    explain(
        place.best, place.images[:count], place.labels[:count], spec, ids=place.ids[:count], background=place.background
    )


def captum_ig(place: Bed, net: nn.Module, count: int) -> None:
    """captum's integrated gradients by the trapezoid rule, 64 points at a time; its n points are n - 1 of our intervals."""
    from captum.attr import IntegratedGradients

    IntegratedGradients(net).attribute(
        place.images[:count], target=place.labels[:count], n_steps=POINTS + 1, method="riemann_trapezoid",
        internal_batch_size=64,
    )  # fmt: skip


@torch.no_grad()
def captum_occlusion(place: Bed, net: nn.Module, count: int) -> None:
    """captum's occlusion on the same windows, one at a time, of which its batch is made."""
    from captum.attr import Occlusion

    Occlusion(net).attribute(
        place.images[:count],
        (3, WINDOW, WINDOW),
        (3, STRIDE, STRIDE),
        0,
        place.labels[:count],
        perturbations_per_eval=1,
    )


def shap_permutation(place: Bed, net: nn.Module, count: int) -> None:
    """shap's permutations, image by image, 64 coalitions at a time; a function composes the images of a batch."""
    import shap

    players = grid(Saliency("permutation-shap"), 32, 32, default=8)
    for image, goal in zip(place.images[:count], place.labels[:count].tolist(), strict=True):

        @torch.no_grad()
        def play(kept: np.ndarray, image: Tensor = image, goal: int = goal) -> np.ndarray:
            shown = image * torch.from_numpy(np.asarray(kept, dtype=np.float32))[:, players][:, None]
            return net(shown)[:, goal].double().numpy()

        explainer = shap.explainers.Permutation(play, np.zeros((1, PLAYERS)), seed=0)
        explainer(np.ones((1, PLAYERS)), max_evals=WALKS * (2 * PLAYERS + 1), silent=True, batch_size=64)


@torch.no_grad()
def captum_shapley(place: Bed, net: nn.Module, count: int) -> None:
    """captum's Shapley values, which know no reverse: as many permutations as we walk forth and back, 64 rows at a time."""
    from captum.attr import ShapleyValueSampling

    players = grid(Saliency("permutation-shap"), 32, 32, default=8)
    ShapleyValueSampling(net).attribute(
        place.images[:count], 0, place.labels[:count], feature_mask=players[None, None], n_samples=2 * WALKS,
        perturbations_per_eval=64 // count,
    )  # fmt: skip


def captum_shap(place: Bed, count: int) -> None:
    """captum's GradientShap, 16 images at a time."""
    from captum.attr import GradientShap

    method = GradientShap(place.plain)
    for images, labels in zip(place.images[:count].split(16), place.labels[:count].split(16), strict=True):
        method.attribute(images, baselines=place.background, n_samples=POINTS, target=labels)


def shap_gradient(place: Bed, count: int) -> None:
    """shap's GradientExplainer of the highest output."""
    import shap

    explainer = shap.GradientExplainer(place.plain, place.background, batch_size=64)
    explainer.shap_values(place.images[:count], nsamples=POINTS, ranked_outputs=1)


# -------------------------------------------------------------------------------------------------------- metrics


def ours_metric(place: Bed, name: str, count: int) -> None:
    """A metric as rb-score computes it, of gradient maps."""
    spec = Saliency("gradient")
    images, labels, ids = place.images[:count], place.labels[:count], place.ids[:count]
    found = explain(place.best, images, labels, spec, ids=ids)
    judged = Judged(
        place.best, ids, images, explained=images, target=labels, saliency=spec, attribution=found.attribution
    )
    evaluate(judged, [name])


def quantus_metric(place: Bed, name: str, count: int) -> None:
    """The same by Quantus, of as many steps or noisy copies."""
    import quantus

    images, labels = place.images[:count], place.labels[:count]

    def maps(model: nn.Module, inputs: object, targets: object, **_: object) -> object:
        x = torch.as_tensor(inputs).float().requires_grad_()
        chosen = place.plain(x).gather(1, torch.as_tensor(targets).long()[:, None]).sum()
        return torch.autograd.grad(chosen, x)[0].sum(1, keepdim=True).numpy()

    metric = (
        quantus.PixelFlipping(features_in_step=32, perturb_baseline="mean", disable_warnings=True, normalise=False)
        if name == "deletion_mean"
        else quantus.MaxSensitivity(nr_samples=2, disable_warnings=True, normalise=False)
    )
    metric(
        model=place.plain, x_batch=images.numpy(), y_batch=labels.numpy(), a_batch=None, explain_func=maps,
        device="cpu", batch_size=64, channel_first=True, softmax=True,
    )  # fmt: skip


def map_group(
    place: Bed, title: str, method: str, count: int, peers: dict[str, Callable[..., None]], *, passes: int = 0
) -> Group:
    """An attribution by us and by peers: on the network as their user has it, and on ours, which leaves the harnesses alone."""
    work: dict[str, Callable[[], object]] = {"rbkit": functools.partial(ours_maps, place, method, count)}
    for name, peer in peers.items():
        work[name] = functools.partial(peer, place, place.plain, count)
        work[f"{name}, our network"] = functools.partial(peer, place, place.best, count)
    return Group(f"{title}, resnet8", passes, count, work)


def groups(place: Bed) -> Iterator[Group]:
    """All in-process work on the small model."""
    yield attack_group(place, "L2, resnet8", norm="l2", eps=EPS)
    yield attack_group(place, "Linf, resnet8", norm="linf", eps=LINF)
    # A training pass also needs the weights' gradients: about half a pass more than the floor counts.
    yield Group("PGD-7 adversarial training, one epoch, resnet8", 8, len(place.images), {
        "rbkit": functools.partial(ours_training, place),
        "torchattacks in a plain loop": functools.partial(plain_training, place),
    })  # fmt: skip
    few = min(64, len(place.images))
    yield map_group(place, f"IG, {POINTS} intervals", "ig", few, {"captum": captum_ig}, passes=POINTS + 1)
    yield Group(f"expected gradients, {POINTS} samples, resnet8", POINTS, few, {
        "rbkit": functools.partial(ours_maps, place, "shap", few),
        "captum GradientShap": functools.partial(captum_shap, place, few),
        "shap GradientExplainer": functools.partial(shap_gradient, place, few),
    })  # fmt: skip
    yield map_group(
        place, f"occlusion, windows of {WINDOW}, stride {STRIDE}", "occlusion", few, {"captum": captum_occlusion}
    )
    yield map_group(
        place, f"permutation Shapley values, {PLAYERS} players, {WALKS} permutations both ways", "permutation-shap", 8,
        {"shap": shap_permutation, "captum": captum_shapley},
    )  # fmt: skip
    for name, title in (("deletion_mean", "deletion, 32 steps"), ("max_sensitivity", "max-sensitivity, 2 copies")):
        yield Group(f"{title}, resnet8", 0, few, {
            "rbkit": functools.partial(ours_metric, place, name, few),
            "Quantus": functools.partial(quantus_metric, place, name, few),
        })  # fmt: skip


# ------------------------------------------------------------------------------------------------------- commands


def commands(place: Bed, folder: Path) -> Group:
    """The installed commands at their defaults, start-up included, on the images of the bed."""
    count = len(place.images)
    folder.mkdir(parents=True, exist_ok=True)
    steps = [
        "rb-data shapes --split train --n 600 -o train.safetensors",
        f"rb-data shapes --n {count} -o test.safetensors",
        "rb-train train.safetensors --epochs 1 --eps 0.5 --steps 2 -q -o model.safetensors",
    ]
    for line in steps:
        subprocess.run(["bash", "-c", line], cwd=folder, check=True, stderr=subprocess.DEVNULL)
    lines = {
        "python -c 'import torch' (start-up of all below)": f"{sys.executable} -c 'import torch'",
        "rb-attack --help (no torch)": "rb-attack --help",
        "rb-attack": "rb-attack test.safetensors -m model.safetensors -q -o adv.safetensors",
        "rb-saliency --method ig": "rb-saliency test.safetensors -m model.safetensors --method ig -q -o ig.safetensors",
        "rb-attack | rb-score": "rb-attack test.safetensors -m model.safetensors -q | rb-score -m model.safetensors -q --json",
    }
    runs = {
        name: functools.partial(
            subprocess.run, ["bash", "-o", "pipefail", "-c", line], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        for name, line in lines.items()
    }
    return Group(f"installed commands at their defaults, {count} images", 0, count, runs)


# -------------------------------------------------------------------------------------------------------- the run


def measure(place: Bed, group: Group, *, rounds: int) -> None:
    """Time every contender in turn, `rounds` times after one round that is not counted."""
    turns = dict(group.contenders)
    if group.passes:
        turns = {"floor": functools.partial(floor_of, place, group), **turns}
    for number in range(rounds + 1):
        for name, work in turns.items():
            if name in group.failed:
                continue
            begin = time.perf_counter()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    work()
            except Exception as error:  # of a peer: what fails there must not stop the table
                group.failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:90]
                continue
            if number:
                group.seconds.setdefault(name, []).append(time.perf_counter() - begin)


def floor_of(place: Bed, group: Group) -> None:
    """The floor of a group, on as many images as it works on."""
    few = Bed(**{**place.__dict__, "images": place.images[: group.images], "labels": place.labels[: group.images]})
    floor(few, group.passes)


def table(group: Group) -> str:
    """A group's results in Markdown."""
    median = {name: statistics.median(values) for name, values in group.seconds.items()}
    heads = ["", "median s", "spread", "images/s"] + (["% of the floor"] if group.passes else []) + ["times rbkit"]
    lines = [f"## {group.title}", "", f"{group.images} images.", "", "| " + " | ".join(heads) + " |"]
    lines.append("|---" * len(heads) + "|")
    own = next((value for name, value in median.items() if name.startswith("rbkit")), None)
    for name, value in median.items():
        values = group.seconds[name]
        cells = [name, f"{value:.3f}", f"{min(values):.3f} to {max(values):.3f}", f"{group.images / value:.0f}"]
        if group.passes:
            cells.append(f"{100 * median['floor'] / value:.0f}")
        cells.append("" if own is None or name == "floor" else f"{value / own:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"| {name} | not measured: {why} |" + " |" * (len(heads) - 2) for name, why in group.failed.items()]
    return "\n".join(lines) + "\n"


def versions() -> str:
    """What was measured, in one line."""
    found = [f"torch {torch.__version__}", f"Python {sys.version.split()[0]}"]
    for name in PEERS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)


def processor() -> str:
    """The vector instructions of the processor, and the threads in use."""
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, no GPU"


def main() -> None:
    """Measure everything and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--large", action="store_true", help="PGD on resnet18 too")
    parser.add_argument("--work", type=Path, default=Path("out/bench"))
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/RESULTS.md"))
    given = parser.parse_args()
    parts = [
        "# What the tools cost\n",
        f"Written by `make bench`. {processor()}; {versions()}. Medians of {given.rounds} rounds, contenders in turn; float32.\n",
    ]
    place = bed(arch="resnet8", count=given.images, epochs=2)
    found = list(groups(place))
    if given.large:
        large = bed(arch="resnet18", count=32, epochs=0)
        found.append(attack_group(large, "L2, resnet18", norm="l2", eps=EPS))
    for group in found:
        measure(large if given.large and "resnet18" in group.title else place, group, rounds=given.rounds)
        parts.append(table(group))
        print(parts[-1], flush=True)
    last = commands(place, given.work)
    measure(place, last, rounds=given.rounds)
    parts.append(table(last))
    print(parts[-1], flush=True)
    given.output.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
