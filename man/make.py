"""Man pages and completions: options from the commands, prose from man/*.in.

A page `NAME.SECTION.in` is plain text in a small markup; `python man/make.py` writes `NAME.SECTION` beside it, and
completions for bash, zsh and fish under man/completions/. The output depends on nothing but the sources.

    ## HEADING      a section
    @HOLE ...@      SYNOPSIS, SUMMARY, OPTIONS, EXIT N..., METRICS, DUMP: made from the program (see HOLES)
        command     indented by four: an example, kept as it is
    TERM            with the next line beginning `: ` an entry of a list
    `code`, *word*  bold, italic; options (--eps) and pages (rb-train(1)) are set bold by themselves

Examples become blocks between .EX and .EE. Each line is a complete shell command; one that ends in a backslash goes on
in the next. Those of the section EXAMPLES are run by the tests, in order, in a folder that holds the files they name.
"""

from __future__ import annotations

import importlib
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RELEASED = "2026-11-24"  # of this version; by hand, as pages must not depend on the day on which they are made
TITLES = {"1": "User Commands", "5": "File Formats", "7": "Conventions"}
ALWAYS = (0, 1, 2)  # statuses that every command can end with
WORDS = {"rb-data": "SOURCES", "rb-model": "ACTIONS"}  # constants that hold what the first argument may be
EXTRA = {"--device": ["auto", "cpu", "cuda"], "--arch": ["resnet8", "resnet18"]}


# ---------------------------------------------------------------------------------------------------- commands


def scripts() -> list[str]:
    """Names of the console scripts, in the order of pyproject.toml."""
    return list(tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["scripts"])


def module(name: str) -> Any:
    """The module of a command."""
    return importlib.import_module(f"rbkit.cli.{name.removeprefix('rb-')}")


def parameters(name: str, kind: str) -> list[Any]:
    """The options or arguments of a command, as it parses them."""
    found = module(name).main.command().params
    return [p for p in found if p.param_type_name == kind and not getattr(p, "hidden", False)]


def names_of(option: Any) -> list[str]:
    """Spellings of an option, short ones first."""
    return sorted([*option.opts, *option.secondary_opts], key=lambda text: text.startswith("--"))


def choices(option: Any) -> list[str]:
    """Words that a value may be, from a metavar such as l2|linf."""
    words = [w for w in (option.metavar or "").split("|") if re.fullmatch(r"[a-z0-9][a-z0-9-]*", w)]
    extra = next((EXTRA[name] for name in option.opts if name in EXTRA and option.metavar == "NAME"), [])
    return words + extra


def takes_files(option: Any) -> bool:
    """Whether a value names a file or folder."""
    return bool({"FILE", "DIR", "DIR/", "MODEL"} & set((option.metavar or "").split("|")))


# ---------------------------------------------------------------------------------------------------- roff


def escaped(text: str) -> str:
    """Text that roff prints as it is; hyphens are not escaped."""
    text = text.replace("\\", r"\e")
    return r"\&" + text if text[:1] in (".", "'") else text


def bold(text: str) -> str:
    """Text to be typed, in bold."""
    return rf"\fB{text.replace('-', chr(92) + '-')}\fR"


def inline(text: str) -> str:
    """A line of prose: code, words, options and pages set in their fonts."""
    kept: list[str] = []

    def keep(roff: str) -> str:
        kept.append(roff)
        return f"\0{len(kept) - 1}\0"

    text = escaped(text)
    text = re.sub(r"`([^`]+)`", lambda m: keep(bold(m[1])), text)
    text = re.sub(r"\b(rb-[a-z]+|rbkit(?:-cluster)?)\(([157])\)", lambda m: keep(bold(m[1]) + f"({m[2]})"), text)
    text = re.sub(r"(?<![\w-])(--?[a-z][a-z0-9-]*)", lambda m: keep(bold(m[1])), text)
    text = re.sub(r"(?<![\w*])\*([^*\s][^*]*)\*", lambda m: keep(rf"\fI{m[1]}\fR"), text)
    return re.sub("\0(\\d+)\0", lambda m: kept[int(m[1])], text)


def example(lines: list[str]) -> list[str]:
    """Lines as they are, in a block that keeps them."""
    shown = [
        escaped(line).replace("-", r"\-").replace("'", r"\(aq").replace("~", r"\(ti").replace("^", r"\(ha")
        for line in lines
    ]
    return [".PP", ".RS 4", ".EX", *shown, ".EE", ".RE"]


# ---------------------------------------------------------------------------------------------------- holes


def synopsis(name: str, _: str) -> list[str]:
    """The command with its required options and its arguments."""
    words = [bold(name), r"[\fIoption\fR ...]"]
    words += [f"{bold(names_of(p)[0])} \\fI{p.metavar}\\fR" for p in parameters(name, "option") if p.required]
    words += [re.sub(r"[A-Z]+", lambda m: rf"\fI{m[0]}\fR", p.metavar) for p in parameters(name, "argument")]
    return [" ".join(words)]


def summary(name: str, _: str) -> list[str]:
    """The docstring of the command: what --help says."""
    return list(prose(module(name).main.command().help.splitlines()))


def _limits(option: Any) -> str:
    low, high = getattr(option, "min", None), getattr(option, "max", None)
    if low is None:
        return ""
    return f"At least {low:g}." if high is None or high > 2**60 else f"{low:g} to {high:g}."


def _default(option: Any) -> str:
    if option.show_default is False or option.multiple or option.default is None or option.default is False:
        return ""
    if option.secondary_opts:
        return f"Default: {option.opts[0]}."
    return f"Default: `{option.default}`."


def _entry(option: Any) -> list[str]:
    value = "" if option.is_flag or not option.metavar else rf" \fI{option.metavar}\fR"
    head = ", ".join(bold(name) + value for name in names_of(option))
    text = [option.help, _limits(option), _default(option)]
    text += ["Required."] if option.required else []
    text += [f"Also from the environment: `{option.envvar}`."] if option.envvar else []
    return [".TP", head, *(inline(t) for t in text if t)]


def options(name: str, _: str) -> list[str]:
    """Arguments, then options, in the order in which the command declares them."""
    lines: list[str] = []
    for argument in parameters(name, "argument"):
        shown = re.sub(r"[A-Z]+", lambda m: rf"\fI{m[0]}\fR", argument.metavar)
        lines += [".TP", shown, inline(argument.help)]
    for option in parameters(name, "option"):
        lines += _entry(option)
    return [*lines, ".TP", bold("--help"), "Show a short help and exit."]


def meanings() -> dict[int, str]:
    """Exit statuses and what they mean, from the classes that carry them."""
    from rbkit.cli import _errors

    found = {0: "Done, also when nothing was left to do.", 1: "A bug in rbkit."}
    for kind in _errors.Failure.__subclasses__():
        found[kind.status] = (kind.__doc__ or "").strip()
    return dict(sorted(found.items()))


def exits(_: str, text: str) -> list[str]:
    """The statuses that matter to a command; without numbers all of them."""
    table = meanings()
    wanted = sorted({*ALWAYS, *map(int, text.split())}) if text else list(table)
    lines = [line for status in wanted for line in (".TP", str(status), inline(table[status]))]
    return [*lines, ".TP", "128+n", "Died by signal n: 130 Ctrl-C, 141 a closed pipe, 143 TERM."]


def metrics(_: str, kind: str) -> list[str]:
    """The metrics of a kind of stream: name, unit, better direction, source."""
    from rbkit.tools.metrics import METRICS

    lines = []
    for name, entry in METRICS.items():
        if entry.kind == kind or (entry.kind == "any" and kind == "adversarial"):
            text = _first_line(entry)
            slow = "" if entry.default else " Only by name."
            known = entry.source == "-" or entry.source.split()[0] in text
            source = "" if known else f" {entry.source[0].upper()}{entry.source[1:]}."
            lines += [
                ".TP",
                bold(name),
                inline(f"{text} Unit {entry.unit}; {entry.better} is better.{source}{slow}"),
            ]
    return lines


def _first_line(entry: Any) -> str:
    """The first paragraph of a docstring, without the numbers (M2) that refer to notes of ours."""
    text = " ".join((entry.function.__doc__ or "").strip().split("\n\n")[0].split())
    text = re.sub(r" \([A-Z]\d+\)", "", text)
    return text if text[-1:] in (".", "?") else text + "."


def document() -> bytes:
    """The document of the example: one grey image of 2 x 3 pixels with its label and id."""
    import numpy as np

    from rbkit.formats.document import encode

    arrays = {
        "id": np.array([7], np.int64),
        "image": np.array([[[[0, 51, 102], [153, 204, 255]]]], np.uint8),
        "label": np.array([1], np.int64),
    }
    meta = {
        "kind": "images", "part": {"index": 1, "last": True}, "first": 0, "count": 1, "total": 1,
        "classes": ["cat", "dog"], "history": [],
    }  # fmt: skip
    return b"".join(encode(arrays, meta))


def dump(_: str, __: str) -> list[str]:
    """The bytes of the example: offset, 16 bytes, and the same as ASCII."""
    raw = document()
    lines = []
    for start in range(0, len(raw), 16):
        row = raw[start : start + 16]
        text = "".join(chr(b) if 32 <= b < 127 else "." for b in row)
        lines.append(f"{start:04x}  {row.hex(' '):<47}  {text}")
    return example(lines)


HOLES: dict[str, Callable[[str, str], list[str]]] = {
    "SYNOPSIS": synopsis, "SUMMARY": summary, "OPTIONS": options, "EXIT": exits, "METRICS": metrics, "DUMP": dump,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- pages


def prose(lines: list[str], name: str = "") -> Iterator[str]:
    """The markup as roff."""
    at, paragraph, fresh = 0, False, True
    while at < len(lines):
        line = lines[at]
        following = lines[at + 1] if at + 1 < len(lines) else ""
        if line.startswith("## "):
            yield f".SH {line[3:]}"
            paragraph, fresh = False, True
        elif hole := re.fullmatch(r"@([A-Z]+) ?(.*)@", line):
            yield from HOLES[hole[1]](name, hole[2])
            paragraph, fresh = False, False
        elif line.startswith("    "):
            end = next((i for i in range(at, len(lines)) if not lines[i].startswith("    ")), len(lines))
            yield from example([kept[4:] for kept in lines[at:end]])
            at, paragraph, fresh = end - 1, False, False
        elif following.startswith(": "):
            yield from (".TP", inline(line), inline(following[2:]))
            at, paragraph, fresh = at + 1, True, False
        elif not line.strip():
            paragraph = False
        else:
            if not paragraph and not fresh:
                yield ".PP"
            yield inline(line.strip())
            paragraph, fresh = True, False
        at += 1


def page(source: Path) -> str:
    """A page from its source; the first line is `NAME - what it is`."""
    from rbkit.cli import __version__

    name, _, section = source.stem.rpartition(".")
    head, *lines = source.read_text().splitlines()
    left, _, what = head.partition(" - ")
    top = [
        rf".\" Made by man/make.py from man/{source.name}; change that, or the command, and run make man.",
        f'.TH {name.upper().replace("-", chr(92) + "-")} {section} {RELEASED} "rbkit {__version__}" "rbkit: {TITLES[section]}"',
        ".SH NAME",
        left.replace("-", r"\-") + r" \- " + what,
    ]
    return "\n".join([*top, *prose(lines, name)]) + "\n"


# ---------------------------------------------------------------------------------------------------- completions


# Per answer rather than for all: a choice such as test would become test/ where a folder is called so.
FILES = "compopt -o filenames 2>/dev/null; "


def _quoted(text: str) -> str:
    return "'" + text.replace("'", r"'\''") + "'"


def first_words(name: str) -> list[str]:
    """What the first argument may be, where it is a word."""
    return list(getattr(module(name), WORDS[name])) if name in WORDS else []


def bash(name: str) -> str:
    """bash-completion: choices after options that have some, files after those that take one."""
    found = parameters(name, "option")
    every = " ".join(sorted({n for p in found for n in names_of(p)} | {"--help"}))
    cases = []
    for option in (p for p in found if not p.is_flag):
        words = f"-W {_quoted(' '.join(choices(option)))} " if choices(option) else ""
        files = "-f " if takes_files(option) else ""
        reply = f'{FILES if files else ""}mapfile -t COMPREPLY < <(compgen {words}{files}-- "$cur"); '
        reply = reply if words or files else ""
        cases.append(f"        {'|'.join(names_of(option))}) {reply}return ;;")
    function = name.replace("-", "_")
    first = [
        "    elif [[ $COMP_CWORD -eq 1 ]]; then",
        f'        mapfile -t COMPREPLY < <(compgen -W {_quoted(" ".join(first_words(name)))} -- "$cur")',
    ]
    return "\n".join([
        f"# bash completion of {name}; made by man/make.py",
        f"_{function}() {{",
        "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}",
        "    if [[ $cur == = ]]; then cur=; elif [[ $prev == = ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi",
        "    COMPREPLY=()",
        "    case $prev in",
        *cases,
        "    esac",
        "    if [[ $cur == -* ]]; then",
        f'        mapfile -t COMPREPLY < <(compgen -W {_quoted(every)} -- "$cur")',
        *(first if first_words(name) else []),
        "    else",
        f'        {FILES}mapfile -t COMPREPLY < <(compgen -f -- "$cur")',
        "    fi",
        "}",
        f"complete -F _{function} {name}",
        "",
    ])  # fmt: skip


def zsh(name: str) -> str:
    """A zsh completion function."""
    lines = []
    for option in parameters(name, "option"):
        text = re.sub(r"([\[\]:])", r"\\\1", option.help)
        value = ""
        if not option.is_flag:
            action = f"({' '.join(choices(option))})" if choices(option) else "_files" if takes_files(option) else ""
            value = f":{re.sub(r'[^A-Za-z0-9]+', ' ', option.metavar or 'value').strip()}:{action}"
        star = "*" if option.multiple else ""
        for spelling in names_of(option):
            joint = "=" if value and spelling.startswith("--") else ""  # --norm l2 and --norm=l2
            lines.append(f"  {_quoted(f'{star}{spelling}{joint}[{text}]{value}')} \\")
    words = first_words(name)
    lines += [f"  {_quoted(f'1:word:({chr(32).join(words)})')} \\"] if words else []
    return "\n".join(
        [
            f"#compdef {name}",
            "# made by man/make.py",
            "_arguments \\",
            *lines,
            "  '--help[Show a short help and exit.]' \\",
            "  '*:file:_files'",
            "",
        ]
    )


def fish(name: str) -> str:
    """fish completions."""
    lines = [f"# fish completion of {name}; made by man/make.py"]
    if words := first_words(name):
        lines.append(f"complete -c {name} -n '__fish_is_first_arg' -a {_quoted(' '.join(words))}")
    for option in parameters(name, "option"):
        flags = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in names_of(option))
        value = ""
        if not option.is_flag:
            value = (
                f" -x -a {_quoted(' '.join(choices(option)))}"
                if choices(option)
                else " -r"
                if takes_files(option)
                else " -x"
            )
        lines.append(f"complete -c {name} {flags}{value} -d {_quoted(option.help)}")
    return "\n".join([*lines, f"complete -c {name} -l help -d 'Show a short help and exit.'", ""])


# ---------------------------------------------------------------------------------------------------- all


def outputs() -> dict[Path, str]:
    """Every file that is made, with its content."""
    made = {source.with_suffix(""): page(source) for source in sorted(HERE.glob("*.in"))}
    for name in scripts():
        made[HERE / "completions" / "bash" / name] = bash(name)
        made[HERE / "completions" / "zsh" / f"_{name}"] = zsh(name)
        made[HERE / "completions" / "fish" / f"{name}.fish"] = fish(name)
    return made


def main() -> None:
    """Write what has changed."""
    for path, content in outputs().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != content:
            path.write_text(content)


if __name__ == "__main__":
    main()
