"""A short run of the fuzzer, and proof that it finds what it looks for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
from conftest import environment


def test_no_bytes_break_a_reader(tmp_path: Path) -> None:
    """Some 50,000 inputs; `python tests/fuzz.py --seconds 600` tries more."""
    argv = [sys.executable, "-W", "ignore", fuzz.__file__, "--seconds", "6"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(fuzz.TARGETS) and " 0 accepted" not in done.stdout


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError()])
def test_what_is_no_format_error_is_a_finding(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def parse(raw: bytes, path: Path) -> None:
        if len(raw) % 2:
            raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(fuzz.TARGETS, "records", fuzz.Target(parse, [b"abcd"]))
    assert fuzz.fuzz("records", seconds=0.05, seed=0, folder=tmp_path) == 1
    assert type(error).__name__ in capsys.readouterr().out
    assert len((tmp_path / "finding-records-0").read_bytes()) % 2
