"""What the documents say is run: commands, shell examples, the Python example, links."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest
from conftest import environment, execute, shell

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "man").glob("*.[157]"))
SCRIPTS = sorted(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])
LONG = {
    "make study": "minutes; .ci/run and a fresh clone run it",
    "make paper": "minutes to days, and images that are not here; tests/test_paper.py has its graph",
    "make test": "this very run",
    "make setup": "installs packages",
    "cifar10": "needs CIFAR-10",
    "fashion-mnist": "needs a package that not every machine has",
    "--download": "needs a network",
    "sbatch": "needs Slurm; tests/cluster runs the same",
    "cluster/study.sh": "needs Slurm; tests/cluster runs it",
    "less": "needs a terminal",
}
# What the examples ask of GNU parallel, for machines that have none: the same jobs, one after the other.
PARALLEL = """#!/bin/sh
while :; do
    case $1 in
        --joblog | -j) shift 2 ;;
        --resume-failed) shift ;;
        *) break ;;
    esac
done
exec xargs -I '{}' "$@"
"""


def blocks(text: str, language: str) -> list[str]:
    """Fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def man_examples(text: str) -> list[str]:
    """Command lines between .EX and .EE of a page's EXAMPLES section, roff escapes undone."""
    section = text.partition("\n.SH EXAMPLES")[2].partition("\n.SH ")[0]
    found = []
    for block in re.findall(r"^\.EX\n(.*?)^\.EE", section, flags=re.M | re.S):
        plain = (
            block.replace(r"\e", "\\")
            .replace(r"\-", "-")
            .replace(r"\(aq", "'")
            .replace(r"\(ti", "~")
            .replace(r"\&", "")
        )
        plain = plain.replace("\\(dq", '"').replace("\\(ha", "^").replace("\\\n", " ")
        found += [line.removeprefix("$ ").strip() for line in plain.splitlines() if line.strip()]
    return found


def commands(lines: list[str]) -> list[str]:
    """Lines without comments and without those that are skipped for a reason."""
    kept = [line.partition("   #")[0].strip() for line in lines]
    return [line for line in kept if line and not line.startswith("#") and not any(word in line for word in LONG)]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file that the examples name."""
    here = tmp_path_factory.mktemp("docs")
    setup = """
    rb-data shapes --split train --n 192 -o train.safetensors
    rb-data shapes --n 40 -o test.safetensors
    rb-train train.safetensors --width 4 --epochs 1 -q -o standard.safetensors
    rb-train train.safetensors --width 4 --epochs 1 --eps 0.5 --steps 1 -q -o robust.safetensors
    rb-attack test.safetensors -m robust.safetensors --steps 2 -q -o adv.safetensors
    rb-saliency test.safetensors -m robust.safetensors -q -o sal.safetensors
    rb-invert test.safetensors -m robust.safetensors --steps 2 -q -o inv.safetensors
    rb-attack test.safetensors -m robust.safetensors --steps 2 --shard 1/2 -q -o a.safetensors
    rb-attack test.safetensors -m robust.safetensors --steps 2 --shard 2/2 -q -o b.safetensors
    rb-score adv.safetensors -m robust.safetensors -q > scores.jsonl
    rb-view test.safetensors -o pictures/
    cp pictures/000000.png cat.png; cp pictures/000001.png dog.png
    for s in train test; do for c in cat dog; do mkdir -p DIR/$s/$c; cp pictures/00000[2-5].png DIR/$s/$c; done; done
    """
    result = shell("set -e\n" + setup, cwd=here)
    assert result.status == 0, result.err
    import torch

    from rbkit.tools.architectures import build

    torch.save({"state_dict": build("resnet8", num_classes=8).state_dict()}, here / "weights.pt")
    return here


@pytest.fixture
def place(stock: Path, tmp_path: Path) -> Path:
    """A copy of its own for every page: one page's rb-train must not replace the model that another's attack is of."""
    return shutil.copytree(stock, tmp_path / "place")


@pytest.fixture
def searched(tmp_path: Path) -> str:
    """Where the shell looks for programs: the usual places, and last a stand-in for GNU parallel."""
    stand_in = tmp_path / "programs" / "parallel"
    stand_in.parent.mkdir()
    stand_in.write_text(PARALLEL)
    stand_in.chmod(0o755)
    return f"{environment()['PATH']}:{stand_in.parent}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_is_documented_and_names_itself(name: str) -> None:
    assert f"`{name}`" in (ROOT / "README.md").read_text()
    assert (ROOT / "man" / f"{name}.1").exists()
    result = execute(name, "--help")
    assert result.status == 0 and f"Usage: {name} ".encode() in result.out
    assert execute(name, "--version").out.startswith(f"{name} (rbkit) ".encode())


@pytest.mark.parametrize("name", SCRIPTS)
def test_options_of_help_and_man_page_agree(name: str) -> None:
    shown = set(re.findall(r"--[a-z][a-z0-9-]+", execute(name, "--help").out.decode()))
    page = (ROOT / "man" / f"{name}.1").read_text().replace(r"\-", "-")
    options = page.partition("\n.SH OPTIONS")[2].partition("\n.SH ")[0]
    assert shown - {"--help"} == set(re.findall(r"--[a-z][a-z0-9-]+", options)) - {"--help"}


def test_readme_examples_run(place: Path) -> None:
    lines = [line for block in blocks((ROOT / "README.md").read_text(), "sh") for line in block.splitlines()]
    for line in commands(lines):
        result = shell(line, cwd=place)
        assert result.status == 0, f"{line}\n{result.err}"


def test_readme_python_runs(place: Path) -> None:
    (code,) = blocks((ROOT / "README.md").read_text(), "python")
    (place / "example.py").write_text(code)
    result = shell("python example.py", cwd=place)
    assert result.status == 0 and b"torch.Size([5, 3, 32, 32])" in result.out, result.err


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_man_examples_run(page: Path, place: Path, searched: str) -> None:
    for line in commands(man_examples(page.read_text())):
        result = shell(line, cwd=place, PATH=searched)
        assert result.status == 0, f"{line}\n{result.err}"


def test_promises_are_made_and_have_tests() -> None:
    """Each row of docs/promises.md: the page says what is quoted, and the test exists."""
    rows = re.findall(
        r"^\| (?!promise|-)(.*) \| (\S+) \| (\S+)::(\S+) \|$", (ROOT / "docs" / "promises.md").read_text(), flags=re.M
    )
    assert len(rows) > 50
    for promise, page, file, test in rows:
        quoted = re.findall(r'"(.*?)"', promise.replace(r"\|", "|"))
        said = re.sub(r"\\f[BIR]|\\&", "", (ROOT / "man" / page).read_text()).replace(r"\-", "-")
        assert all(words.lower() in " ".join(said.split()).lower() for words in quoted), (page, promise)
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), test


@pytest.mark.parametrize("name", ["README.md", "DESIGN.md", "CONTRIBUTING.md"])
def test_links_resolve(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target
