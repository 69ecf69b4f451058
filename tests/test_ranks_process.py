"""rb-train as several processes: the bytes of one, one voice, and no process that waits for one that is gone."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import BIN, environment, execute
from test_train_process import wait_for

from rbkit.tools.ranks import LostRank, joined

# A robust recipe with averages and momentum: five steps of four micro-batches in each epoch.
JOB = ("--width", 4, "--epochs", 4, "--batch", 16, "--micro", 4, "--eps", "0.5", "--steps", 2, "--ema", "0.9")


@pytest.fixture(scope="module")
def rows(folder: Path) -> Path:
    """96 labelled training images."""
    path = folder / "ranks.safetensors"
    assert execute("rb-data", "shapes", "--split", "train", "--n", 96, "-o", path).status == 0
    return path


@pytest.fixture(scope="module")
def whole(folder: Path, rows: Path) -> Path:
    """The model of JOB and its log, by one process."""
    path = folder / "ranks-whole.safetensors"
    result = execute("rb-train", rows, *JOB, "-q", "--log", f"{path}.log", "-o", path)
    assert result.status == 0, result.err
    return path


def free_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def launched(count: int, *argv: object, **variables: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes of one run, as a launcher that hands on their own status would start them; ended with the block."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    processes = [
        subprocess.Popen(
            [BIN / "rb-train", *map(str, argv)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, env=environment(RANK=str(index), LOCAL_WORLD_SIZE=str(count), **where, **variables),
        )
        for index in range(count)
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()


def ended(processes: list[subprocess.Popen[bytes]]) -> list[tuple[int, str]]:
    """Status and standard error of each."""
    told = [process.communicate(timeout=90)[1].decode() for process in processes]
    return [(process.returncode, err) for process, err in zip(processes, told, strict=True)]


def test_torchrun_makes_the_bytes_of_one_process(tmp_path: Path, rows: Path, whole: Path) -> None:
    """Weights, history, validation and log; of two processes the first alone writes."""
    target = tmp_path / "model.safetensors"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [*map(str, JOB), "-q", "--log", f"{target}.log", "-o", str(target)]
    done = subprocess.run(
        [*launcher, "-m", "--", "rbkit.cli.train", str(rows), *options],
        capture_output=True, env=environment(OMP_NUM_THREADS="1"), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert b"rb-train" not in done.stderr
    assert target.read_bytes() == whole.read_bytes()
    assert Path(f"{target}.log").read_bytes() == Path(f"{whole}.log").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [target.name, f"{target.name}.log"]


def test_a_lost_process_ends_the_run_and_a_signal_to_one_stops_all(tmp_path: Path, rows: Path, whole: Path) -> None:
    """Two processes, of which one is killed; two again, of which one gets a signal; at last one alone goes on."""
    target = tmp_path / "model.safetensors"
    checkpoint = Path(f"{target}.ckpt")
    argv = (rows, *JOB, "--resume", "--checkpoint-every", 1, "--log", f"{target}.log", "-o", target)

    with launched(2, *argv) as processes:
        wait_for(checkpoint, processes[0])
        processes[1].kill()
        (status, err), _ = ended(processes)
    assert status == 75 and err.count("\n") == 1 and "another process of this run is gone" in err, err
    assert not target.exists()

    before = checkpoint.stat().st_ino
    with launched(2, *argv) as processes:
        while checkpoint.stat().st_ino == before:
            assert processes[0].poll() is None
        processes[1].send_signal(signal.SIGUSR1)
        (first, err), (second, silence) = ended(processes)
    assert (first, second, silence) == (75, 75, ""), err + silence
    assert err.count("\n") == 2 and "resumed at epoch" in err and "stopped by SIGUSR1: saved at step" in err

    again = execute("rb-train", *argv)
    assert again.status == 0, again.err
    assert target.read_bytes() == whole.read_bytes()
    records = [json.loads(line) for line in Path(f"{target}.log").read_text().splitlines()]
    kinds = [r["event"] for r in records]
    assert kinds.count("resume") == 2 and kinds.count("epoch") == 4
    assert not checkpoint.exists()


def test_bad_numbers_are_told_once(tmp_path: Path, rows: Path) -> None:
    argv = ("--width", 4, "--batch", 16, "--micro", 8, "--lr", "1e30", "--schedule", "constant", "-q")
    with launched(2, rows, *argv, "-o", tmp_path / "m.safetensors") as processes:
        (first, err), (second, silence) = ended(processes)
    assert (first, second, silence) == (5, 5, ""), err + silence
    assert err.count("\n") == 1 and "is nan" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--micro", 5), "--micro 5 does not divide --batch 32"),
        ((), "--micro 32 leaves work for 1 of 2 processes in a step of 32; try --micro 16 or less"),
        (("--no-such-option",), "no-such-option"),
    ],
)
def test_a_usage_error_is_told_once(argv: tuple[object, ...], words: str, tmp_path: Path, rows: Path) -> None:
    with launched(2, rows, *argv, "-o", tmp_path / "m.safetensors") as processes:
        (first, err), (second, silence) = ended(processes)
    assert (first, second, silence) == (2, 2, ""), err + silence
    assert words in err and err.count("\n") == 1, err


def test_a_launcher_must_tell_where_the_processes_meet(tmp_path: Path, rows: Path) -> None:
    result = execute("rb-train", rows, "--micro", 8, "-o", tmp_path / "m.safetensors", WORLD_SIZE="2", RANK="0")
    assert result.status == 2 and "MASTER_ADDR and MASTER_PORT" in result.err, result.err


def test_a_process_that_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(LostRank), joined(0, 2, patience=timedelta(seconds=1)):
        raise AssertionError("joined alone")


def test_rows_that_cannot_be_read_end_all_processes(tmp_path: Path) -> None:
    """Only the first process reads; the other one ends as it does, and not with 75, which would be tried again for ever."""
    argv = ("--batch", 16, "--micro", 8, "-o", tmp_path / "m.safetensors")
    with launched(2, tmp_path / "absent.safetensors", *argv) as processes:
        (first, err), (second, silence) = ended(processes)
    assert first == 3 and err.count("\n") == 1 and "absent.safetensors" in err, err
    assert (second, silence) == (3, "")


def test_a_checkpoint_that_cannot_be_written_ends_all_processes(tmp_path: Path, rows: Path) -> None:
    """In the middle of the training, where the others wait for a gradient."""
    target = tmp_path / "m.safetensors"
    Path(f"{target}.ckpt").mkdir()
    with launched(2, rows, *JOB, "-q", "-o", target) as processes:
        (first, err), (second, silence) = ended(processes)
    assert first == 4 and err.count("\n") == 1 and err.count(".ckpt") == 1, err
    assert (second, silence) == (4, "")


def test_the_failure_of_a_process_that_does_not_write_reaches_the_first(tmp_path: Path, rows: Path) -> None:
    """The module of the architecture is found by the first process alone."""
    (tmp_path / "own.py").write_text(
        "import os\nfrom rbkit.tools.architectures import resnet8\n"
        "def net(num_classes):\n"
        "    if os.environ['RANK'] == '1':\n        raise ValueError('no such layer here')\n"
        "    return resnet8(num_classes=num_classes, width=4)\n"
    )
    argv = ("--arch", "own:net", "--batch", 16, "--micro", 8, "-q", "-o", tmp_path / "m.safetensors")
    with launched(2, rows, *argv, PYTHONPATH=str(tmp_path)) as processes:
        (first, silence), (second, err) = ended(processes)
    assert second not in (0, 75) and "no such layer here" in err, err
    assert (first, silence) == (second, "")
