"""The contract of rbkit(7): exit status, one line on stderr, and targets of -o that are old, new or absent."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import BIN, Result, environment, execute, shell
from safetensors import numpy as st


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


def test_input_is_output(stream_file: Path, model_file: Path) -> None:
    before = stream_file.read_bytes()
    refused(execute("rb-attack", stream_file, "-m", model_file, "-o", stream_file), 2, "same file")
    assert stream_file.read_bytes() == before
