"""The installed commands as a user calls them: at their defaults, in a pipe, and their start."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import entry_points

from bed import BLOCK, Setting, command, passes
from contenders_attack import STEPS
from harness import Group, Told, ratio

PYTHON = sys.executable
TYPER = "import typer\ndef main(name: str, count: int = 1): ...\ntyper.run(main)\n"
SMALL = 64  # images of the pipe that tells what starting it takes
# In the pipe rb-attack judges an image and its last iterate; rb-score the image, the result and that in 8 bits.
FORWARDS = 5


def defaults(setting: Setting) -> Iterator[Group]:
    """Commands at their defaults, start-up included."""
    model, stream = setting.model("robust").name, setting.stream(setting.images).name
    lines = {
        "python -c 'import torch' (start of all below)": f"{PYTHON} -c 'import torch'",
        "rb-attack": f"rb-attack {stream} -m {model} -q -o adv.safetensors",
        "rb-saliency --method ig": f"rb-saliency {stream} -m {model} --method ig -q -o ig.safetensors",
        "rb-attack | rb-score": f"rb-attack {stream} -m {model} -q | rb-score -m {model} -q --json",
    }
    contenders = {name: functools.partial(command, line, setting.folder) for name, line in lines.items()}
    yield Group("Installed commands at their defaults", setting.images, contenders, rounds=3)


def pipe(setting: Setting) -> Iterator[Group]:
    """An attack without early exit through a pipe of three commands, against the passes that it makes, in process."""
    count = setting.size(10_000 if setting.full else 2_000) + SMALL
    model = setting.model("robust").name

    def through(images: int) -> None:
        stream = setting.agreed_stream("robust", images).name
        command(f"cat {stream} | rb-attack -m {model} --until end -q | rb-score -m {model} -q --json", setting.folder)

    names = {images: f"cat | rb-attack --until end | rb-score, {images} images" for images in (count, SMALL)}
    for images in names:
        setting.agreed_stream("robust", images)
    floor = functools.partial(passes, setting.bed("robust", count), STEPS, FORWARDS)

    def shares(group: Group) -> str:
        """The pipe against the floor, with and without what it takes to start it."""
        least, whole, short = (group.seconds[key] for key in ("floor", names[count], names[SMALL]))
        more = [long - start for long, start in zip(whole, short, strict=True)]
        going = ratio(least, more) * (count - SMALL) / count
        return (
            f"The floor is {STEPS} gradient and {FORWARDS} forward passes an image, {BLOCK} at a time. Of it: "
            f"{100 * going:.0f} % by what more images take, {100 * ratio(least, whole):.0f} % with the start."
        )

    yield Group(
        f"PGD-{STEPS} without early exit through a pipe of three commands", count,
        {name: functools.partial(through, images) for images, name in names.items()}, floors={"floor": floor},
        reference=names[count], rounds=3, warm=False, asked="90 % of the floor", after=shares,
    )  # fmt: skip


def first_byte(line: str, setting: Setting) -> Told:
    """Seconds until a line of shell says something."""
    begin = time.perf_counter()
    with subprocess.Popen(["bash", "-o", "pipefail", "-c", line], cwd=setting.folder, stdout=subprocess.PIPE) as shell:
        assert shell.stdout is not None
        said = shell.stdout.read(1)
        seconds = time.perf_counter() - begin
        shell.stdout.read()
    if shell.returncode or not said:
        raise RuntimeError(f"status {shell.returncode}")
    return Told(seconds=seconds)


def starts(setting: Setting) -> Iterator[Group]:
    """Help of every command against a bare typer program; the first result of a pipe against importing torch thrice."""
    setting.folder.mkdir(parents=True, exist_ok=True)
    (setting.folder / "bare.py").write_text(TYPER)
    names = sorted(script.name for script in entry_points(group="console_scripts") if script.name.startswith("rb-"))
    lines = {"a bare typer program": f"{PYTHON} bare.py --help"} | {name: f"{name} --help" for name in names}
    contenders = {name: functools.partial(command, line, setting.folder) for name, line in lines.items()}
    yield Group("Start: --help", 1, contenders, reference="a bare typer program", asked="1.5 times at most")

    model, stream = setting.model("robust").name, setting.stream(SMALL).name
    imports = " | ".join([f"{PYTHON} -c 'import torch'"] * 3)
    attack, score = f"rb-attack -m {model} --steps 1 -q", f"rb-score -m {model} -q --json"
    pipes = {
        "rb-data | rb-attack | rb-score": f"rb-data shapes --n {SMALL} -q | {attack} | {score}",
        "rb-attack | rb-saliency | rb-score": f"{attack} {stream} | rb-saliency -m {model} --method gradient -q | {score}",
    }
    yield Group(
        "Start: first result of a pipe of three commands", SMALL,
        {"torch imported three times at once": functools.partial(command, imports, setting.folder)}
        | {name: functools.partial(first_byte, line, setting) for name, line in pipes.items()},
        reference="torch imported three times at once", rounds=3, asked="1.3 times at most",
    )  # fmt: skip
