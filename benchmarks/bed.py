"""What benchmarks work on: models that the commands train once, images, and the floor of a model's own passes."""

from __future__ import annotations

import functools
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peers import Peers
from safetensors.torch import load_file, save_file
from torch import Tensor

from rbkit.cli._compute import load_model
from rbkit.tools import shapes
from rbkit.tools.examples import Data, as_float
from rbkit.tools.lanes import Lanes
from rbkit.tools.models import Classifier, Evaluation

BLOCK = 64
EPS = {"l2": 0.5, "linf": 2 / 255}  # of the models that are robust to L2 0.5: both balls leave about as much
BALL = f"--eps {EPS['l2']} --steps 3 --eps-ramp 0.5"
# Name to (rows, epochs, options of rb-train). resnet18 learns little in so little time, but enough to be attacked.
MODELS = {
    "standard": (4000, 8, "--batch 64 --augment crop"),
    "robust": (4000, 8, f"--batch 64 --augment crop {BALL}"),
    "resnet18": (1000, 2, "--arch resnet18 --batch 32 --lr 0.05 --augment none"),
    "resnet18-robust": (1000, 4, f"--arch resnet18 --batch 32 --lr 0.05 --augment none {BALL}"),
}
# The same on pictures, by the recipes of TARGETS.md: the standard model breaks under nearly all attacks of L2 0.5.
ON_PICTURES = {
    "standard": (10000, 10, "--augment flip --weight-decay 0"),
    "robust": (10000, 10, "--augment flip --eps 0.25 --steps 3"),
}


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

    def blocks(self) -> list[tuple[Tensor, Tensor]]:
        """Images and labels, as many at a time as ours computes."""
        return list(zip(self.images.split(BLOCK), self.labels.split(BLOCK), strict=True))

    def agreed(self) -> Bed:
        """The same with labels as the model has them: no image is broken before the attack, so that none is skipped."""
        return replace(self, labels=self.best.logits(self.images).argmax(1))

    def few(self, count: int) -> Bed:
        """The first images of it, on the same networks."""
        return replace(self, images=self.images[:count], labels=self.labels[:count], ids=self.ids[:count])


@dataclass(frozen=True)
class Setting:
    """How much is measured, where, and where peers are that no registry has; quick: only that everything runs."""

    peers: Peers
    folder: Path
    output: Path
    images: int = 256
    rounds: int = 5
    quick: bool = False
    large: bool = False
    full: bool = False
    paper: Path | None = None
    auto_attack: Path | None = None
    pictures: Path | None = None

    @property
    def figure(self) -> Path:
        """Where the figure of growth goes: beside the table."""
        return self.output.with_name("growth.svg")

    def size(self, usual: int) -> int:
        """A number of images, or a handful where it is only to be seen that things work."""
        return min(usual, 8) if self.quick else usual

    def model(self, name: str) -> Path:
        """The file of a model, trained by the commands where it is not there yet."""
        path, (rows, epochs, options) = self.folder / f"{name}.safetensors", MODELS[name]
        rows, epochs = (128, 1) if self.quick else (rows, epochs)
        if not path.exists():
            source = f"rb-data shapes --split train --n {rows}"
            train = f"rb-train - {options} --epochs {epochs} -q -o {path.name}"
            command(f"{source} | {train}", self.folder)
        return path

    def stream(self, count: int) -> Path:
        """A file of so many test images."""
        path = self.folder / f"test-{count}.safetensors"
        if not path.exists():
            command(f"rb-data shapes --n {count} -q -o {path.name}", self.folder)
        return path

    def agreed_stream(self, model: str, count: int) -> Path:
        """A file of so many test images, labelled as a model has them."""
        path = self.folder / f"test-{count}-{model}.safetensors"
        if not path.exists():
            place = self.bed(model, count).agreed()
            save_file({"image": place.images, "label": place.labels}, path)
        return path

    def bed(self, model: str, count: int) -> Bed:
        """A model and so many test images."""
        plain = load_model(str(self.model(model)), archs=None, device=torch.device("cpu")).classifier
        ids = torch.arange(max(count, 100))
        drawn = shapes.generate(ids, seed=0, split="train")
        test = shapes.generate(torch.arange(count), seed=0, split="test")
        place = Bed(
            plain.requires_grad_(False), Evaluation(plain, block=BLOCK, lanes=Lanes()), as_float(test["image"]), test["label"],
            torch.arange(count), as_float(drawn["image"][:100]), Data(drawn["image"], drawn["label"], ids),
        )  # fmt: skip
        # A model that has learned nothing is right about nothing, and nothing would be attacked.
        return place.agreed() if self.quick else place

    def picture_bed(self, model: str, count: int) -> Bed:
        """The same on a folder of pictures, train|test/CLASS/PICTURE."""
        rows, epochs, options = ON_PICTURES[model]
        rows, epochs = (128, 1) if self.quick else (rows, epochs)
        paths = {}
        for split, number in (("train", rows), ("test", count)):
            paths[split] = self.folder / f"pictures-{split}-{number}.safetensors"
            if not paths[split].exists():
                draw = f"rb-data folder {self.pictures} --size 32 --split {split} --n {number}"
                command(f"{draw} -q -o {paths[split]}", self.folder)
        path = self.folder / f"pictures-{model}.safetensors"
        if not path.exists():
            command(f"rb-train {paths['train']} {options} --epochs {epochs} -q -o {path}", self.folder)
        drawn, test = (load_file(paths[split]) for split in ("train", "test"))
        plain = load_model(str(path), archs=None, device=torch.device("cpu")).classifier
        place = Bed(
            plain.requires_grad_(False), Evaluation(plain, block=BLOCK, lanes=Lanes()), as_float(test["image"]), test["label"], test["id"],
            as_float(drawn["image"][:100]), Data(drawn["image"], drawn["label"], drawn["id"]),
        )  # fmt: skip
        return place.agreed() if self.quick else place


def command(line: str, folder: Path) -> None:
    """Run a line of shell. Raises: CalledProcessError where any command of a pipe fails."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def gradient_passes(place: Bed, count: int) -> None:
    """`count` forward and input-gradient passes of all images, in blocks, and nothing else."""
    for images, labels in place.blocks():
        for _ in range(count):
            x = images.detach().requires_grad_()
            torch.autograd.grad(place.best(x).gather(1, labels[:, None]).sum(), x)


@torch.no_grad()
def forward_passes(place: Bed, count: int) -> None:
    """`count` forward passes of all images, in blocks, and nothing else."""
    for images, _ in place.blocks():
        for _ in range(count):
            place.best(images)


def passes(place: Bed, gradients: int, forwards: int) -> None:
    """So many passes of either kind of all images, block by block, and nothing else."""
    gradient_passes(place, gradients)
    forward_passes(place, forwards)


FLOORS = {"forward": forward_passes, "gradient": gradient_passes}
FLOOR_PASSES = 8  # of each kind, to tell what one takes


def own_floors(place: Bed, *, repeats: int = FLOOR_PASSES) -> dict[str, Any]:
    """What a group needs to hold each contender against the passes that it makes itself (see `Group`).

    repeats: times that each kind of pass is made; it should take about as long as the work. Where the speed of a processor
    swings, a short piece mostly meets it at its fastest, and the work, longer, never does.
    """
    return {
        "floors": {kind: functools.partial(passes, place, repeats) for kind, passes in FLOORS.items()},
        "floor_passes": repeats * len(place.images),
        "networks": (place.plain, place.best),
    }
