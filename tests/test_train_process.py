"""rb-train as a process: stopped, killed and run again it ends at the same bytes; bad numbers never become a model."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import BIN, Result, environment, execute
from safetensors import numpy as st

from rbkit.cli._errors import Usage
from rbkit.cli._watch import Watch, pace
from rbkit.tools.ranks import ALONE

# A robust recipe with averages and momentum, so that all that a checkpoint holds matters.
JOB = ("--width", 4, "--epochs", 4, "--batch", 16, "--eps", "0.5", "--steps", 2, "--ema", "0.9", "--seed", 3)


@pytest.fixture(scope="module")
def few_rows(folder: Path) -> Path:
    """96 labelled training images."""
    path = folder / "train-process.safetensors"
    assert execute("rb-data", "shapes", "--split", "train", "--n", 96, "-o", path).status == 0
    return path


@pytest.fixture(scope="module")
def whole(folder: Path, few_rows: Path) -> Path:
    """The model of JOB, never interrupted."""
    path = folder / "whole.safetensors"
    result = execute("rb-train", few_rows, *JOB, "-q", "-o", path)
    assert result.status == 0, result.err
    assert result.err == "" and not Path(f"{path}.ckpt").exists()
    return path


@contextmanager
def training(*argv: object) -> Iterator[subprocess.Popen[bytes]]:
    """rb-train at work, ended with the block."""
    process = subprocess.Popen(
        [BIN / "rb-train", *map(str, argv)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Until `path` is there."""
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, f"ended with {process.returncode} before {path.name} was there"
        assert time.monotonic() < end
        time.sleep(0.005)


def interrupted(tmp_path: Path, few_rows: Path, number: int, *, delay: float) -> tuple[Path, Result]:
    """The target of a job that got a signal `delay` seconds after its first checkpoint, and how the job ended."""
    target = tmp_path / "model.safetensors"
    with training(few_rows, *JOB, "-q", "-o", target) as process:
        wait_for(Path(f"{target}.ckpt"), process)
        time.sleep(delay)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    return target, Result(process.returncode, b"", err.decode())


@pytest.mark.parametrize(
    ("number", "status", "delay"), [(signal.SIGTERM, 75, 0.1), (signal.SIGUSR1, 75, 0.0), (signal.SIGKILL, -9, 0.15)]
)
def test_the_same_bytes_after_an_interruption(
    number: int, status: int, delay: float, tmp_path: Path, few_rows: Path, whole: Path
) -> None:
    target, ended = interrupted(tmp_path, few_rows, number, delay=delay)
    assert ended.status == status, ended.err
    assert not target.exists()
    assert Path(f"{target}.ckpt").exists()
    if status == 75:
        assert ended.err.count("\n") == 1 and "--resume" in ended.err
    again = execute("rb-train", few_rows, *JOB, "--resume", "-o", target)
    assert again.status == 0, again.err
    assert "resumed at epoch" in again.err
    assert target.read_bytes() == whole.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGUSR2, 75), (signal.SIGHUP, 75), (signal.SIGINT, -2)],
)
def test_a_signal_before_the_first_step(number: int, status: int, tmp_path: Path) -> None:
    """While the job waits for its data: there is nothing to save yet, and all to be done by the same command."""
    rows = tmp_path / "rows"
    os.mkfifo(rows)
    with training(rows, "-o", tmp_path / "model.safetensors") as process, rows.open("wb"):  # opens once the job reads
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == status, err.decode()
    words = (
        f"rb-train: stopped by {signal.Signals(number).name} before training began; run the same command with --resume"
    )
    assert err.decode() == ("" if status < 0 else words + "\n")
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


def test_a_job_killed_within_an_epoch_goes_on_from_its_last_steps(tmp_path: Path, few_rows: Path, whole: Path) -> None:
    """An epoch has 5 steps; the first checkpoint is that of step 2. How often one is written may change on the way."""
    target = tmp_path / "model.safetensors"
    checkpoint = Path(f"{target}.ckpt")
    with training(few_rows, *JOB, "-q", "-o", target, "--checkpoint-every", 2) as process:
        wait_for(checkpoint, process)
        process.kill()
    again = execute("rb-train", few_rows, *JOB, "--resume", "-o", target, "--checkpoint-every", "1h")
    assert again.status == 0 and "resumed at epoch 1, step" in again.err, again.err
    assert target.read_bytes() == whole.read_bytes()


def test_killed_again_and_again_a_job_ends_at_the_same_bytes(tmp_path: Path, few_rows: Path, whole: Path) -> None:
    """At random moments after its next checkpoint, of 20 steps; the log has each epoch once, and says where it went on."""
    target, log = tmp_path / "model.safetensors", tmp_path / "log.jsonl"
    checkpoint = Path(f"{target}.ckpt")
    argv = (few_rows, *JOB, "--resume", "--checkpoint-every", 1, "--log", log, "-o", target)
    moments, told = random.Random(0), []
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        before = checkpoint.stat().st_ino if checkpoint.exists() else None
        with training(*argv) as process:
            wait_for(checkpoint, process)
            while checkpoint.stat().st_ino == before:
                assert process.poll() is None
            time.sleep(moments.uniform(0, 0.05))
            process.send_signal(number)
            told.append(process.communicate(timeout=60)[1].decode())
        assert process.returncode in (75, -number) and not target.exists(), told[-1]
    again = execute("rb-train", *argv)
    assert again.status == 0, again.err
    assert target.read_bytes() == whole.read_bytes()
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["epoch"] for r in records if r["event"] == "epoch"] == [1, 2, 3, 4]
    resumed = [f"resumed at epoch {r['epoch']}, step {r['step']}" for r in records if r["event"] == "resume"]
    found = re.findall(r"resumed at epoch \d+, step \d+", "".join([*told, again.err]))
    assert len(found) == 3 and resumed == found
    assert sorted(p.name for p in tmp_path.iterdir()) == [log.name, target.name]


class Saved:
    """A job that counts its checkpoints."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def save(self, state: SimpleNamespace) -> bool:
        """Note the step."""
        self.steps.append(state.step)
        return True


@pytest.mark.parametrize(
    ("every", "expected"), [(None, []), ("4", [4, 8, 12]), ("30s", [3, 6, 9, 12]), ("1m", [6, 12]), ("1h", [])]
)
def test_a_checkpoint_is_due_by_steps_or_by_time(
    every: str | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve steps of ten seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("rbkit.cli._watch.time.monotonic", lambda: clock.now)
    job = Saved()
    watch = Watch(job, every=pace(every), ranks=ALONE)  # type: ignore[arg-type]
    for step in range(1, 13):
        clock.now += 10
        watch.after_step(SimpleNamespace(step=step))  # type: ignore[arg-type]
    assert job.steps == expected


@pytest.mark.parametrize("text", ["0", "-1", "10d", "1.5h", "", "0s"])
def test_other_paces_are_refused(text: str) -> None:
    with pytest.raises(Usage, match="--checkpoint-every"):
        pace(text)


def test_ctrl_c_saves_and_dies_of_it(tmp_path: Path, few_rows: Path) -> None:
    target, ended = interrupted(tmp_path, few_rows, signal.SIGINT, delay=0)
    assert ended.status == -signal.SIGINT
    assert "stopping after this step" in ended.err and "Traceback" not in ended.err
    assert Path(f"{target}.ckpt").exists() and not target.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_job_at_once(number: int, tmp_path: Path, few_rows: Path) -> None:
    """In the middle of a step, of which each takes seconds; the checkpoint of the step before stays."""
    target = tmp_path / "model.safetensors"
    checkpoint = Path(f"{target}.ckpt")
    slow = ("--width", 64, "--eps", "0.5", "--steps", 40, "--checkpoint-every", 1)
    with training(few_rows, *slow, "-q", "-o", target) as process:
        wait_for(checkpoint, process)
        before = checkpoint.stat().st_ino
        process.send_signal(number)
        time.sleep(0.1)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == -number and checkpoint.stat().st_ino == before and not target.exists()


def test_a_finished_job_is_left_alone(tmp_path: Path, few_rows: Path, whole: Path) -> None:
    before = whole.stat()
    result = execute("rb-train", few_rows, *JOB, "--resume", "-o", whole)
    assert (result.status, result.err) == (0, "")
    after = whole.stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


def test_another_job_never_goes_on_from_a_checkpoint(tmp_path: Path, few_rows: Path) -> None:
    """A changed option, changed rows and a damaged checkpoint are told apart; the checkpoint stays."""
    target, ended = interrupted(tmp_path, few_rows, signal.SIGTERM, delay=0)
    assert ended.status == 75
    checkpoint = Path(f"{target}.ckpt")
    kept = checkpoint.read_bytes()

    result = execute("rb-train", few_rows, *JOB, "--lr", "0.05", "--resume", "-o", target)
    assert result.status == 2 and "lr 0.1, now 0.05" in result.err, result.err
    other = tmp_path / "other.safetensors"
    assert execute("rb-data", "shapes", "--split", "train", "--n", 64, "-o", other).status == 0
    result = execute("rb-train", other, *JOB, "--resume", "-o", target)
    assert result.status == 2 and "data" in result.err, result.err
    assert checkpoint.read_bytes() == kept and not target.exists()

    checkpoint.write_bytes(kept[:-3])
    result = execute("rb-train", few_rows, *JOB, "--resume", "-o", target)
    assert result.status == 3 and "truncated" in result.err and result.err.count("\n") == 1, result.err
    assert not target.exists()


def test_resume_without_a_checkpoint_starts_afresh(tmp_path: Path, few_rows: Path, whole: Path) -> None:
    target = tmp_path / "m.safetensors"
    assert execute("rb-train", few_rows, *JOB, "-q", "-o", target, "--resume").status == 0
    assert target.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(("epochs", "batch"), [(2, 16), (1, 64)])
def test_a_loss_that_is_no_number_makes_no_model(epochs: int, batch: int, tmp_path: Path, few_rows: Path) -> None:
    """Also where only the very last step went astray, which no loss tells."""
    target = tmp_path / "m.safetensors"
    result = execute(
        "rb-train", few_rows, "--width", 4, "--epochs", epochs, "--batch", batch, "--lr", "1e30", "--schedule",
        "constant", "--val", "0.4", "-q", "-o", target,
    )  # fmt: skip
    assert result.status == 5 and result.err.count("\n") == 1, result.err
    assert not target.exists()


def test_the_log_counts_epochs_once(tmp_path: Path, few_rows: Path) -> None:
    log, last = tmp_path / "log.jsonl", tmp_path / "last.safetensors"
    result = execute(
        "rb-train", few_rows, "--width", 4, "--epochs", 3, "--batch", 32, "--log", log, "--last", last, "-q",
        "-o", tmp_path / "best.safetensors",
    )  # fmt: skip
    assert result.status == 0, result.err
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["epoch"] for r in records if r["event"] == "epoch"] == [1, 2, 3]
    assert all(0 <= r["val_accuracy"] <= 1 and r["train_loss"] > 0 for r in records)
    assert execute("rb-info", "--check", last, tmp_path / "best.safetensors").status == 0


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"image": np.zeros((5, 3, 6, 7), np.uint8)}, "no labels"),
        ({"image": np.zeros((5, 3, 6, 7), np.uint8), "label": np.array([0, 1, -1, 1, 0])}, "label[2]"),
        ({"image": np.zeros((0, 3, 6, 7), np.uint8), "label": np.zeros(0, np.int64)}, "no rows"),
    ],
)
def test_rows_that_teach_nothing(rows: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    st.save_file(rows, tmp_path / "rows.safetensors")
    target = tmp_path / "m.safetensors"
    result = execute("rb-train", tmp_path / "rows.safetensors", "--width", 4, "--epochs", 1, "-q", "-o", target)
    assert result.status == 3 and words in result.err and result.err.count("\n") == 1, result.err
    assert not target.exists()


def test_an_output_that_cannot_be_is_told_before_training(tmp_path: Path, few_rows: Path) -> None:
    """Hours of training must not end in a folder that was never there."""
    begin = time.monotonic()
    argv = ("rb-train", few_rows, "--width", 4, "--epochs", 1000, "-q")
    for extra in (("-o", tmp_path / "no" / "m.safetensors"), ("-o", tmp_path / "m.safetensors", "--last", "/no/x")):
        result = execute(*argv, *extra, timeout=60)
        assert result.status == 4 and result.err.count("\n") == 1, result.err
    assert time.monotonic() - begin < 60
    assert list(tmp_path.iterdir()) == []


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
