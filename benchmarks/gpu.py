"""What a GPU adds: training and evaluation of ResNet-18 against other people's code on the same card.

    python benchmarks/gpu.py training --paper DIR --robustness DIR -o FILE     images per second of PGD-7 training
    python benchmarks/gpu.py evaluation -m MODEL IMAGES -o FILE                seconds of PGD-20 on all the images

Contenders take turns; medians and spread go to a JSON file. Peers run as their authors left them, on the same images without
augmentation; rbkit augments.
"""

from __future__ import annotations

import argparse
import functools
import importlib.machinery
import json
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from rbkit.cli import __version__
from rbkit.tools import stages, train
from rbkit.tools.architectures import resnet18
from rbkit.tools.attack import pgd
from rbkit.tools.examples import Data, as_float
from rbkit.tools.flow import polling
from rbkit.tools.gpu import Recorded, products
from rbkit.tools.models import Classifier, Evaluation
from rbkit.tools.recipe import Recipe
from rbkit.tools.slots import Batch

BATCH, STEPS, EPS, SIZE = 512, 7, 0.5, 0.15
EPOCH = 20  # steps
ROUNDS = 3
GPU = torch.device("cuda")
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]


def rows(count: int) -> Data:
    """Images of noise: what is measured does not depend on what they show."""
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=draw)
    return Data(image, torch.randint(0, 10, (count,), generator=draw), torch.arange(count))


def fresh() -> Classifier:
    """An untrained ResNet-18."""
    with train.seeded(0):
        return Classifier(resnet18(num_classes=10), mean=MEAN, std=STD).to(GPU)


def ours(precision: dict[str, bool]) -> Callable[[], None]:
    """An epoch of rb-train's loop; the first one also records the attack."""
    recipe = Recipe(epochs=100, batch=BATCH, method="pgd", eps=EPS, steps=STEPS, step_size=SIZE, lr=0.01, **precision)
    state = train.begin(fresh().to(memory_format=torch.channels_last), recipe)
    data, inner = rows(BATCH * EPOCH).to(GPU), train.attack_of(state, recipe)

    def epoch() -> None:
        train.train_epoch(state, data, recipe, inner=inner)
        state.epoch += 1

    return epoch


def ideal(amp: bool) -> Callable[[], None]:
    """The passes alone, each kind recorded once: seven gradients on folded weights, and a step of training."""
    classifier = fresh().to(memory_format=torch.channels_last)
    folded, optimiser = Evaluation(classifier), torch.optim.SGD(classifier.parameters(), lr=0.01, momentum=0.9)
    data = rows(BATCH)
    images, label = as_float(data.image).to(GPU).contiguous(memory_format=torch.channels_last), data.label.to(GPU)

    def gradients(images: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=amp, cache_enabled=False):
            for _ in range(STEPS):
                x = images.detach().requires_grad_()
                images = torch.autograd.grad(folded(x).gather(1, label[:, None]).sum(), x)[0]
        return images

    attack = Recorded(gradients)

    def epoch() -> None:
        for _ in range(EPOCH):
            folded.refresh(classifier)
            attack(images)
            optimiser.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=amp):
                loss = nn.functional.cross_entropy(classifier(images), label)
            loss.backward()
            optimiser.step()

    return epoch


class Rows(torch.utils.data.Dataset):
    """Rows as the peers' loaders want them."""

    transform: Any = None

    def __init__(self, data: Data) -> None:
        self.image, self.label = as_float(data.image), data.label

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.image[index], int(self.label[index])


class Taking(nn.Module):
    """A model that takes the options which the peers pass to it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, **options: Any) -> Tensor:
        """Logits."""
        return self.model(images)


def _absent(*names: str) -> None:
    """Modules that the peers import and that are not asked for here."""
    for name in names:
        module = types.ModuleType(name)
        module.__dict__.update(Parameters=dict, Store=object, obj_to_string=str, __path__=[])
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules.setdefault(name, module)


def paper(code: Path) -> Callable[[], None]:
    """The trainer of github.com/delyan-boychev/pytorch_trainers_interpretability, which judges one image after."""
    sys.path.append(str(code))
    _absent("timm")
    from pytorch_trainers_interpretability.attack import AttackSteps
    from pytorch_trainers_interpretability.trainers import AdversarialTrainer

    data, folder = rows(BATCH * EPOCH), tempfile.mkdtemp()
    trainer = AdversarialTrainer(
        model=Taking(fresh()), num_classes=10, lr=0.01, epochs=1, adv_step=AttackSteps.L2Step, adv_iter=STEPS,
        adv_epsilon=EPS, adv_lr=SIZE, optimizer="SGD", weight_decay=5e-4, trainset=Rows(data),
        testset=Rows(data.rows(torch.arange(1))), batch_size=BATCH, save_plot=False, save_path=folder,
    )  # fmt: skip

    def epoch() -> None:
        trainer.epoch, trainer.epochs = 0, 1
        trainer()

    return epoch


def madry(code: Path) -> Callable[[], None]:
    """The loop of github.com/MadryLab/robustness (`_model_loop`), without its logs and checkpoints."""
    sys.path.append(str(code))
    _absent("dill", "cox", "cox.utils", "cox.store", "tensorboardX")
    from robustness.attacker import AttackerModel
    from robustness.train import _model_loop

    normal = types.SimpleNamespace(mean=torch.tensor(MEAN), std=torch.tensor(STD))
    model = nn.DataParallel(AttackerModel(Taking(fresh().net), normal).to(GPU))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = torch.utils.data.DataLoader(
        Rows(rows(BATCH * EPOCH)), BATCH, shuffle=True, num_workers=8, pin_memory=True
    )  # fmt: skip
    options = types.SimpleNamespace(
        custom_eps_multiplier=None, eps=EPS, random_restarts=0, constraint="2", attack_lr=SIZE, attack_steps=STEPS,
        random_start=False, use_best=True, mixed_precision=False,
    )  # fmt: skip
    return lambda: _model_loop(options, "train", loader, model, optimiser, 0, True, None)


def timed(work: Callable[[], Any]) -> float:
    """Seconds until the device has done it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def training(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Images per second of each contender."""
    made: dict[str, Callable[[], Callable[[], Any]]] = {
        "rbkit --amp": functools.partial(ours, {"amp": True}),
        "rbkit --tf32": functools.partial(ours, {"tf32": True}),
        "rbkit": functools.partial(ours, {}),
        "ideal, bfloat16": functools.partial(ideal, True),
        "the paper's trainer": functools.partial(paper, options.paper),
        "MadryLab/robustness": functools.partial(madry, options.robustness),
    }
    # As torch has it by default, and as the peers therefore run: TF32 in convolutions.
    torch.backends.cudnn.allow_tf32 = True
    contenders, seconds = {}, {}
    for name, make in made.items():
        try:
            contenders[name] = make()
            timed(contenders[name])
            seconds[name] = []
        except Exception as error:  # a peer that does not run here is reported as such
            contenders.pop(name, None)
            yield {"contender": name, "not measured": repr(error)}
    for _ in range(ROUNDS):
        for name, work in contenders.items():
            seconds[name].append(timed(work))
    for name, found in seconds.items():
        if name in contenders:
            rate = [BATCH * EPOCH / s for s in found]
            yield {
                "contender": name, "images_per_second": round(statistics.median(rate)), "least": round(min(rate)),
                "most": round(max(rate)),
            }  # fmt: skip


def evaluation(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds of PGD-20 until broken, L2 0.5, in process, by block and precision."""
    from rbkit.cli._compute import load_model
    from rbkit.cli._input import chunks

    model = load_model(options.model, archs=None, device=GPU)
    parts = [chunk.arrays for chunk in chunks(options.images)]
    image, label = (
        torch.from_numpy(np.concatenate([part[name] for part in parts])).to(GPU) for name in ("image", "label")
    )
    clean, ids = as_float(image), torch.arange(len(image), device=GPU)
    spec = pgd(norm="l2", eps=0.5, steps=20, step_size=0.1)
    for block, tf32 in ((512, False), (1024, False), (512, True)):
        subject, found = Evaluation(model.classifier, block=block), []

        def attack(subject: Evaluation, found: list[float]) -> None:
            ((_, result),) = stages.run(subject, spec, polling([Batch(ids, clean, {"label": label})]))
            found.append(1 - float(result.success.double().mean()))

        with products(tf32=tf32):
            timed(functools.partial(subject.logits, clean[: 2 * block]))
            took = timed(functools.partial(attack, subject, found))
        yield {"images": len(clean), "block": block, "tf32": tf32, "seconds": round(took, 2), "robust": found[0]}


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("training", "evaluation"))
    parser.add_argument("images", nargs="?")
    parser.add_argument("-m", "--model")
    parser.add_argument("--paper", type=Path)
    parser.add_argument("--robustness", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_intermixed_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    records = []
    for record in {"training": training, "evaluation": evaluation}[options.what](options):
        print(json.dumps(record), flush=True)
        records.append(record)
    setting = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda, "rbkit": __version__, "what": options.what,
    }  # fmt: skip
    options.output.write_text(json.dumps({**setting, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
