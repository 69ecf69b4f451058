"""Standard error for programs: events of RB_LOG=json, heartbeats, and the status line on SIGUSR1."""

from __future__ import annotations

import json
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BIN, environment, execute

ROOT = Path(__file__).parent.parent
SLURM = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "80", "RANK": "1"}


def events(err: str) -> list[dict[str, Any]]:
    """The events of a log, each with what every event must have."""
    found = []
    for line in err.splitlines():
        assert len(line.encode()) < 4096 and "\x1b" not in line, line
        event = json.loads(line)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["t"])
        assert event["lvl"] in ("info", "warning", "error") and event["tool"].startswith("rb-") and event["ev"]
        found.append(event)
    return found


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 images of 3 x 6 x 7: two documents of a stream, without torch."""
    path = tmp_path_factory.mktemp("log") / "rows.npz"
    np.savez(path, image=np.zeros((1000, 3, 6, 7), np.uint8))
    return path


def test_the_last_event_tells_how_it_ended(npz: Path) -> None:
    done = execute("rb-data", "npz", npz, RB_LOG="json", **SLURM)
    (only,) = events(done.err)
    assert done.out == execute("rb-data", "npz", npz).out, "a log changes no result"
    assert {k: v for k, v in only.items() if k != "t"} == {
        "lvl": "info", "tool": "rb-data", "job": "77_3", "rank": 1, "ev": "exit", "code": 0, "reason": "done",
    }  # fmt: skip
    failed = execute("rb-info", "none", RB_LOG="json", SLURM_JOB_ID="80", SLURM_RESTART_COUNT="2")
    (only,) = events(failed.err)
    assert (only["job"], only["restart"], only["lvl"]) == ("80", 2, "error")
    assert (only["ev"], only["code"], only["reason"]) == ("exit", 3, "none: No such file or directory")


def test_long_and_hostile_texts_stay_short_lines() -> None:
    """A name of many bytes of which none is a plain letter, and a traceback."""
    name = '\x1b[31m\n\U0001f41f\\"' * 1000
    found = events(execute("rb-info", name, RB_LOG="json", RB_DEBUG="1").err)
    assert {e["ev"] for e in found[:-1]} == {"traceback"} and len(found) > 5
    assert found[-1]["ev"] == "exit" and found[-1]["reason"].startswith(r"\x1b[31m ") and found[-1]["code"] == 3


def test_notes_and_warnings_are_events() -> None:
    code = "import warnings\nfrom rbkit.cli._app import program\nfrom rbkit.cli._log import note\n"
    code += "def work() -> None:\n    note('rb-x', 'two\\nlines'); warnings.warn('mind this', UserWarning)\n"
    code += "program('rb-x', work)()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(RB_LOG="json"), check=True)
    note, warning, last = events(done.stderr.decode())
    assert (note["ev"], note["text"]) == ("note", r"two\nlines")
    assert (warning["ev"], warning["lvl"], warning["text"]) == ("warning", "warning", "UserWarning: mind this")
    assert last["ev"] == "exit"


def test_a_signal_is_the_reason_of_an_exit(npz: Path) -> None:
    job = waiting("rb-data", "png", "-", RB_LOG="json")
    job.terminate()
    _, err = job.communicate(timeout=60)
    (last,) = events(err.decode())
    assert job.returncode == -signal.SIGTERM and (last["code"], last["reason"]) == (143, "SIGTERM")
    job = waiting("rb-info", RB_LOG="json")
    assert job.stdout is not None
    job.stdout.close()  # the reader is gone before there is anything to read
    _, err = job.communicate(execute("rb-data", "npz", npz).out, timeout=60)
    (last,) = events(err.decode())
    assert job.returncode == -signal.SIGPIPE and (last["code"], last["reason"]) == (141, "SIGPIPE")


def waiting(*argv: object, python: str | None = None, **extra: str) -> subprocess.Popen[bytes]:
    """A command that waits for its input and listens to signals by now."""
    start = [BIN / str(argv[0])] if python is None else [sys.executable, "-c", python]
    job = subprocess.Popen(
        [*start, *map(str, argv[1:])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(**extra),
    )  # fmt: skip
    end = time.monotonic() + 60
    while not _caught(job.pid) & 1 << (signal.SIGTERM - 1):  # taken over after USR1 and USR2
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    return job


def _caught(pid: int) -> int:
    """The signals that a process has handlers for, as bits."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)$", text, flags=re.M)
    return 0 if found is None else int(found[1], 16)


def test_a_heart_beats_while_a_command_waits() -> None:
    """Also one that is stuck; its count then stays."""
    code = "import sys, rbkit.cli._pulse as p; p.INTERVAL = 0.05; sys.argv[0] = 'rb-info'\n"
    code += "from rbkit.cli.info import main; main()"
    job = waiting("rb-info", python=code, RB_LOG="json")
    assert job.stdin is not None and job.stderr is not None
    lines: list[str] = []
    while sum('"done"' in line for line in lines) < 2:  # a beat may come before there is anything to count
        lines.append(job.stderr.readline().decode())
        assert lines[-1], f"ended with {job.wait()}"
    out, err = job.communicate(execute("rb-data", "shapes", "--n", 2).out, timeout=60)
    *beats, last = events("".join(lines) + err.decode())
    assert b"2 rows" in out and last["ev"] == "exit" and job.returncode == 0
    counted = [beat["seconds"] for beat in beats if "done" in beat]
    assert {b["ev"] for b in beats} == {"heartbeat"} and counted[1] > counted[0]


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_asks_for_a_status_line(form: str, signum: int, npz: Path) -> None:
    """The first of two documents is in: the line says so, and the work goes on to the same result."""
    raw = execute("rb-data", "npz", npz).out
    plain = execute("rb-info", stdin=raw)
    job = waiting("rb-info", RB_LOG=form)
    assert job.stdin is not None and job.stderr is not None
    job.stdin.write(raw[:-1])  # all but the last byte of the second document
    job.stdin.flush()
    line = ""
    while not re.search(r'"done":512,|: 512 of', line):
        job.send_signal(signum)
        line = job.stderr.readline().decode()
        assert line, f"ended with {job.wait()}"
    out, err = job.communicate(raw[-1:], timeout=60)
    assert (job.returncode, out) == (0, plain.out)
    if form == "text":
        assert re.fullmatch(r"rb-info: 512 of 1000 rows in \d+\.\d s, \d+\.\d per second\n", line)
        assert not [other for other in err.decode().splitlines() if "rows in" not in other]
        return
    (status,) = events(line)
    assert (status["ev"], status["done"], status["total"], status["unit"]) == ("status", 512, 1000, "rows")
    # Seconds are told to the millisecond.
    assert 512 / (status["seconds"] + 0.001) < status["rate"] < 512 / max(status["seconds"] - 0.001, 1e-6)
    assert events(err.decode())[-1]["ev"] == "exit"


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_question_upon_each_answer_harms_nothing(form: str) -> None:
    """It comes while the command is still busy with the answer."""
    job = waiting("rb-info", RB_LOG=form)
    assert job.stderr is not None
    for _ in range(5000):
        job.send_signal(signal.SIGUSR1)
        assert re.search(rb"seconds| s\b", job.stderr.readline())
    out, err = job.communicate(execute("rb-data", "shapes", "--n", 2).out, timeout=60)
    assert job.returncode == 0 and b"2 rows" in out and b"error" not in err, err[-500:]


def test_a_question_is_answered_in_the_middle_of_a_long_operation() -> None:
    """Of torch, which lets no handler of Python run before it has ended."""
    code = "import torch\nfrom rbkit.cli._app import program\n"
    code += "def work() -> None:\n    a = torch.rand(5000, 5000); print('begun', flush=True); a @ a; print('over', flush=True)\n"
    code += "program('rb-x', work)()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(OMP_NUM_THREADS="1"),
    ) as job:  # fmt: skip
        assert job.stdout is not None and job.stderr is not None
        assert job.stdout.readline() == b"begun\n"
        job.send_signal(signal.SIGUSR1)
        assert job.stderr.readline().startswith(b"rb-x: at work for ")
        assert select.select([job.stdout], [], [], 0.5) == ([], [], [])
        assert job.stdout.readline() == b"over\n"
    assert job.returncode == 0


def test_every_event_stands_in_the_table() -> None:
    code = "".join(path.read_text() for path in (ROOT / "cli").glob("*.py"))
    sent = set(re.findall(r'\bemit\(\s*[\w.]+,\s*"(\w+)"', code))
    logs = (ROOT / "man" / "rbkit.7").read_text().partition("\n.SH LOGS")[2].partition("\n.SH ")[0]
    assert sent == set(re.findall(r"^\.TP\n(\w+)$", logs, flags=re.M)) and "heartbeat" in sent
