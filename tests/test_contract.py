"""The contract of rbkit(7): exit status, one line on stderr, and targets of -o that are old, new or absent."""

from __future__ import annotations

import importlib
import os
import pty
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import BIN, Result, environment, execute, shell
from safetensors import numpy as st
from test_files_process import SCRIPTS

from rbkit.cli._errors import Output
from rbkit.cli._output import Sink


def refused(result: Result, status: int, *words: str) -> None:
    """One line, named after its command, with the words in it and no traceback."""
    command = result.err.split(":")[0]
    assert result.status == status, (result.status, result.err)
    assert result.err.count("\n") == 1 and command.startswith("rb-") and "Traceback" not in result.err, result.err
    for word in words:
        assert word in result.err, result.err


@pytest.mark.parametrize("line", ["rb-data shapes --n 5 > /dev/full", "rb-data shapes --n 5 -o /dev/full"])
def test_full_device(line: str) -> None:
    refused(shell(line), 4, "No space left")


def test_closed_output() -> None:
    refused(shell("rb-data shapes --n 5 >&-"), 4)


def test_closed_input() -> None:
    refused(shell("rb-info <&-"), 3, "closed", "pipe a stream in")


def test_binary_never_goes_to_a_terminal() -> None:
    parent, child = pty.openpty()
    done = subprocess.run(
        [BIN / "rb-data", "shapes", "--n", "2"], stdin=subprocess.DEVNULL, stdout=child, stderr=subprocess.PIPE,
        env=environment(), check=False,
    )  # fmt: skip
    refused(Result(done.returncode, b"", done.stderr.decode()), 2, "terminal")
    done = subprocess.run([BIN / "rb-info"], stdin=child, capture_output=True, env=environment(), check=False)
    refused(Result(done.returncode, b"", done.stderr.decode()), 2, "terminal")
    os.close(child)
    os.close(parent)


def test_missing_folder_of_the_output(tmp_path: Path) -> None:
    refused(execute("rb-data", "shapes", "--n", 2, "-o", tmp_path / "no" / "x.safetensors"), 4)


@pytest.mark.parametrize(
    ("stdin", "words"),
    [(b"", "empty"), (b"image,label\n1,2\n" * 9, "standard input"), (b"\x89PNG\r\n\x1a\nbroken", "")],
)
def test_no_stream_on_standard_input(stdin: bytes, words: str) -> None:
    refused(execute("rb-info", stdin=stdin), 3, words)


def test_missing_file(tmp_path: Path) -> None:
    refused(execute("rb-info", tmp_path / "none.safetensors"), 3, "No such file")


def test_full_disk_keeps_the_old_target(tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"old")
    line = f"trap '' XFSZ; exec prlimit --fsize=20000 {BIN}/rb-data shapes --n 200 -o {target}"
    refused(shell(line), 4)
    assert target.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == [target.name]


def test_rows_that_do_not_fit(tmp_path: Path, model_file: Path) -> None:
    """NaN, labels out of range, channels and sizes that the model does not take; none leaves an output."""
    out = tmp_path / "out.safetensors"
    good = np.full((3, 3, 32, 32), 0.5, np.float32)
    bad = {
        "nan": {"image": np.where(np.arange(32) == 5, np.nan, good).astype(np.float32)},
        "range": {"image": good * 4},
        "label": {"image": good, "label": np.array([0, 1, 99])},
        "channels": {"image": good[:, :1].copy()},
    }
    for name, rows in bad.items():
        st.save_file(rows, tmp_path / f"{name}.safetensors")
        result = execute("rb-attack", tmp_path / f"{name}.safetensors", "-m", model_file, "--steps", 1, "-q", "-o", out)
        refused(result, 3, f"{name}.safetensors")
        assert not out.exists()
    refused(execute("rb-attack", tmp_path / "nan.safetensors", "-m", tmp_path / "nan.safetensors"), 3, "no model")


WRITERS = {  # what each command needs on its command line; the refusal comes before any of it is looked at
    "rb-data": "shapes", "rb-model": "show none", "rb-train": "none", "rb-attack": "-m none", "rb-saliency": "-m none",
    "rb-invert": "-m none", "rb-score": "none", "rb-view": "none", "rb-info": "--join none", "rb-report": "none.jsonl",
    "rb-link": "none",
}  # fmt: skip
TARGETS = ("--output", "--figures")


def targets(name: str) -> list[str]:
    """The options of a command that name what it writes."""
    module = importlib.import_module(f"rbkit.cli.{name.removeprefix('rb-')}")
    options = [word for option in module.main.command().params for word in option.opts]
    found = [word for word in TARGETS if word in options]
    assert ("--no-clobber" in options) == bool(found), f"{name}: --no-clobber goes with -o and --figures"
    return found


def test_every_command_that_writes_can_be_told_to_replace_nothing() -> None:
    assert {name for name in SCRIPTS if targets(name)} == set(WRITERS)


@pytest.mark.parametrize("name", WRITERS)
def test_no_clobber_keeps_what_is_there(name: str, tmp_path: Path) -> None:
    """Files and folders that hold something are refused; a folder that is empty, devices and - are not."""
    kept = tmp_path / "drawn" / "x.png"
    kept.parent.mkdir()
    kept.write_bytes(b"old")
    for option in targets(name):
        for output in [kept, f"{kept.parent}/"] if option == "--output" else [f"{kept.parent}/"]:
            result = execute(name, *WRITERS[name].split(), option, output, "--no-clobber")
            refused(result, 4, f"{output}: is already there", "--no-clobber")
    assert kept.read_bytes() == b"old" and list(tmp_path.rglob("*")) == [kept.parent, kept]


def test_no_clobber_lets_pass_what_cannot_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for output in ("/dev/null", "-", "empty/", "new.safetensors"):
        assert shell(f"rb-data shapes --n 2 --no-clobber -o {output} > /dev/null", cwd=tmp_path).status == 0, output
    line = "rb-info --check pipe & rb-data shapes --n 2 --no-clobber -o pipe && wait $! && test -p pipe"
    assert shell(line, cwd=tmp_path, timeout=60).status == 0


@pytest.mark.parametrize("output", ["x.safetensors", "x.rbs", "x.png", "x/"])
def test_a_file_that_appears_meanwhile_is_kept(output: str, tmp_path: Path) -> None:
    rows = {"image": np.zeros((1, 3, 5, 4), np.uint8), "id": np.array([7])}
    meta = {"kind": "images", "first": 0, "total": 1, "history": []}
    target = tmp_path / ("x/000007.png" if output == "x/" else output)
    with pytest.raises(Output, match="File exists") as caught, Sink(f"{tmp_path}/{output}", no_clobber=True) as sink:
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(b"appeared")
        sink.write(rows, meta, last=True)
    assert target.name in str(caught.value) and ".rb-tmp" not in str(caught.value)
    assert target.read_bytes() == b"appeared" and [p for p in tmp_path.rglob("*") if p.is_file()] == [target]


def test_a_finished_training_run_replaces_nothing(tmp_path: Path, train_file: Path) -> None:
    """With --resume --no-clobber the run that is done stays as it is, and another file is not replaced."""
    argv = ("rb-train", train_file, "--width", 4, "--epochs", 0, "-q", "--resume", "--no-clobber", "-o")
    target = tmp_path / "m.safetensors"
    assert execute(*argv, target).status == 0
    made = target.read_bytes()
    assert execute(*argv, target).status == 0
    target.write_bytes(train_file.read_bytes())
    refused(execute(*argv, target), 4, "is already there")
    assert target.read_bytes() == train_file.read_bytes() != made


def test_input_is_output(stream_file: Path, model_file: Path) -> None:
    before = stream_file.read_bytes()
    refused(execute("rb-attack", stream_file, "-m", model_file, "-o", stream_file), 2, "same file")
    assert stream_file.read_bytes() == before
