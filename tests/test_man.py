"""Man pages and completions: made from the commands, up to date, clean, true, and in the wheel."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from conftest import execute, shell

MAN = Path(__file__).parent.parent / "man"
PAGES = sorted(MAN.glob("*.[157]"))


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_man", MAN / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _load()
SCRIPTS = make.scripts()


def test_pages_and_completions_are_up_to_date() -> None:
    made = make.outputs()
    stale = [p.name for p, content in made.items() if not p.exists() or p.read_text() != content]
    assert not stale, "run make man and commit"
    kept = {*MAN.glob("*.[157]"), *(p for p in (MAN / "completions").rglob("*") if p.is_file())}
    assert kept == set(made)


def test_every_command_has_a_page() -> None:
    names = {p.name for p in PAGES}
    assert {f"{name}.1" for name in SCRIPTS} | {"rb-stream.5", "rbkit.7"} == names


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_mandoc_has_nothing_to_say(page: Path) -> None:
    if shutil.which("mandoc") is None:
        pytest.skip("mandoc is not installed: the pages were NOT checked")
    result = shell(f"mandoc -Tlint -Wwarning {page}")
    assert (result.status, result.out) == (0, b"")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_refer_to_pages_that_exist(page: Path) -> None:
    found = re.findall(r"\\fB(rb[a-z\\-]+)\\fR\(([157])\)", page.read_text())
    assert found
    for name, section in found:
        assert (MAN / f"{name.replace(chr(92), '')}.{section}").exists(), (name, section)


def test_markup() -> None:
    lines = ["## HEAD", "Use `a-b`, *word* or --eps-x; see rb-info(1).", "", ".x", "", "    a '-b' \\"]
    assert list(make.prose(lines)) == [
        ".SH HEAD", r"Use \fBa\-b\fR, \fIword\fR or \fB\-\-eps\-x\fR; see \fBrb\-info\fR(1).",
        ".PP", r"\&.x", ".PP", ".RS 4", ".EX", r"a \(aq\-b\(aq \e", ".EE", ".RE",
    ]  # fmt: skip


def test_exit_table_has_every_status_once() -> None:
    assert list(make.meanings()) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 75]
    page = (MAN / "rbkit.7").read_text().partition(".SH EXIT STATUS")[2].partition(".SH ")[0]
    assert re.findall(r"^\.TP\n(\S+)", page, flags=re.M) == [*map(str, make.meanings()), "128+n"]


def test_bytes_of_the_stream_page_are_a_document(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    rows = re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} ?)+?) {2}", (MAN / "rb-stream.5").read_text(), flags=re.M)
    path = tmp_path / "example.safetensors"
    path.write_bytes(bytes.fromhex("".join(rows)))
    result = execute("rb-info", "--check", path)
    assert (result.status, result.out, result.err) == (0, b"", "")
    found = load_file(path)
    assert found["image"].tolist() == [[[[0, 51, 102], [153, 204, 255]]]]
    assert (found["id"].tolist(), found["label"].tolist()) == ([7], [1])


# ---------------------------------------------------------------------------------------------------- completions


def complete(name: str, *words: str) -> set[str]:
    """What bash offers for the last of `words`."""
    line = " ".join(f"'{word}'" for word in (name, *words))
    function = f"_{name.replace('-', '_')}"
    script = (
        f"source {MAN}/completions/bash/{name}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; "
        f'{function}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    result = shell(script)
    assert (result.status, result.err) == (0, "")
    return set(result.out.decode().split())


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_completion_registers_and_knows_every_option(name: str) -> None:
    result = shell(f"source {MAN}/completions/bash/{name}; complete -p {name}")
    assert result.status == 0 and f"-F _{name.replace('-', '_')} {name}".encode() in result.out
    shown = set(re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", execute(name, "--help").out.decode(), flags=re.M))
    assert "--help" in shown and shown <= complete(name, "-")


def test_bash_completion_offers_choices() -> None:
    assert complete("rb-attack", "--norm", "") == {"l2", "linf"}
    assert complete("rb-attack", "--norm", "=", "li") == {"linf"}
    assert complete("rb-saliency", "--target", "") == {"predicted", "label"}
    assert complete("rb-attack", "--unt") == {"--until"}
    assert "shapes" in complete("rb-data", "sh")
    assert complete("rb-model", "ex") == {"export"}
    assert complete("rb-attack", "--eps", "") == set()


@pytest.mark.parametrize("kind", ["zsh", "fish"])
def test_other_completions_parse(kind: str) -> None:
    if shutil.which(kind) is None:
        pytest.skip(f"{kind} is not installed: its completions were NOT checked")
    for path in sorted((MAN / "completions" / kind).iterdir()):
        assert shell(f"{kind} -n {path}").status == 0, path.name


# ---------------------------------------------------------------------------------------------------- the wheel


@pytest.mark.slow
def test_wheel_holds_pages_and_completions_and_no_foreign_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".venv", ".git", "out", "build", "*.egg-info", "__pycache__", "tests", ".*_cache")
    shutil.copytree(MAN.parent, source, ignore=ignored)
    words = ["wheel", "--quiet", "--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", *words, "-w", tmp_path, source], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    shared = {n.partition("/data/")[2] for n in names if ".data/data/" in n}
    expected = {f"share/man/man{p.suffix[1:]}/{p.name}" for p in PAGES}
    expected |= {f"share/bash-completion/completions/{name}" for name in SCRIPTS}
    expected |= {f"share/zsh/site-functions/_{name}" for name in SCRIPTS}
    expected |= {f"share/fish/vendor_completions.d/{name}.fish" for name in SCRIPTS}
    assert shared == expected
    assert {n.split("/")[0] for n in names if ".data/" not in n and ".dist-info/" not in n} == {"rbkit"}
    assert "rbkit/cli/attack.py" in names
