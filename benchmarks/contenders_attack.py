"""PGD by us and by other libraries, with all of its steps, and robust accuracy, for which broken images need no more."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
from bed import EPS, Bed, Setting, own_floors
from harness import Group, Told
from torch import nn

from rbkit.tools.attack import pgd
from rbkit.tools.flow import polling
from rbkit.tools.slots import Batch
from rbkit.tools.stages import run

STEPS, SPRINT = 20, 2
STEP = {norm: 2.5 * eps / STEPS for norm, eps in EPS.items()}  # that of rb-attack where none is given
PAPER_STEP = 0.1  # of PGD-20 at L2 0.5 in arXiv 2307.02500


def ours(place: Bed, *, norm: str, **options: Any) -> Told:
    """PGD as rb-attack does it."""
    spec = pgd(norm=norm, eps=EPS[norm], steps=STEPS, **options)
    batch = Batch(place.ids, place.images, {"label": place.labels})
    results = run(place.best, spec, polling([batch]))
    broken = torch.cat([result.success for _, result in results])
    return Told(f"{1 - broken.double().mean():.3f}")


def torchattacks_pgd(place: Bed, *, norm: str, step_size: float | None = None) -> Told:
    """torchattacks' PGD, in blocks of 64, and the accuracy that is left."""
    import torchattacks

    begin = time.perf_counter()  # the import does not count
    kind = torchattacks.PGDL2 if norm == "l2" else torchattacks.PGD
    attack = kind(place.plain, eps=EPS[norm], alpha=step_size or STEP[norm], steps=STEPS, random_start=True)
    right = 0
    for images, labels in place.blocks():
        moved = attack(images, labels)
        with torch.no_grad():
            right += int((place.plain(moved).argmax(1) == labels).sum())
    return Told(f"{right / len(place.images):.3f}", time.perf_counter() - begin)


def foolbox_pgd(place: Bed, *, norm: str) -> None:
    """foolbox' PGD, in blocks of 64."""
    import foolbox

    model = foolbox.PyTorchModel(place.plain, bounds=(0, 1), device="cpu")
    kind = foolbox.attacks.L2ProjectedGradientDescentAttack if norm == "l2" else foolbox.attacks.LinfPGD
    attack = kind(abs_stepsize=STEP[norm], steps=STEPS, random_start=True)
    for images, labels in place.blocks():
        attack(model, images, labels, epsilons=[EPS[norm]])


def art_pgd(place: Bed, *, norm: str) -> None:
    """The Adversarial Robustness Toolbox' PGD, in blocks of 64."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    model = PyTorchClassifier(
        place.plain, nn.CrossEntropyLoss(), tuple(place.images.shape[1:]), 8, clip_values=(0, 1), device_type="cpu"
    )
    attack = ProjectedGradientDescentPyTorch(
        model, norm=2 if norm == "l2" else "inf", eps=EPS[norm], eps_step=STEP[norm], max_iter=STEPS,
        num_random_init=1, batch_size=64, verbose=False,
    )  # fmt: skip
    attack.generate(place.images.numpy(), place.labels.numpy())


def captum_pgd(place: Bed, *, norm: str) -> None:
    """captum's PGD, in blocks of 64."""
    from captum.robust import PGD

    attack = PGD(place.plain, lower_bound=0, upper_bound=1)
    for images, labels in place.blocks():
        attack.perturb(
            images, radius=EPS[norm], step_size=STEP[norm], step_num=STEPS, target=labels, random_start=True,
            norm="L2" if norm == "l2" else "Linf",
        )  # fmt: skip


def attack_group(place: Bed, title: str, *, norm: str) -> Group:
    """PGD with all of its steps, of images that the model is right about."""
    bound = functools.partial
    return Group(
        f"PGD-{STEPS} with all steps, {title}", len(place.images),
        {"rbkit": bound(ours, place, norm=norm, until="end")},
        {
            "torchattacks": bound(torchattacks_pgd, place, norm=norm),
            "foolbox": bound(foolbox_pgd, place, norm=norm),
            "ART": bound(art_pgd, place, norm=norm),
            "captum": bound(captum_pgd, place, norm=norm),
        },
        heading="share unbroken", rounds=5, asked="95 % of the floor", **own_floors(place),
    )  # fmt: skip


def accuracy_group(place: Bed, title: str, *, asked: float, rounds: int, step_size: float = STEP["l2"]) -> Group:
    """Robust accuracy: ours, where a broken image leaves its place to the next one, also with a sprint first."""
    bound, options = functools.partial, {"norm": "l2", "step_size": step_size}
    return Group(
        f"Robust accuracy under PGD-{STEPS}, L2, steps of {step_size:g}, {title}", len(place.images),
        {
            "rbkit": bound(ours, place, **options),
            f"rbkit --sprint {SPRINT}": bound(ours, place, sprint=SPRINT, **options),
            "torchattacks in our process, which keeps memory": bound(torchattacks_pgd, place, **options),
        },
        {"torchattacks": bound(torchattacks_pgd, place, **options)},
        heading="robust accuracy", rounds=rounds, warm=False, asked=f"torchattacks takes {asked:g} times as long or more",
    )  # fmt: skip


def attacks(setting: Setting) -> Iterator[Group]:
    """All steps, both norms, on enough images for what an attack does once (a trial of lanes, the last blocks) to matter little."""
    place = setting.bed("robust", setting.size(1024 if setting.full else setting.images)).agreed()
    for norm, title in (("l2", "L2"), ("linf", "Linf")):
        yield attack_group(place, f"{title}, robust resnet8", norm=norm)


def accuracy(setting: Setting) -> Iterator[Group]:
    """On enough images for the last blocks, which are no longer full, to matter little: of eight blocks they are a tenth."""
    for model, asked in (("standard", 6), ("robust", 3)):
        places = {f"{model} resnet8": setting.bed(model, setting.size(1024))}
        if setting.pictures is not None:
            count = setting.size(4096 if setting.full else 1024)
            places[f"{model} resnet8 on pictures"] = setting.picture_bed(model, count)
        for title, place in places.items():
            for step_size in (STEP["l2"], PAPER_STEP):
                yield accuracy_group(place, title, asked=asked, rounds=3, step_size=step_size)


def resnet18(setting: Setting) -> Iterator[Group]:
    """The same on a large network; a round is long, so there are few."""
    count = setting.size(128)
    yield accuracy_group(setting.bed("resnet18", count), "standard resnet18", asked=2, rounds=2)
    if setting.large:
        robust = setting.bed("resnet18-robust", count)
        yield accuracy_group(robust, "robust resnet18", asked=2, rounds=2)
        yield attack_group(setting.bed("resnet18", setting.size(32)).agreed(), "L2, standard resnet18", norm="l2")
