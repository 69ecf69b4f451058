"""Faults that are made to happen: system calls that fail one after the other, and an interpreter that forbids pickles."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import BIN, execute, shell

SCRIPTS = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]

# One short line for every command; what it needs stands in the folder by then.
LINES = {
    "rb-data": "rb-data shapes --n 8 -o rows.safetensors",
    "rb-train": "rb-train {train} --width 4 --epochs 1 --eps 0.5 --steps 1 -q -o model.safetensors",
    "rb-model": "rb-model show model.safetensors && rb-model export model.safetensors -o weights.safetensors",
    "rb-attack": "rb-attack rows.safetensors -m model.safetensors --steps 1 -q -o adv.safetensors",
    "rb-saliency": "rb-saliency rows.safetensors -m model.safetensors --method gradient -q -o sal.safetensors",
    "rb-invert": "rb-invert rows.safetensors -m model.safetensors --steps 1 -q -o inv.safetensors",
    "rb-score": "rb-score adv.safetensors sal.safetensors -m model.safetensors --json -q > scores.jsonl",
    "rb-view": "rb-view adv.safetensors -o sheet.png",
    "rb-info": "rb-info adv.safetensors --check",
    "rb-verify": "rb-verify adv.safetensors -m model.safetensors > checks.jsonl",
    "rb-report": "rb-report scores.jsonl model.safetensors -o report.html",
    "rb-link": "rb-link scores.jsonl --allow-incomplete -q > link.jsonl",
}


def test_no_command_ever_unpickles(tmp_path: Path, train_file: Path) -> None:
    """An unpickler that looks up any class or function raises the audit event; here that ends the process."""
    assert set(LINES) == set(SCRIPTS)
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def forbid(event, args):\n"
        "    if event == 'pickle.find_class':\n"
        "        os.write(2, f'unpickled {args}\\n'.encode())\n"
        "        os._exit(99)\n"
        "sys.addaudithook(forbid)\n"
    )
    caught = shell("python -c \"import pickle; pickle.loads(b'cos\\nsystem\\n.')\"", PYTHONPATH=str(hook))
    assert caught.status == 99, "the hook is not at work"
    for line in LINES.values():
        result = shell(line.format(train=train_file), cwd=tmp_path, PYTHONPATH=str(hook))
        assert result.status == 0, f"{line}\n{result.err}"


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(
    ("calls", "error"),
    [("write", "ENOSPC"), ("fsync", "EIO"), ("rename,renameat,renameat2", "EIO"), ("fchmod", "EPERM")],
)
def test_whichever_call_fails_the_target_is_old_or_new(calls: str, error: str, tmp_path: Path) -> None:
    """The first call that touches the folder fails, then the second, ... until the command gets through."""
    np.savez(tmp_path / "rows.npz", image=np.zeros((40, 3, 6, 7), np.uint8), label=np.arange(40) % 4)
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "x.safetensors"
    new = execute("rb-data", "npz", tmp_path / "rows.npz").out
    for turn in range(1, 12):
        target.write_bytes(b"old")
        inject = f"strace -f -qq -o /dev/null -e trace={calls} -e inject={calls}:error={error}:when={turn}"
        result = shell(f"{inject} {BIN}/rb-data npz {tmp_path}/rows.npz -q -o {target}")
        assert [p.name for p in folder.iterdir()] == [target.name], "something was left behind"
        if result.status == 0:
            assert target.read_bytes() == new and turn > 1
            break
        assert result.status == 4 and result.err.count("\n") == 1 and "Traceback" not in result.err, result.err
        assert target.read_bytes() == b"old"
    else:
        pytest.fail("never got through")


def test_nothing_is_imported_from_the_current_folder(tmp_path: Path) -> None:
    """Files named like what the commands import would leave a mark."""
    for name in ("json", "numpy", "torch", "typer", "rich", "safetensors", "rbkit", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("open('mark', 'w').close()\nraise SystemExit('imported from here')\n")
    result = shell("rb-data shapes --n 3 | rb-info - && rb-info --help > help.txt", cwd=tmp_path)
    assert result.status == 0 and not (tmp_path / "mark").exists(), result.err


PLACES = (
    {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONHASHSEED": "1", "HOME": "/nonexistent", "USER": "somebody"},
    {"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "2", "PYTHONIOENCODING": "latin-1", "COLUMNS": "20", "TERM": "dumb"},
)


def test_time_place_and_person_reach_no_output(tmp_path: Path, model_file: Path) -> None:
    """Data, attack, score and figure are the same bytes in another zone, locale, folder and hash order."""
    line = (
        f"umask {{umask}}; rb-data shapes --n 5 | rb-attack -m {model_file} --steps 1 -q | tee adv.rbs"
        f" | rb-score -m {model_file} --json -q > s.jsonl; rb-view adv.rbs -o sheet.png; rb-view s.jsonl -o curve.png"
    )
    found = []
    for number, place in enumerate(PLACES):
        folder = tmp_path / f"place{number}"
        folder.mkdir()
        result = shell(line.format(umask=("077", "022")[number]), cwd=folder, **place)
        assert result.status == 0, result.err
        found.append({p.name: p.read_bytes() for p in sorted(folder.iterdir())})
    assert set(found[0]) == {"adv.rbs", "s.jsonl", "sheet.png", "curve.png"}
    assert found[0] == found[1]
