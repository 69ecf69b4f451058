"""Trust: what no command ever does, whatever it is given and wherever it runs."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from conftest import shell

SCRIPTS = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]

# One short line for every command; what it needs stands in the folder by then.
LINES = {
    "rb-data": "rb-data shapes --n 8 --no-clobber -o rows.safetensors",
    "rb-train": "rb-train {train} --width 4 --epochs 1 --eps 0.5 --steps 1 -q --no-clobber -o model.safetensors --last last.safetensors",
    "rb-model": "rb-model show model.safetensors && rb-model export model.safetensors --no-clobber -o weights.safetensors"
    " && rb-model import weights.safetensors --arch resnet8 --width 4 --classes 8 --no-clobber -o again.safetensors",
    "rb-attack": "rb-attack rows.safetensors -m model.safetensors --steps 1 -q --no-clobber -o adv.safetensors",
    "rb-saliency": "rb-saliency rows.safetensors -m model.safetensors --method gradient -q --no-clobber -o sal.safetensors",
    "rb-invert": "rb-invert rows.safetensors -m model.safetensors --steps 1 -q --no-clobber -o inv.safetensors",
    "rb-score": "rb-score adv.safetensors sal.safetensors -m model.safetensors --json -q --no-clobber -o kept.rbs > scores.jsonl",
    "rb-view": "rb-view adv.safetensors --no-clobber -o sheet.png && rb-view adv.safetensors --no-clobber -o pictures/"
    " && rb-view scores.jsonl --no-clobber -o curves.png && rb-view model.safetensors --no-clobber -o training.png",
    "rb-info": "rb-info adv.safetensors --check && rb-info --join rows.safetensors --no-clobber -o joined.safetensors",
    "rb-verify": "rb-verify adv.safetensors -m model.safetensors > checks.jsonl",
    "rb-report": "rb-report scores.jsonl model.safetensors --figures drawn/ --no-clobber -o report.html",
    "rb-link": "rb-link scores.jsonl --allow-incomplete -q --no-clobber --figures plots/ > link.jsonl",
}
WITNESS = """
import os, sys
def tell(event, args):
    if event in ("pickle.find_class", "os.rename"):
        with open(os.environ["WITNESS"], "a") as log:
            print(event, args[1], file=log)
sys.addaudithook(tell)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, train_file: Path) -> list[str]:
    """What an audit hook tells of a run of every command: each lookup of an unpickler, each file that is replaced."""
    assert set(LINES) == set(SCRIPTS)
    folder = tmp_path_factory.mktemp("watched")
    hook, log = folder / "hook", folder / "log"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(WITNESS)
    place = {"PYTHONPATH": f"{hook}:{os.environ.get('PYTHONPATH', '')}", "WITNESS": str(log)}
    shell(
        "python -c \"import os, pickle; pickle.loads(b'cos\\nsystem\\n.'); os.rename('a', 'b')\"", cwd=folder, **place
    )
    assert log.read_text().splitlines() == ["pickle.find_class system", "os.rename b"], "the hook is not at work"
    log.write_text("")
    for line in LINES.values():
        result = shell(line.format(train=train_file), cwd=folder, **place)
        assert result.status == 0, f"{line}\n{result.err}"
    return log.read_text().splitlines()


def test_no_command_ever_unpickles(told: list[str]) -> None:
    """An unpickler that looks up any class or function raises the audit event."""
    assert not [event for event in told if event.startswith("pickle.")]


def test_no_clobber_reaches_every_output(told: list[str]) -> None:
    """With --no-clobber nothing but a checkpoint takes a name by renaming, which would replace what has it."""
    renamed = [event for event in told if event.startswith("os.rename")]
    assert renamed and all(event.endswith(".ckpt") for event in renamed), renamed


# Every command with a pickle in the place of each of its inputs; all in one process, where what runs leaves a folder.
BOMBS = """
import os, pickle, sys
from importlib import import_module
from rbkit.cli._app import command_of
from rbkit.cli._errors import Failure
class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.path.abspath("exploded"),)
for protocol in (0, 2, 4):
    with open(f"bomb{protocol}.pt", "wb") as file:
        pickle.dump(Bomb(), file, protocol)
    with open(f"bomb{protocol}.jsonl", "wb") as file:
        pickle.dump(Bomb(), file, protocol)
for line in sys.stdin.read().splitlines():
    name, *words = line.split()
    module = import_module("rbkit.cli." + name.removeprefix("rb-"))
    try:
        command_of(name, getattr(module, name.removeprefix("rb-")))(args=words, prog_name=name, standalone_mode=False)
    except Failure as failure:
        print(failure.status)
    else:
        print(0)
    sys.stdout.flush()
"""
SEATS = {
    "rb-data": ("idx BOMB.pt", "npz BOMB.pt", "png BOMB.pt"), "rb-model": ("show BOMB.pt", "import BOMB.pt --arch resnet8 --classes 3"),
    "rb-train": ("BOMB.pt", "{rows} --width 4 --init BOMB.pt", "{rows} --width 4 --val BOMB.pt"),
    "rb-attack": ("BOMB.pt -m {model}", "{rows} -m BOMB.pt", "{rows} -m {model} --surrogate BOMB.pt"),
    "rb-saliency": ("BOMB.pt -m {model}", "{rows} -m BOMB.pt", "{rows} -m {model} --method shap --background BOMB.pt"),
    "rb-invert": ("BOMB.pt -m {model}", "{rows} -m BOMB.pt", "{rows} -m {model} --start-from BOMB.pt"),
    "rb-score": ("BOMB.pt -m {model}", "{rows} -m BOMB.pt", "{rows} -m {model} --judge BOMB.pt"),
    "rb-verify": ("BOMB.pt -m {model}", "{rows} -m BOMB.pt", "{rows} -m {model} --clean BOMB.pt"),
    "rb-view": ("BOMB.pt -o x.png",), "rb-info": ("BOMB.pt", "--join BOMB.pt", "--replay BOMB.pt"),
    "rb-link": ("BOMB.jsonl",), "rb-report": ("BOMB.jsonl", "{records} BOMB.pt"),
}  # fmt: skip


def test_a_pickle_in_the_place_of_any_input_runs_nothing(tmp_path: Path, stream_file: Path, model_file: Path) -> None:
    assert set(SEATS) == set(SCRIPTS)
    (tmp_path / "scores.jsonl").write_text('{"metric": "accuracy", "value": 0.5}\n')
    given = {"rows": stream_file, "model": model_file, "records": "scores.jsonl"}
    lines = [f"{name} {seat.format(**given)}" for name, seats in SEATS.items() for seat in seats]
    lines = [line.replace("BOMB", f"bomb{protocol}") for line in lines for protocol in (0, 2, 4)]
    (tmp_path / "bombs.py").write_text(BOMBS)
    done = shell(f"python {tmp_path}/bombs.py", stdin="\n".join(lines).encode(), cwd=tmp_path)
    assert done.status == 0, done.err
    assert list(zip(lines, done.out.split(), strict=True)) == [(line, b"3") for line in lines]
    assert not (tmp_path / "exploded").exists()


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
