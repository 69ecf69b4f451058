"""Our tools, the commands that wrap them, and other libraries, side by side on one model: `make bench`.

Every group of contenders does the same work. They take turns within a round, so that a machine that drifts is unfair to
none; the table gives the median, its spread, and the share of the floor: the time of the model's own passes in the best
form (BatchNorm folded, channels-last, frozen), which no method can beat. A peer that is not installed, or fails, says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import auto_attack
from bed import EPS, Setting
from contenders_attack import accuracy, attacks, resnet18
from contenders_commands import defaults, pipe, starts
from contenders_maps import maps
from contenders_scores import scores
from contenders_training import training
from growth import growth
from harness import Group, measure, processor, start, table, versions
from peers import Peers

HERE = Path(__file__).parent


def protocol(setting: Setting) -> Iterator[str]:
    """AutoAttack on a few images; `make bench-autoattack` is the whole comparison."""
    yield "## AutoAttack, standard protocol\n"
    try:
        auto_attack.reference(setting.auto_attack)
    except ImportError as error:
        yield f"Not measured: {error}\n"
        return
    lines = auto_attack.heads(auto_attack.PROTOCOL)
    effort = {"steps": 5, "queries": 20, "twice": False} if setting.quick else {}
    for model in ("standard", "robust"):
        place = setting.bed(model, setting.size(64))
        case = auto_attack.Case(model, place.plain, place.images, place.labels, "l2", EPS["l2"], **effort)
        lines.append(auto_attack.protocol(case, setting.auto_attack, setting.peers))
    yield "\n".join([*lines, "", "Asked for: the same accuracy to 0.3 points, in 0.7 of the wall time."]) + "\n"


def grown(setting: Setting) -> Iterator[str]:
    """The table of growth; its figure stands beside the results."""
    yield growth(setting, setting.figure)


SECTIONS: dict[str, Callable[[Setting], Iterator[Group] | Iterator[str]]] = {
    "attacks": attacks,
    "accuracy": accuracy,
    "resnet18": resnet18,
    "training": training,
    "maps": maps,
    "scores": scores,
    "autoattack": protocol,
    "commands": defaults,
    "pipe": pipe,
    "starts": starts,
    "growth": grown,
}


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="at most; groups whose rounds are long have fewer")
    parser.add_argument("--images", type=int, default=256, help="of most groups")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="these sections alone")
    parser.add_argument("--large", action="store_true", help="resnet18 trained robustly, and all libraries on resnet18")
    parser.add_argument("--full", action="store_true", help="10,000 images through the pipe, growth up to 64,000")
    parser.add_argument("--quick", action="store_true", help="a handful of images, once: to see that everything runs")
    parser.add_argument("--paper", type=Path, help="folder of the paper's code")
    parser.add_argument("--auto-attack", type=Path, help="folder of the reference AutoAttack; default: pyautoattack")
    parser.add_argument("--pictures", type=Path, help="folder train|test/CLASS/PICTURE for accuracy on pictures too")
    parser.add_argument("--work", type=Path, help="models and images; default out/bench")
    parser.add_argument(
        "-o", "--output", type=Path, help="default benchmarks/RESULTS.md, with --quick in the work folder"
    )
    return parser.parse_args()


def setting_of(given: argparse.Namespace, peers: Peers) -> Setting:
    """What the options ask for."""
    work = given.work or Path("out/bench-quick" if given.quick else "out/bench")
    output = given.output or (work if given.quick else HERE) / "RESULTS.md"
    return Setting(
        peers=peers, folder=work.absolute(), output=output, images=8 if given.quick else given.images,
        rounds=1 if given.quick else given.rounds, quick=given.quick, large=given.large, full=given.full,
        paper=given.paper, auto_attack=given.auto_attack, pictures=given.pictures and given.pictures.absolute(),
    )  # fmt: skip


def main() -> None:
    """Measure everything and write the tables."""
    given = parsed()
    bench(setting_of(given, start()), given.only)


def bench(setting: Setting, sections: list[str]) -> None:
    """The tables of these sections, written as they grow."""
    parts = [
        "# What the tools cost\n",
        f"Written by `make bench`. {processor()}; {versions()}. Medians; contenders take turns; float32. Other libraries run each in",
        "a process of its own, with the allocator as their users have it; on our network they run in ours.\n",
    ]
    for name in sections:
        begin = time.perf_counter()
        for part in SECTIONS[name](setting):
            if isinstance(part, Group):
                measure(part, setting.peers, rounds=setting.rounds)
            parts.append(table(part) if isinstance(part, Group) else part)
            print(parts[-1], flush=True)
        print(f"({name}: {time.perf_counter() - begin:.0f} s)\n", flush=True)
        setting.output.write_text("\n".join(parts))  # what is measured stays where the rest is interrupted


if __name__ == "__main__":
    main()
