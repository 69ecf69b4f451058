"""One epoch of PGD-7 adversarial training: ours, the ideal, a plain loop around torchattacks, and the paper's trainer."""

from __future__ import annotations

import functools
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import torch
from bed import BLOCK, EPS, Bed, Setting
from harness import Group
from torch import Tensor, nn

from rbkit.tools import train
from rbkit.tools.architectures import resnet8
from rbkit.tools.examples import as_float
from rbkit.tools.models import Classifier, Evaluation
from rbkit.tools.recipe import Recipe

STEPS = 7
SIZE = 2.5 * EPS["l2"] / STEPS
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
Batches = list[tuple[Tensor, Tensor]]


def fresh() -> Classifier:
    """An untrained model; the same for all."""
    with train.seeded(0):
        net = resnet8(num_classes=8)
    return Classifier(net, mean=[0.5] * 3, std=[0.25] * 3)


def batches(place: Bed) -> Batches:
    """Training images and labels of one epoch."""
    data = place.data.rows(torch.arange(len(place.images)))
    return list(zip(as_float(data.image).split(BLOCK), data.label.split(BLOCK), strict=True))


def descend(model: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """A step of training."""
    model.train()
    optimiser.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimiser.step()


def ideal(place: Bed) -> None:
    """The passes alone: folded weights taken in anew, gradients with respect to the images, and one step of training."""
    model = fresh().to(memory_format=torch.channels_last)
    folded, optimiser = Evaluation(model, block=BLOCK), torch.optim.SGD(model.parameters(), nesterov=True, **SGD)
    for images, labels in batches(place):
        folded.refresh(model)
        for _ in range(STEPS):
            x = images.detach().requires_grad_()
            torch.autograd.grad(folded(x).gather(1, labels[:, None]).sum(), x)
        descend(model, optimiser, images.contiguous(memory_format=torch.channels_last), labels)


def ours(place: Bed) -> None:
    """As rb-train does it."""
    recipe = Recipe(
        epochs=1, batch=BLOCK, method="pgd", eps=EPS["l2"], steps=STEPS, step_size=SIZE, augment="none"
    )  # fmt: skip
    data = place.data.rows(torch.arange(len(place.images)))
    train.train_epoch(train.begin(fresh().to(memory_format=torch.channels_last), recipe), data, recipe)


def plain(place: Bed) -> None:
    """torchattacks' PGD in the usual loop."""
    import torchattacks

    model = fresh()
    optimiser = torch.optim.SGD(model.parameters(), **SGD)
    attack = torchattacks.PGDL2(model, eps=EPS["l2"], alpha=SIZE, steps=STEPS)
    for images, labels in batches(place):
        descend(model, optimiser, attack(images, labels), labels)


class Rows(torch.utils.data.Dataset):
    """Rows as the paper's trainer wants them."""

    def __init__(self, batches: Batches) -> None:
        self.rows = [
            (image, int(label)) for images, labels in batches for image, label in zip(images, labels, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.rows[index]


class Taking(nn.Module):
    """A model that takes the option which the paper's trainer passes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, fake_relu: bool = False) -> Tensor:
        """Logits."""
        return self.model(images)


def paper(place: Bed, code: Path | None) -> None:
    """The paper's trainer (github.com/delyan-boychev/pytorch_trainers_interpretability), which judges one block after."""
    if code is None:
        raise FileNotFoundError("the paper's code is on no registry; give --paper DIR")
    if str(code / "src") not in sys.path:
        sys.path.append(str(code / "src"))
    # timm makes models by name, which are not asked for here.
    sys.modules.setdefault("timm", types.ModuleType("timm"))
    from pytorch_trainers_interpretability.attack import AttackSteps
    from pytorch_trainers_interpretability.trainers import AdversarialTrainer

    rows = batches(place)
    with tempfile.TemporaryDirectory() as folder:
        AdversarialTrainer(
            model=Taking(fresh()), num_classes=8, lr=SGD["lr"], epochs=1, adv_step=AttackSteps.L2Step, adv_iter=STEPS,
            adv_epsilon=EPS["l2"], adv_lr=SIZE, optimizer="SGD", weight_decay=SGD["weight_decay"], trainset=Rows(rows),
            testset=Rows([(rows[0][0][:1], rows[0][1][:1])]), batch_size=BLOCK, save_plot=False, save_path=folder,
        )()  # fmt: skip


def training(setting: Setting) -> Iterator[Group]:
    """The rows of one epoch are as many as the images of other groups, eight blocks at least."""
    place = setting.bed("robust", setting.size(max(512, setting.images)))
    yield Group(
        f"PGD-{STEPS} adversarial training, one epoch, resnet8", len(place.images),
        {"rbkit": functools.partial(ours, place)},
        {
            "torchattacks in a plain loop": functools.partial(plain, place),
            "the paper's trainer": functools.partial(paper, place, setting.paper),
        },
        floors={"floor": functools.partial(ideal, place)}, rounds=7,
        asked="93 % of the floor, and 1.7 times the speed of the paper's trainer",
        after=lambda _: f"The floor is the ideal: {STEPS} input gradients on folded weights that are taken in anew each step, and one step of training.",
    )  # fmt: skip
