"""The history of an output: one entry per tool, like the @PG lines of samtools, without clock, host, user or path."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rbkit.cli import __version__
from rbkit.cli._options import UNRECORDED

POSITIONAL = {"kind"}  # parameters that stand on the command line without their name


def recorded(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that reach the history: all that shape the result, defaults filled in, under their long names."""
    kept = {k.rstrip("_"): v for k, v in options.items() if k not in UNRECORDED and k != "seed" and v is not None}
    return dict(sorted(kept.items()))


def entry(
    tool: str,
    options: Mapping[str, Any],
    *,
    parents: Sequence[str] = (),
    model: str | None = None,
    inputs: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """An entry of the history; its id is a digest of all the rest."""
    body: dict[str, Any] = {
        "parents": list(parents), "tool": tool, "version": __version__, "params": recorded(options),
        "seed": options.get("seed"), "model": model, "inputs": dict(inputs or {}),
    }  # fmt: skip
    return _with_id(body)


def _with_id(body: dict[str, Any]) -> dict[str, Any]:
    from rbkit.formats.document import digest  # here: it loads numpy, which --help does not need

    return {"id": digest(body)[:16], **body}


def extended(history: Sequence[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The history with `new` at its end, linked to the last entry before it."""
    parents = [history[-1]["id"]] if history else []
    body = {key: value for key, value in new.items() if key != "id"} | {"parents": parents}
    return [*history, _with_id(body)]


def passed_on(meta: Mapping[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The metadata that an output takes over from its input, with `new` at the end of the history."""
    kept = {key: value for key, value in meta.items() if key not in ("part", "sha256")}
    return kept | {"history": extended(meta.get("history") or [], new)}


def broken_link(history: Any) -> str | None:
    """What is wrong with a history, or None: each entry must hold its own digest and name the one before it."""
    if not isinstance(history, list) or not all(isinstance(e, dict) for e in history):
        return "the history is no list of entries"
    before: list[str] = []
    for number, known in enumerate(history, 1):
        body = {key: value for key, value in known.items() if key != "id"}
        if _with_id(body)["id"] != known.get("id"):
            return f"entry {number} was changed: its id is not that of what it says"
        if known.get("parents") != before:
            return f"entry {number} does not follow entry {number - 1}"
        before = [str(known["id"])]
    return None


def command(step: dict[str, Any]) -> str:
    """The shell line of a history entry; inputs and outputs are named by the caller."""
    words = [str(step.get("tool"))]
    params = dict(step.get("params") or {})
    words += [shlex.quote(str(params.pop(name))) for name in sorted(POSITIONAL & set(params))]
    if step.get("seed") is not None:
        params["seed"] = step["seed"]
    for name, value in sorted(params.items()):
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [flag] if value else []
        elif isinstance(value, list):
            words += [part for item in value for part in (flag, shlex.quote(str(item)))]
        else:
            words += [flag, shlex.quote(str(value))]
    return " ".join(words)


def replay_lines(history: list[dict[str, Any]]) -> str:
    """A history as a pipeline; models and side files appear as variables named after their digests."""
    lines = []
    for step in history:
        line = command(step)
        if step.get("model"):
            line += f' -m "$MODEL_{step["model"][:8]}"'
        for option, sha in sorted((step.get("inputs") or {}).items()):
            line += f' --{option.replace("_", "-")} "$INPUT_{sha[:8]}"'
        lines.append(line)
    return " |\n    ".join(lines)
