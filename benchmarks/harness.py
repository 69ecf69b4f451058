"""What all benchmarks share: contenders that take turns, floors, counts of passes, and the table."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from peers import Peers
from torch import Tensor, nn

from rbkit.cli._compute import available_threads, keep_freed_memory

LIBRARIES = (
    "torchattacks", "foolbox", "adversarial-robustness-toolbox", "captum", "shap", "quantus", "pyautoattack",
)  # fmt: skip


@dataclass(frozen=True)
class Told:
    """What a contender found, for its row, and its seconds where it times itself."""

    text: str = ""
    seconds: float | None = None


@dataclass
class Passes:
    """Images that went through a network: forwards alone, or forwards and back to the image."""

    forwards: int = 0
    pairs: int = 0


@dataclass
class Turn:
    """One turn of a contender: its seconds and what it found, passes where they were counted, or why it failed."""

    seconds: float = 0.0
    text: str = ""
    passes: Passes | None = None
    failed: str | None = None


Work = Callable[[], Told | None]


@dataclass
class Group:
    """Contenders for one piece of work, name to function, and what was measured of them.

    peers: contenders that work in processes of their own (see `Peers`).
    floors: work that no contender can undercut. A single one is called `floor`; `forward` and `gradient` are passes of one
    kind, `floor_passes` images each, from which the floor of a contender follows by the passes that it made of `networks`.
    reference: the row that ratios are to; the first one of rbkit where None. heading: of the column of what contenders
    found. rounds: fewer than asked for, where a round is long; warm: two rounds before that are not counted: what is tried
    once is tried in the first, passes are counted in the second.
    asked: what the project set itself; after: more text below the table.
    """

    title: str
    images: int
    contenders: dict[str, Work]
    peers: dict[str, Work] = field(default_factory=dict)
    floors: dict[str, Work] = field(default_factory=dict)
    floor_passes: int = 0
    networks: tuple[nn.Module, ...] = ()
    reference: str | None = None
    heading: str = ""
    rounds: int | None = None
    warm: bool = True
    asked: str = ""
    after: Callable[[Group], str] | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    passes: dict[str, Passes] = field(default_factory=dict)
    found: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def median(self) -> dict[str, float]:
        """Seconds by name."""
        return {name: statistics.median(values) for name, values in self.seconds.items()}


@contextlib.contextmanager
def counted(*networks: nn.Module) -> Iterator[Passes]:
    """Count the images that go through these networks meanwhile, in whatever thread."""
    found, one_at_a_time = Passes(), threading.Lock()

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        with one_at_a_time:
            if torch.is_grad_enabled() and inputs[0].requires_grad:
                found.pairs += len(inputs[0])
            else:
                found.forwards += len(inputs[0])

    handles = [network.register_forward_pre_hook(count) for network in networks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing that peers print or warn of."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def measure(group: Group, peers: Peers, *, rounds: int) -> None:
    """Time every contender in turn, `rounds` times at most, after two rounds that are not counted.

    Every other round goes backwards, so that a machine that grows slower within a round is unfair to none.
    """
    here = group.floors | group.contenders
    with contextlib.ExitStack() as stack:
        there = {name: stack.enter_context(peers.begin()) for name in group.peers}
        for name, peer in there.items():
            peer.call(_receive, group.peers[name], group.networks)
        for number in range(-2 * group.warm, min(rounds, group.rounds or rounds)):
            watched = number == -1
            for name in [*here, *there][:: -1 if number % 2 else 1]:
                if name in group.failed:
                    continue
                if name in here:
                    turn = _turn(here[name], group.networks if watched else ())
                else:
                    turn = there[name].call(_peers_turn, watched)
                _note(group, name, turn, counts=number >= 0)


def _turn(work: Work, watched: tuple[nn.Module, ...]) -> Turn:
    begin = time.perf_counter()
    try:
        with counted(*watched) as passes, silence():
            told = work() or Told()
    except Exception as error:  # of a peer: what fails there must not stop the table
        return Turn(failed=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120])
    seconds = time.perf_counter() - begin if told.seconds is None else told.seconds
    return Turn(seconds, told.text, passes if watched else None)


def _note(group: Group, name: str, turn: Turn, *, counts: bool) -> None:
    """Take in what a turn told."""
    if turn.failed is not None:
        group.failed[name] = turn.failed
        group.seconds.pop(name, None)
        return
    group.found[name] = turn.text
    if counts:
        group.seconds.setdefault(name, []).append(turn.seconds)
    elif turn.passes is not None:
        group.passes[name] = turn.passes


# In the process of a peer: its work, and the networks whose passes are counted.
_received: list[tuple[Work, tuple[nn.Module, ...]]] = []


def _receive(work: Work, networks: tuple[nn.Module, ...]) -> None:
    _received[:] = [(work, networks)]


def _peers_turn(watched: bool) -> Turn:
    work, networks = _received[0]
    return _turn(work, networks if watched else ())


def floor_of(group: Group, name: str) -> list[float] | None:
    """Seconds that the work of a contender takes at least, by round, or None where no floor was measured."""
    seconds = group.seconds
    if name not in group.passes:
        return seconds.get("floor")
    if name in group.floors or not {"forward", "gradient"} <= set(seconds):
        return None
    passes = group.passes[name]
    rounds = zip(seconds["forward"], seconds["gradient"], strict=True)
    return [(passes.forwards * forward + passes.pairs * both) / group.floor_passes for forward, both in rounds]


def ratio(these: list[float], those: list[float]) -> float:
    """How many times as long these took as those: the median over rounds, within each of which the machine is the same."""
    return statistics.median(one / other for one, other in zip(these, those, strict=True))


def line(cells: list[str]) -> str:
    """A line of a table in Markdown."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _row(group: Group, name: str, reference: list[float] | None) -> list[str]:
    median, values, least = group.median[name], group.seconds[name], floor_of(group, name)
    cells = [name, f"{median:.3f}", f"{min(values):.3f} to {max(values):.3f}"]
    work = group.floor_passes if name in group.floors and group.floor_passes else group.images
    cells.append(f"{work / median:.4g}")
    if group.floors:
        cells.append("" if least is None else f"{100 * ratio(least, values):.0f}")
    if group.networks:
        passes = group.passes.get(name, Passes())
        each = (passes.forwards / group.images, passes.pairs / group.images)
        cells.append("" if name in group.floors else " + ".join(f"{count:.4g}" for count in each))
    cells.append("" if reference is None or name in group.floors else f"{ratio(values, reference):.2f}")
    return [*cells, group.found[name]] if group.heading else cells


def table(group: Group) -> str:
    """A group's results in Markdown."""
    median = group.median
    own = group.reference or next((name for name in median if name.startswith("rbkit")), None)
    heads = ["", "median s", "spread", "images/s"] + (["% of the floor"] if group.floors else [])
    heads += ["forward + gradient passes an image"] if group.networks else []
    heads += [f"times {group.reference or 'rbkit'}"] + ([group.heading] if group.heading else [])
    rounds = max((len(values) for values in group.seconds.values()), default=0)
    lines = [f"## {group.title}", "", f"{group.images} images, rounds: {rounds}.", "", line(heads)]
    lines.append("|---" * len(heads) + "|")
    lines += [line(_row(group, name, group.seconds.get(own or ""))) for name in median]
    lines += [line([name, f"not measured: {why}", *[""] * (len(heads) - 2)]) for name, why in group.failed.items()]
    if group.asked:
        lines += ["", f"Asked for: {group.asked}."]
    if group.after is not None and not group.failed:
        lines += ["", group.after(group)]
    return "\n".join(lines) + "\n"


def versions() -> str:
    """What was measured, in one line."""
    found = [f"torch {torch.__version__}", f"Python {sys.version.split()[0]}"]
    for name in LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)


def start() -> Peers:
    """As many threads as the commands take, here and in the processes of the peers; memory kept as the commands keep it, here."""
    threads = int(os.environ.get("RB_THREADS") or available_threads())
    keep_freed_memory()
    torch.set_num_threads(threads)
    return Peers(threads=threads)


def processor() -> str:
    """The vector instructions of the processor, and the threads in use."""
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, no GPU"
