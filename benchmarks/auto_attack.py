"""`--attack auto` and `--attack fab-t` against the reference AutoAttack: `make bench-autoattack`.

The reference (Croce and Hein 2020, github.com/fra31/auto-attack) is taken from a folder, or is `pyautoattack` of the
registry, which holds the same attacks. This file is not named like either: it would hide them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from harness import Passes, counted, line, processor, silence, start, versions
from peers import Peers
from torch import Tensor

from rbkit.cli import _input
from rbkit.cli._compute import load_model, model_chunk
from rbkit.tools.architectures import is_factory
from rbkit.tools.attack import QUERIES, STEPS, TARGETS, Attack, auto, fab_t
from rbkit.tools.examples import as_float
from rbkit.tools.flow import polling
from rbkit.tools.lanes import Lanes
from rbkit.tools.models import Classifier, Evaluation
from rbkit.tools.norms import NORMS
from rbkit.tools.slots import Batch
from rbkit.tools.stages import Attacked, run

ABOVE = 1e-6  # by which an image may be farther than eps before it counts as above the ball: rounding
REFERENCE_NORM = {"l2": "L2", "linf": "Linf"}


@dataclass(frozen=True)
class Case:
    """A model under attack: images (N, C, H, W) in [0, 1] with labels, the ball, and how much is tried, twice or once.

    side_by_side: whether its code bears to be run by several threads, as rb-attack has it.
    """

    name: str
    model: Classifier
    images: Tensor
    labels: Tensor
    norm: str
    eps: float
    side_by_side: bool = True
    steps: int = STEPS
    queries: int = QUERIES
    twice: bool = True

    @property
    def targets(self) -> int:
        """Other classes that targeted attacks aim at; the reference stops where it is told more than there are."""
        with torch.no_grad():
            return min(TARGETS, self.model(self.images[:1]).shape[1] - 1)


@dataclass
class Run:
    """What an attack found and took: images, which of them the attack itself calls broken, seconds, and passes."""

    images: Tensor
    broken: Tensor
    wall: float
    cpu: float
    passes: Passes
    distance: Tensor | None = None


def reference(folder: Path | None) -> ModuleType:
    """The package of the reference. Raises: ImportError where there is none."""
    if folder is None:
        return importlib.import_module("pyautoattack")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module("autoattack")


def read(path: str, count: int) -> tuple[Tensor, Tensor]:
    """`count` images and labels of a stream, evenly from all of it: folders are sorted by class."""
    chunks = list(_input.chunks(path))
    image, label = (np.concatenate([chunk.arrays[name] for chunk in chunks]) for name in ("image", "label"))
    rows = torch.linspace(0, len(label) - 1, min(count, len(label))).round().long()
    return as_float(torch.from_numpy(image.copy())[rows]), torch.from_numpy(label.copy())[rows]


def case_of(text: str, count: int, *, archs: list[str] | None = None, **effort: int) -> Case:
    """A case as it is written on the command line: NAME=MODEL,STREAM,NORM:EPS. Code is run of those `archs` alone."""
    name, _, rest = text.partition("=")
    model, stream, ball = rest.split(",")
    norm, _, eps = ball.partition(":")
    top, _, bottom = eps.partition("/")
    own = is_factory(str(model_chunk(model).meta["arch"]))
    loaded = load_model(model, archs=archs if own else None, device=torch.device("cpu"))
    plain = loaded.classifier.requires_grad_(False)
    images, labels = read(stream, count)
    return Case(name, plain, images, labels, norm, float(top) / float(bottom or 1), side_by_side=not own, **effort)


@contextlib.contextmanager
def timed(network: torch.nn.Module) -> Iterator[Callable[[], dict[str, Any]]]:
    """Wall and CPU seconds of all threads since here, and passes of a network, as a function to be called at the end."""
    with counted(network) as passes, silence():
        wall, cpu = time.perf_counter(), time.process_time()
        yield lambda: {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "passes": passes}


def ours(case: Case, spec: Attack) -> Run:
    """An attack of rb-attack, in process."""
    best = Evaluation(case.model, lanes=Lanes() if case.side_by_side else None)
    batch = Batch(torch.arange(len(case.labels)), case.images, {"label": case.labels})
    with timed(best) as taken:
        found: Attacked = next(result for _, result in run(best, spec, polling([batch])))
        spent = taken()
    return Run(found.outcome.images, found.success, **spent, distance=found.distance)


def set_up(case: Case, folder: Path | None) -> Any:
    """The standard protocol of the reference for a case."""
    package, norm = reference(folder), REFERENCE_NORM[case.norm]
    with silence():
        attack = package.AutoAttack(case.model, norm=norm, eps=case.eps, seed=0, version="standard", device="cpu")
    attack.verbose = False
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = case.targets
    attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = case.steps
    attack.square.n_queries = case.queries
    return attack


def theirs(case: Case, folder: Path | None) -> Run:
    """The standard protocol of the reference, on the model as it was trained."""
    attack = set_up(case, folder)
    with timed(case.model) as taken:
        found = attack.run_standard_evaluation(case.images, case.labels)
        spent = taken()
    images = found[0] if isinstance(found, tuple) else found
    with torch.no_grad():
        return Run(images, case.model(images).argmax(1) != case.labels, **spent)


def their_fab(case: Case, folder: Path | None) -> Run:
    """The reference's FAB towards each target, whatever the distance: as a whole it stops at the first point in the ball."""
    attack = set_up(case, folder).fab
    distance, nearest = torch.full((len(case.labels),), torch.inf), case.images.clone()
    with timed(case.model) as taken:
        for target in range(2, case.targets + 2):
            attack.target_class = target
            images = attack.attack_single_run(case.images, case.labels, is_targeted=True)
            with torch.no_grad():
                size = NORMS[case.norm].size(images - case.images)
                nearer = (case.model(images).argmax(1) != case.labels) & (size < distance)
            distance[nearer], nearest[nearer] = size[nearer], images[nearer]
        spent = taken()
    return Run(nearest, distance.isfinite(), **spent, distance=distance)


def in_turns(case: Case, peer: Callable[[], Run], mine: Callable[[], Run]) -> tuple[Run, Run]:
    """Runs of both, where `twice` in the order theirs, ours, ours, theirs, with means of the seconds: a run takes minutes, and a
    machine that grows slower or faster meanwhile is then unfair to neither."""
    theirs_first, ours_first = peer(), mine()
    if case.twice:
        ours_second, theirs_second = mine(), peer()
        for first, second in ((theirs_first, theirs_second), (ours_first, ours_second)):
            first.wall, first.cpu = (first.wall + second.wall) / 2, (first.cpu + second.cpu) / 2
    return theirs_first, ours_first


def alone(peers: Peers, attack: Callable[..., Run], case: Case, folder: Path | None) -> Callable[[], Run]:
    """An attack of the reference, each time in a process of its own."""

    def call() -> Run:
        with peers.begin() as peer:
            return peer.call(attack, case, folder)

    return call


def above(case: Case, found: Run) -> int:
    """Images outside the ball or the box."""
    size = NORMS[case.norm].size((found.images - case.images).double())
    outside = ((found.images < 0) | (found.images > 1)).flatten(1).any(1)
    return int(((size > case.eps + ABOVE) | outside).sum())


def protocol(case: Case, folder: Path | None, peers: Peers) -> str:
    """A line of the table of the standard protocol."""
    with torch.no_grad():
        clean = (case.model(case.images).argmax(1) == case.labels).double().mean()
    spec = auto(norm=case.norm, eps=case.eps, steps=case.steps, queries=case.queries, targets=case.targets)
    runs = in_turns(case, alone(peers, theirs, case, folder), lambda: ours(case, spec))
    peer, mine = runs
    cells = [case.name, f"{case.norm} {case.eps:.4g}", str(len(case.labels)), f"{clean:.3f}"]
    cells += [f"{1 - found.broken.double().mean():.3f}" for found in runs]
    cells += [f"{found.wall:.1f}" for found in runs] + [f"{mine.wall / peer.wall:.2f}"]
    cells += [f"{found.cpu:.1f}" for found in runs] + [f"{mine.cpu / peer.cpu:.2f}"]
    cells += [f"{found.passes.forwards + found.passes.pairs} + {found.passes.pairs}" for found in runs]
    return line([*cells, *(str(above(case, found)) for found in runs)])


def distances(case: Case, folder: Path | None, peers: Peers) -> str:
    """A line of the table of minimal distances: medians over images that are right at first and that both broke."""
    spec = fab_t(norm=case.norm, eps=case.eps, steps=case.steps, targets=case.targets)
    peer, mine = in_turns(case, alone(peers, their_fab, case, folder), lambda: ours(case, spec))
    assert peer.distance is not None and mine.distance is not None
    both = peer.distance.isfinite() & mine.distance.isfinite() & (peer.distance > 0) & (mine.distance > 0)
    middle = [float(found.distance[both].median()) for found in (peer, mine)]  # type: ignore[index]
    cells = [case.name, f"{case.norm}", str(int(both.sum())), *(f"{value:.4f}" for value in middle)]
    cells += [f"{100 * (middle[1] / middle[0] - 1):+.1f} %", f"{peer.wall:.1f}", f"{mine.wall:.1f}"]
    return line([*cells, f"{mine.wall / peer.wall:.2f}"])


PROTOCOL = (
    "model", "ball", "images", "clean", "robust, reference", "robust, rbkit", "wall s, reference", "wall s, rbkit", "ratio",
    "CPU s, reference", "CPU s, rbkit", "ratio", "forward + backward images, reference", "forward + backward images, rbkit",
    "above the ball, reference", "above the ball, rbkit",
)  # fmt: skip
DISTANCES = (
    "model", "norm", "images", "median distance, reference", "median distance, rbkit", "difference", "wall s, reference",
    "wall s, rbkit", "ratio",
)  # fmt: skip


def heads(names: tuple[str, ...]) -> list[str]:
    """The first two lines of a table."""
    return [line(list(names)), "|---" * len(names) + "|"]


def main() -> None:
    """Measure the cases and write the tables, which are also printed as they grow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="+", help="NAME=MODEL,STREAM,NORM:EPS")
    parser.add_argument(
        "--arch", nargs="+", help="package.module:factory whose code may be run, as small_cnn:small_cnn"
    )
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--fab-images", type=int, default=100, help="images whose distances are compared; 0 for none")
    parser.add_argument("--steps", type=int, default=STEPS, help="of every gradient attack, on each target")
    parser.add_argument("--queries", type=int, default=QUERIES, help="of Square")
    parser.add_argument("--once", action="store_true", help="each contender once, not in the order A, B, B, A")
    parser.add_argument("--reference", type=Path, help="folder of the reference's code; default: pyautoattack")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/AUTOATTACK.md"))
    given = parser.parse_args()
    compare(given, start())


def compare(given: argparse.Namespace, peers: Peers) -> None:
    """The tables of all cases."""
    package = reference(given.reference)
    effort = {"steps": given.steps, "queries": given.queries, "twice": not given.once}
    lines = [
        "# `--attack auto` against AutoAttack\n",
        f"Written by `make bench-autoattack`. {processor()}; {versions()}; reference: {package.__name__}. In process, the",
        "reference in one of its own with the allocator as its users have it;",
        f"{'one run each' if given.once else 'means of two runs each, in the order A, B, B, A'}; {given.steps} steps, 1 restart,",
        f"{given.queries} queries, seed 0, 9 targets or as many as there are other classes. The reference runs on the model as",
        "trained and is judged by it, rbkit on the folded form. Forward images include those that go back and padding.\n",
    ]
    parts = [(protocol, PROTOCOL, given.images, "")]
    if given.fab_images:
        parts.append((distances, DISTANCES, given.fab_images, "\nFAB alone, to the end, nearest over all targets:\n"))
    for measure, names, count, text in parts:
        lines += [*([text] if text else []), *heads(names)]
        for written in given.case:
            case = case_of(written, count, archs=given.arch, **effort)
            lines.append(measure(case, given.reference, peers))
            print(lines[-1], flush=True)
    given.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
