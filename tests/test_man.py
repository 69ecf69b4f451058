"""Man pages and completions: made from the commands, up to date, clean, true, and in the wheel."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

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


def text_of(page: str) -> str:
    """A page without fonts and escapes."""
    raw = re.sub(r"\\f[BIR]", "", (MAN / page).read_text()).replace(r"\-", "-").replace(r"\(aq", "'")
    return raw.replace(r"\&", "").replace(r"\e", "\\")


def section(page: str, head: str) -> str:
    """The lines of a section."""
    found = text_of(page).partition(f"\n.SH {head}\n")[2].partition("\n.SH ")[0]
    assert found, f"{page} has no section {head}"
    return found


def terms(text: str) -> list[str]:
    """The heads of the entries of a list."""
    return re.findall(r"^\.TP\n(.*)$", text, flags=re.M)


def parameters(name: str) -> list[Any]:
    """What a command parses."""
    return list(make.module(name).main.command().params)


def test_pages_and_completions_are_up_to_date() -> None:
    made = make.outputs()
    stale = [p.name for p, content in made.items() if not p.exists() or p.read_text() != content]
    assert not stale, "run make man and commit"
    kept = {*MAN.glob("*.[157]"), *(p for p in (MAN / "completions").rglob("*") if p.is_file())}
    assert kept == set(made)


def test_every_command_has_a_page() -> None:
    names = {p.name for p in PAGES}
    assert {f"{name}.1" for name in SCRIPTS} | {"rb-stream.5", "rbkit.7", "rbkit-cluster.7"} == names


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_mandoc_has_nothing_to_say(page: Path) -> None:
    if shutil.which("mandoc") is None:
        pytest.skip("mandoc is not installed: the pages were NOT checked")
    result = shell(f"mandoc -Tlint -Wwarning {page}")
    assert (result.status, result.out) == (0, b"")
    # Markup of the sources must not reach a reader.
    shown = shell(f"mandoc -Tutf8 {page} | col -b").out.decode()
    assert "EXAMPLES" in shown and not re.search(r"@[A-Z]+|`(?!rb-)|^\s*## |\\f[BIR]|(?<!\w)\*[a-z]", shown)


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


def test_the_date_of_pages_is_fixed_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Later:
            return cls(2039, 5, 17, tzinfo=tz)

    before = make.outputs()
    monkeypatch.setattr(datetime, "datetime", Later)
    monkeypatch.setattr("time.time", lambda: 2_189_000_000.0)
    assert make.outputs() == before
    assert all(f" {make.RELEASED} " in page.read_text().splitlines()[1] for page in PAGES)


@pytest.mark.parametrize("page", [p.name for p in PAGES])
def test_sections_stand_in_the_usual_order(page: str) -> None:
    heads = re.findall(r"^\.SH (.*)$", (MAN / page).read_text(), flags=re.M)
    usual = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "ENVIRONMENT", "EXAMPLES", "SEE ALSO"]
    kept = [head for head in heads if head in usual]
    assert kept == sorted(kept, key=usual.index) and len(set(heads)) == len(heads)
    assert {"NAME", "DESCRIPTION", "EXAMPLES", "SEE ALSO"} <= set(heads)
    assert not page.endswith(".1") or {"SYNOPSIS", "OPTIONS", "EXIT STATUS"} <= set(heads)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_spelling_of_every_option_is_an_entry(name: str) -> None:
    found = {
        word
        for head in terms(section(f"{name}.1", "OPTIONS"))
        for word in re.findall(r"(?<!\w)--?[a-z][a-z0-9-]*", head)
    }
    spelt = {word for p in parameters(name) if p.param_type_name == "option" for word in (*p.opts, *p.secondary_opts)}
    assert found == spelt | {"--help"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_required_options_and_arguments_stand_in_the_synopsis(name: str) -> None:
    synopsis = section(f"{name}.1", "SYNOPSIS")
    assert synopsis.startswith(f"{name} [option ...]")
    for param in parameters(name):
        if param.param_type_name == "argument":
            assert param.metavar in synopsis
        elif param.required:
            assert f"{param.opts[0]} {param.metavar}" in synopsis


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_texts_are_sentences(name: str) -> None:
    for param in parameters(name):
        assert param.help and param.help.endswith("."), f"{name}: {param.name}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_pages_name_the_statuses_that_their_code_raises(name: str) -> None:
    from rbkit.cli import _errors

    source = (MAN.parent / "cli" / f"{name.removeprefix('rb-')}.py").read_text()
    kinds = {kind.__name__: kind.status for kind in _errors.Failure.__subclasses__()}
    # `Output` is also what the option is called; what raises or blames is meant.
    raised = {kinds[word] for word in re.findall(r"(?:raise |blame\()(\w+)", source) if word in kinds}
    assert {str(s) for s in raised | {0, 1, 2}} <= set(terms(section(f"{name}.1", "EXIT STATUS")))


def test_the_environment_is_what_the_code_reads() -> None:
    code = "".join(
        path.read_text() for folder in ("cli", "tools", "formats") for path in (MAN.parent / folder).glob("*.py")
    )
    read = set(re.findall(r"""(?:environ(?:\.get\(|\[)|getenv\(|envvar=)"(\w+)\"""", code))
    read |= set(re.findall(r'"((?:SLURM|LOCAL|WORLD|MASTER)_\w+|RANK)"', code))
    assert {"RB_THREADS", "RB_DEBUG", "RB_LOG", "TERM", "MAKEFLAGS", "RANK", "SLURM_JOB_ID"} <= read
    listed = {word for head in terms(section("rbkit.7", "ENVIRONMENT")) for word in head.split(", ")}
    # Besides these, what Python and rich honour by themselves.
    assert listed == read | {"NO_COLOR", "COLUMNS", "TMPDIR", "PYTHONPATH", "GOMP_SPINCOUNT"}


def test_every_command_is_introduced() -> None:
    heads = terms(section("rbkit.7", "DESCRIPTION"))
    assert heads == [f"{name}(1)" for name in SCRIPTS]


def test_kinds_dtypes_and_limits_are_those_of_the_code() -> None:
    from rbkit.formats import document

    page = " ".join(text_of("rb-stream.5").split())
    assert f"{', '.join(document.KINDS[:-1])}; or {document.KINDS[-1]}" in page
    assert f"headers above {document.MAX_HEADER:,} bytes, documents above {document.MAX_DOCUMENT >> 30} GiB" in page
    assert f"more than {document.MAX_TENSORS:,} tensors" in page and f"longer than {document.MAX_NAME} char" in page
    widths = {"U": (8, 16, 32, 64), "I": (8, 16, 32, 64), "F": (16, 32, 64)}
    named = {"BOOL", *(f"{letter}{width}" for letter, sizes in widths.items() for width in sizes)}
    assert named == set(document.DTYPES) and "BOOL, U8 to U64, I8 to I64, F16, F32, F64 and BF16" in page


@pytest.mark.parametrize("kind", ["adversarial", "attributions", "inversions"])
def test_every_metric_stands_in_the_page_of_the_judge(kind: str) -> None:
    from rbkit.tools.metrics import METRICS

    listed = terms(section("rb-score.1", "METRICS"))
    assert listed.count("clean_accuracy") == 1
    for name, entry in METRICS.items():
        if entry.kind == kind:
            assert listed.count(name) == 1, name


def test_dump_shows_what_the_code_writes_and_the_page_describes() -> None:
    rows = re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+?) {2,}(.*)$", section("rb-stream.5", "BYTES"), flags=re.M)
    raw = b""
    for offset, digits, shown in rows:
        assert int(offset, 16) == len(raw)
        raw += bytes.fromhex(digits)
        assert shown == "".join(chr(b) if 32 <= b < 127 else "." for b in bytes.fromhex(digits))
    assert raw == make.document()
    size = int.from_bytes(raw[:8], "little")
    meta = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["rb"])
    assert size % 8 == 0 and meta["sha256"] == hashlib.sha256(raw[8 + size :]).hexdigest()
    assert raw[8 + size :] == bytes([7, *bytes(7), 1, *bytes(7), 0, 51, 102, 153, 204, 255])
    assert set(meta) <= {word for head in terms(section("rb-stream.5", "METADATA")) for word in head.split(", ")}


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
    shown = set(re.findall(r"^ +(?:-\w, )?(--[a-z][a-z0-9-]*)", execute(name, "--help").out.decode(), flags=re.M))
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


def test_bash_offers_the_choices_of_each_option() -> None:
    for name in SCRIPTS:
        for param in parameters(name):
            if re.fullmatch(r"[a-z0-9-]+(\|[a-z0-9-]+)+", param.metavar or "") and not getattr(param, "is_flag", True):
                assert complete(name, param.opts[0], "") == set(param.metavar.split("|")), (name, param.name)


def test_bash_takes_files_where_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "robust.safetensors").touch()
    (tmp_path / "linf").mkdir()
    monkeypatch.chdir(tmp_path)
    assert complete("rb-attack", "-m", "ro") == complete("rb-attack", "ro") == {"robust.safetensors"}
    assert complete("rb-data", "png", "ro") == {"robust.safetensors"}
    assert complete("rb-data", "ro") == set()
    assert complete("rb-model", "") == {"import", "export", "show"}
    # With `-o filenames` for all, the choice linf would become linf/ here.
    assert complete("rb-attack", "--norm", "li") == {"linf"}
    for name in SCRIPTS:
        text = (MAN / "completions" / "bash" / name).read_text()
        assert "compopt -o filenames" in text and not re.search(r"^complete .*-o filenames", text, flags=re.M)


@pytest.mark.parametrize("name", SCRIPTS)
def test_zsh_and_fish_know_every_option(name: str) -> None:
    params = [p for p in parameters(name) if p.param_type_name == "option"]
    zsh = (MAN / "completions" / "zsh" / f"_{name}").read_text()
    fish = (MAN / "completions" / "fish" / f"{name}.fish").read_text()
    assert zsh.startswith(f"#compdef {name}\n")
    for word in (w for p in params for w in (*p.opts, *p.secondary_opts)):
        assert re.search(rf"'\*?{re.escape(word)}[=\[]", zsh), word
        flag = f"-l {word[2:]}" if word.startswith("--") else f"-s {word[1:]}"
        assert re.search(rf"^complete -c {name} .*{re.escape(flag)}(?= |$)", fish, flags=re.M), word


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
