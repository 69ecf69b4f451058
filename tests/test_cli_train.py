"""rb-train: interruption and resumption, and what stops it."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import BIN, environment, execute

OPTIONS = ("--width", "4", "--batch", "16", "--epochs", "4", "--val", "0", "-q")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_resumed_equals_uninterrupted(number: signal.Signals, tmp_path: Path, train_file: Path) -> None:
    """Stopped after the first checkpoint and resumed: the same bytes; then --resume does nothing."""
    plain, cut = tmp_path / "plain.safetensors", tmp_path / "cut.safetensors"
    assert execute("rb-train", train_file, *OPTIONS, "-o", plain).status == 0
    job = subprocess.Popen(
        [BIN / "rb-train", train_file, *OPTIONS, "-o", cut], env=environment(), stderr=subprocess.DEVNULL
    )
    checkpoint = Path(f"{cut}.ckpt")
    while not checkpoint.exists() and job.poll() is None:
        time.sleep(0.01)
    job.send_signal(number)
    assert job.wait(60) == (75 if number == signal.SIGTERM else -9)
    assert checkpoint.exists() and not cut.exists()
    changed = execute("rb-train", train_file, *OPTIONS, "--lr", "0.1", "--resume", "-o", cut)
    assert changed.status == 2 and "lr" in changed.err
    assert execute("rb-train", train_file, *OPTIONS, "--resume", "-o", cut).status == 0
    assert cut.read_bytes() == plain.read_bytes() and not checkpoint.exists()
    before = cut.stat().st_mtime_ns
    assert execute("rb-train", train_file, *OPTIONS, "--resume", "-o", cut).status == 0
    assert cut.stat().st_mtime_ns == before


def test_diverging_loss(tmp_path: Path, train_file: Path) -> None:
    out = tmp_path / "m.safetensors"
    done = execute("rb-train", train_file, *OPTIONS, "--lr", "1e30", "-o", out)
    assert done.status == 5 and not out.exists() and done.err.count("\n") == 1


def test_side_files(tmp_path: Path, train_file: Path, stream_file: Path, model_file: Path) -> None:
    """TRADES from given weights with a held-out stream, averages, a log and the last model."""
    done = execute(
        "rb-train", train_file, "--width", 4, "--batch", 64, "--epochs", 1, "--method", "trades", "--eps", "0.25",
        "--steps", 1, "--ema", "0.9", "--val", stream_file, "--init", model_file, "--last", tmp_path / "last.safetensors",
        "--log", tmp_path / "log", "-q", "-o", tmp_path / "m.safetensors",
    )  # fmt: skip
    assert done.status == 0, done.err
    epochs = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [e["epoch"] for e in epochs if e["event"] == "epoch"] == [1] and "val_robust_accuracy" in epochs[-1]
    assert execute("rb-info", "--check", tmp_path / "last.safetensors", tmp_path / "m.safetensors").status == 0
