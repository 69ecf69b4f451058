"""Who may import whom, and what a command may load before it knows that it has work to do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import environment

ROOT = Path(__file__).parent.parent
LAYERS = {"cli": {"cli", "tools", "formats"}, "tools": {"tools"}, "formats": {"formats"}}
HEAVY = {"torch", "torchvision", "numpy", "PIL", "scipy", "matplotlib", "safetensors"}
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]


def modules(layer: str) -> list[Path]:
    """The files of a layer."""
    found = sorted((ROOT / layer).rglob("*.py"))
    assert len(found) > 5
    return found


def imports(tree: ast.AST, *, package: str = "", top: bool = False) -> Iterator[str]:
    """Full names of what is imported anywhere, or only when the module itself is (`top`)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not top:
            if re.fullmatch(r"rbkit\.[\w.]+", node.value):  # importlib.import_module("rbkit.x")
                yield node.value
        elif top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif top and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from imports(ast.Module(node.orelse, []), package=package, top=top)
        else:
            yield from imports(node, package=package, top=top)


def roots(path: Path, *, top: bool = False) -> set[str]:
    """First names of a file's imports; for our own packages `rbkit.layer`."""
    names = imports(ast.parse(path.read_text("utf-8")), package=f"rbkit.{path.parent.name}", top=top)
    return {".".join(n.split(".")[: 2 if n.startswith("rbkit") else 1]) for n in names}


def test_the_reader_of_imports_sees_them_all() -> None:
    text = (
        "import a.b, c\nfrom rbkit.tools import x\nfrom . import y\nif TYPE_CHECKING:\n    import d\nelse:\n    import e\n"
        "try:\n    import f\nexcept ImportError:\n    pass\nclass K:\n    import g\ndef h():\n    import i\n"
        "    importlib.import_module('rbkit.cli.z')\n"
    )
    tree = ast.parse(text)
    top = {"a.b", "c", "rbkit.tools.x", "rbkit.formats.y", "e", "f", "g"}
    assert set(imports(tree, package="rbkit.formats", top=True)) == top
    assert set(imports(tree, package="rbkit.formats")) == top | {"d", "i", "rbkit.cli.z"}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_import_only_what_lies_below(layer: str) -> None:
    allowed = {f"rbkit.{name}" for name in LAYERS[layer]}
    for path in modules(layer):
        ours = {name for name in roots(path) if name.split(".")[0] in {"rbkit", *LAYERS}}
        assert ours <= allowed, f"{path.name} imports {sorted(ours - allowed)}"


def test_commands_do_not_import_each_other() -> None:
    commands = {script.partition(":")[0] for script in SCRIPTS.values()}
    for path in modules("cli"):
        found = {
            name for name in imports(ast.parse(path.read_text("utf-8"))) if commands & {name, name.rpartition(".")[0]}
        }
        assert not found, f"{path.name} imports {sorted(found)}"


def test_commands_import_nothing_heavy_at_module_level() -> None:
    for path in modules("cli"):
        found = roots(path, top=True) & HEAVY
        assert not found, f"{path.name} imports {sorted(found)} at module level"


def test_formats_know_no_torch_and_load_pictures_late() -> None:
    for path in modules("formats"):
        assert not roots(path) & {"torch", "torchvision"}, path.name
        assert not roots(path, top=True) & (HEAVY - {"numpy"}), path.name


# Modules that run code that a file holds, or could; and functions, also of numpy, torch and its distributed package.
UNSAFE = {
    "pickle", "shelve", "marshal", "joblib", "dill", "cloudpickle", "eval", "exec", "load", "save", "all_gather_object",
    "gather_object", "broadcast_object_list", "scatter_object_list",
}  # fmt: skip


def unsafe(tree: ast.AST) -> set[str]:
    """Those of UNSAFE that a file imports or calls."""
    calls = (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
    matched = (re.fullmatch(r"(?:(?:np|numpy|torch|dist|distributed)\.)?(\w+)", call) for call in calls)
    return ({found[1] for found in matched if found} | {name.split(".")[0] for name in imports(tree)}) & UNSAFE


def test_nothing_runs_code_that_a_file_holds() -> None:
    assert unsafe(ast.parse("import pickle\ntorch.load(x)\neval('1')\nnp.save(y)")) == {
        "pickle",
        "load",
        "eval",
        "save",
    }
    where: dict[str, set[str]] = {}
    for layer in LAYERS:
        for path in modules(layer):
            for name in unsafe(ast.parse(path.read_text("utf-8"))):
                where.setdefault(name, set()).add(path.name)
    assert where == {"pickle": {"cifar.py"}, "load": {"model.py"}}  # each kept from it: no lookups, weights only
    assert "weights_only=True" in (ROOT / "cli" / "model.py").read_text()


def test_tools_touch_no_command_line_and_no_pictures() -> None:
    for path in modules("tools"):
        assert not roots(path) & {"typer", "click", "rich", "argparse", "PIL", "safetensors", "matplotlib"}, path.name


# Each as a user would call it, in one process: what one of them loads stays visible to the check at the end.
CALLS = """
import os, sys
from {module} import {function} as main
os._exit = sys.exit
status = []
for word in ("--version", "--help", "--no-such-option"):
    sys.argv = ["{name}", word]
    try:
        main()
    except SystemExit as error:
        status.append(error.code)
print(status)
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_version_and_usage_errors_load_nothing_heavy(name: str) -> None:
    module, function = SCRIPTS[name].split(":")
    code = CALLS.format(module=module, function=function, name=name)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        capture_output=True, text=True, env=environment(), timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[0, 0, 2]", done.stdout
    assert f"{name} " in done.stdout and "Usage" in done.stdout
    loaded = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert module in loaded
    heavy = sorted({item.split(".")[0] for item in loaded} & HEAVY)
    assert heavy == []
