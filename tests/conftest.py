"""Fixtures that the tests share: a small stream, a small model, and a way to run the commands as processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

BIN = Path(sys.prefix) / "bin"

# What was ignored when the tests were started (nohup, a job in the background) must not be ignored by what they start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Result:
    """What a command left: status (negative: killed by that signal), stdout and stderr."""

    status: int
    out: bytes
    err: str


def environment(**extra: str) -> dict[str, str]:
    """The environment of a command under test."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RB_")}
    return kept | {"PATH": f"{BIN}:{os.environ['PATH']}", "RB_THREADS": "1", **extra}


def execute(
    *argv: object, stdin: bytes | None = b"", cwd: Path | None = None, timeout: float = 300, **extra: str
) -> Result:
    """Run an installed command; `stdin` None inherits a closed standard input."""
    done = subprocess.run(
        [str(BIN / str(argv[0])), *map(str, argv[1:])],
        input=stdin, capture_output=True, env=environment(**extra), cwd=cwd, timeout=timeout, check=False,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr.decode("utf-8", "replace"))


def shell(line: str, *, cwd: Path | None = None, stdin: bytes = b"", timeout: float = 300, **extra: str) -> Result:
    """Run a line of bash with pipefail."""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], input=stdin, capture_output=True, env=environment(**extra), cwd=cwd, timeout=timeout, check=False,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr.decode("utf-8", "replace"))


@pytest.fixture(scope="session")
def run() -> Callable[..., Result]:
    """`execute`, as a fixture."""
    return execute


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that lives as long as the session."""
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="session")
def stream_file(folder: Path) -> Path:
    """40 labelled images of 3 x 32 x 32 with masks, in one document."""
    path = folder / "test.safetensors"
    assert execute("rb-data", "shapes", "--n", 40, "-o", path).status == 0
    return path


@pytest.fixture(scope="session")
def train_file(folder: Path) -> Path:
    """192 labelled training images."""
    path = folder / "train.safetensors"
    assert execute("rb-data", "shapes", "--split", "train", "--n", 192, "-o", path).status == 0
    return path


@pytest.fixture(scope="session")
def model_file(folder: Path, train_file: Path) -> Path:
    """A resnet8 of width 4, trained for an epoch."""
    path = folder / "model.safetensors"
    result = execute("rb-train", train_file, "--width", 4, "--epochs", 1, "--batch", 32, "-q", "-o", path)
    assert result.status == 0, result.err
    return path
