"""What more images, steps and samples cost in time and memory: a table and a figure."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bed import Setting, command
from harness import line

from rbkit.formats import figures

PEAK = shlex.join([sys.executable, str(Path(__file__).with_name("peak.py"))])
COUNTS = (1_000, 4_000, 16_000, 64_000)
LIMIT = 1.5 * 1024  # MiB a process
FEW = 128  # images where steps or samples grow
ATTACK, IG, SHAP = "rb-attack --steps 1", "rb-saliency --method ig", "rb-saliency --method shap"


@dataclass(frozen=True)
class Point:
    """One run: how much of what, wall seconds, and the peak memory of each process in MiB."""

    amount: int
    seconds: float
    peaks: tuple[float, ...]


def run(setting: Setting, amount: int, *commands: str) -> Point:
    """Run a pipe of commands, each watched."""
    files = [setting.folder / f"peak-{number}" for number in range(len(commands))]
    text = " | ".join(f"{PEAK} {file.name} {part}" for file, part in zip(files, commands, strict=True))
    begin = time.perf_counter()
    command(text, setting.folder)
    return Point(amount, time.perf_counter() - begin, tuple(float(file.read_text()) for file in files))


def over_images(setting: Setting, counts: tuple[int, ...]) -> dict[str, list[Point]]:
    """Both commands over more and more images, and the pipe to rb-score over the most."""
    model = setting.model("robust").name
    found: dict[str, list[Point]] = {ATTACK: [], f"{IG} --steps 2": []}
    for count in counts:
        stream = setting.stream(count).name
        for name, points in found.items():
            points.append(run(setting, count, f"{name} {stream} -m {model} -q -o grown.safetensors"))
    attack = f"{ATTACK} {setting.stream(counts[-1]).name} -m {model} -q"
    found[f"{ATTACK} | rb-score"] = [run(setting, counts[-1], attack, f"rb-score -m {model} -q --json")]
    (setting.folder / "grown.safetensors").unlink()
    return found


def over_points(setting: Setting, amounts: tuple[int, ...]) -> dict[str, list[Point]]:
    """More and more steps of a path, and background draws, on the same images."""
    model, stream = setting.model("robust").name, setting.stream(setting.size(FEW)).name
    common = f"{stream} -m {model} -q -o grown.safetensors"
    background = setting.stream(setting.size(FEW)).name
    found: dict[str, list[Point]] = {f"{IG} --steps N": [], f"{SHAP} --samples N": []}
    for amount in amounts:
        found[f"{IG} --steps N"].append(run(setting, amount, f"{IG} --steps {amount} {common}"))
        shap = f"{SHAP} --samples {amount} --background {background} {common}"
        found[f"{SHAP} --samples N"].append(run(setting, amount, shap))
    (setting.folder / "grown.safetensors").unlink()
    return found


def rows(found: dict[str, list[Point]]) -> Iterator[str]:
    """Lines of a table; what one more costs is told between one line and the next."""
    for name, points in found.items():
        for before, point in zip([None, *points], points, strict=False):
            more = ""
            if before is not None:
                more = f"{1e6 * (point.seconds - before.seconds) / (point.amount - before.amount):.0f}"
            peaks = ", ".join(f"{peak:.0f}" for peak in point.peaks)
            yield line([name, str(point.amount), f"{point.seconds:.2f}", more, peaks])


def draw(by_images: dict[str, list[Point]], by_points: dict[str, list[Point]], path: Path) -> None:
    """Time and memory over images, memory over steps and samples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    lines = ((by_images, "images", "s"), (by_images, "images", "MiB"), (by_points, "steps or samples", "MiB"))
    for axes, (found, across, up) in zip(panels, lines, strict=True):
        for name, points in found.items():
            values = [point.seconds if up == "s" else max(point.peaks) for point in points]
            axes.plot([point.amount for point in points], values, marker="o", label=name)
        axes.set(xlabel=across, ylabel="seconds" if up == "s" else "peak memory, MiB")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.legend(fontsize="x-small")
    panels[1].set_ylim(0, LIMIT)
    panels[2].set_ylim(0, LIMIT)
    panels[2].set_xscale("log")
    path.write_bytes(figures.render(figure, form=path.suffix[1:]))


def growth(setting: Setting, path: Path) -> str:
    """The table, in Markdown; the figure goes to `path`. One run each: what is to be seen is a line."""
    counts = (64, 128) if setting.quick else COUNTS if setting.full else COUNTS[:-1]
    by_images = over_images(setting, counts)
    by_points = over_points(setting, (2, 4) if setting.quick else (8, 32, 128))
    draw(by_images, by_points, path)
    highest = max(by_images[f"{ATTACK} | rb-score"][0].peaks)
    heads = ["", "images, steps or samples", "s", "µs for one more", "peak MiB of each process"]
    lines = [f"## Growth\n\n![growth]({path.name})\n", line(heads), "|---" * len(heads) + "|"]
    lines += [*rows(by_images), *rows(by_points), ""]
    lines.append(f"The pipe over {counts[-1]} images: {highest:.0f} MiB in its larger process; asked for {LIMIT:.0f}.")
    return "\n".join(lines) + "\n"
