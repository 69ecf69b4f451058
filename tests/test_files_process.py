"""Outputs and signals of the commands as processes: what is left behind, and what the caller is told."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import BIN, Result, environment, execute, shell

SCRIPTS = sorted(
    tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
)
SLOW = ("shapes", "--n", "200000")  # more rows than any test waits for


def start(*argv: object, **streams: int) -> subprocess.Popen[bytes]:
    """A command at work; the caller ends it."""
    return subprocess.Popen(
        [BIN / str(argv[0]), *map(str, argv[1:])], stdin=subprocess.DEVNULL, env=environment(), **streams
    )


def one_line(result: Result, status: int) -> None:
    assert result.status == status, result.err
    assert result.err.startswith("rb-") and result.err.count("\n") == 1, result.err


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """40 labelled images of 3 x 6 x 7 for rb-data npz, which starts without torch."""
    path = tmp_path / "rows.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3, 6, 7), np.uint8)
    np.savez(path, image=pixels, label=np.arange(40) % 4)
    return path


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_command_keeps_the_contract(command: str) -> None:
    """Version and help reach their reader or fail; an option that is none is usage, on one line."""
    version = execute(command, "--version")
    assert (version.status, version.out.split()[:2], version.err) == (0, [command.encode(), b"(rbkit)"], "")
    one_line(shell(f"{command} --help > /dev/full"), 4)
    one_line(shell(f"{command} --version >&-"), 4)
    one_line(execute(command, "--no-such-option"), 2)
    last = json.loads(execute(command, "--no-such-option", RB_LOG="json").err)
    assert (last["tool"], last["ev"], last["code"]) == (command, "exit", 2)


@pytest.mark.parametrize("line", ["rb-data npz rows.npz 2>&-", "rb-data npz rows.npz 2>/dev/full"])
def test_a_lost_standard_error_changes_nothing(line: str, npz: Path) -> None:
    plain = execute("rb-data", "npz", npz)
    lost = shell(line, cwd=npz.parent)
    assert (lost.status, lost.out) == (0, plain.out) and plain.out
    failed = shell(line.replace("rows", "none"), cwd=npz.parent)
    assert (failed.status, failed.out) == (3, b"")


def test_text_is_not_lost_in_silence(npz: Path) -> None:
    shell("rb-data npz rows.npz -o rows.safetensors", cwd=npz.parent)
    for line in ("rb-info rows.safetensors > /dev/full", "rb-info rows.safetensors >&-"):
        one_line(shell(line, cwd=npz.parent), 4)


def test_a_redirected_file_equals_the_named_one(npz: Path) -> None:
    """Also in its mode, which is what the umask says."""
    line = "umask 027; rb-data npz rows.npz -o a.safetensors; rb-data npz rows.npz > b.safetensors; cat < a.safetensors > c"
    assert shell(line, cwd=npz.parent).status == 0
    a, b = npz.parent / "a.safetensors", npz.parent / "b.safetensors"
    assert a.read_bytes() == b.read_bytes() and len(a.read_bytes()) > 40 * 126
    assert a.stat().st_mode & 0o777 == b.stat().st_mode & 0o777 == 0o640


def test_an_old_target_keeps_its_mode_and_its_link(npz: Path) -> None:
    real, link = npz.parent / "real.safetensors", npz.parent / "link.safetensors"
    real.write_bytes(b"old")
    real.chmod(0o604)
    link.symlink_to("real.safetensors")
    assert execute("rb-data", "npz", npz, "-o", link).status == 0
    assert link.is_symlink() and real.stat().st_mode & 0o777 == 0o604
    assert execute("rb-info", "--check", real).status == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_writer_and_leaves_the_old_target(number: int, tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"old")
    job = start("rb-data", *SLOW, "-o", target, stderr=subprocess.PIPE)  # at work or just beginning: all is well
    until(lambda: len(list(tmp_path.iterdir())) > 1, job)
    job.send_signal(number)
    _, err = job.communicate(timeout=60)
    assert (job.returncode, err) == (-number, b"")
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_a_killed_writer_leaves_no_half_target_and_the_next_one_cleans_up(tmp_path: Path, npz: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "x.safetensors"
    job = start("rb-data", *SLOW, "-o", target)
    until(lambda: any(folder.iterdir()), job)
    job.kill()
    assert job.wait(60) == -9
    assert not target.exists() and len(list(folder.iterdir())) == 1
    assert execute("rb-data", "npz", npz, "-o", target).status == 0
    assert list(folder.iterdir()) == [target]
    assert execute("rb-info", "--check", target).status == 0


def test_a_killed_redirection_is_never_taken_for_a_whole(tmp_path: Path) -> None:
    """The file that the shell opened stays, and every reader refuses it."""
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        job = start("rb-data", *SLOW, stdout=file.fileno())
        time.sleep(3)
        job.kill()
        assert job.wait(60) == -9
    one_line(execute("rb-info", path), 3)


def test_nohup_is_respected(tmp_path: Path) -> None:
    job = subprocess.Popen(
        ["bash", "-c", f"trap '' HUP; exec {BIN}/rb-data {' '.join(SLOW)} -o {tmp_path}/x.safetensors"],
        env=environment(),
    )
    until(lambda: any(tmp_path.iterdir()), job)
    job.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert job.poll() is None
    job.terminate()
    assert job.wait(60) == -signal.SIGTERM


def test_ctrl_c_in_a_pipe_is_no_success(model_file: Path) -> None:
    """A tool that waits for its input dies of SIGINT, so that make and loops of the shell stop."""
    job = subprocess.Popen(
        [BIN / "rb-attack", "-m", model_file, "-q"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    assert job.stdin is not None
    job.stdin.write(b"\x08")  # a stream that goes no further
    job.stdin.flush()
    time.sleep(6)  # torch is loaded and the tool waits
    job.send_signal(signal.SIGINT)
    assert job.wait(60) == -signal.SIGINT
    out, err = job.communicate()
    assert out == b"" and b"Traceback" not in err


def until(done: object, job: subprocess.Popen[bytes]) -> None:
    """Wait for a condition while `job` runs."""
    end = time.monotonic() + 60
    while not done():  # type: ignore[operator]
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.01)


def test_maps_leave_before_more_input_comes(model_file: Path) -> None:
    """The maps of the first document are out while the second has not been sent."""
    raw = execute("rb-data", "shapes", "--n", 520).out  # 512 rows, then 8
    cut = len(raw) - len(execute("rb-data", "shapes", "--n", 520, "--shard", "65/65").out)
    tool = subprocess.Popen(
        [BIN / "rb-saliency", "-m", model_file, "--method", "gradient", "-q"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    assert tool.stdin is not None and tool.stdout is not None
    tool.stdin.write(raw[:cut])
    tool.stdin.flush()
    ready, _, _ = select.select([tool.stdout], [], [], 60)
    assert ready and tool.poll() is None, "nothing came out before the second document was sent"
    assert b'"attribution"' in os.read(tool.stdout.fileno(), 1 << 16)
    tool.kill()
    tool.communicate()


def test_memory_stays_flat_in_a_file(tmp_path: Path) -> None:
    """One document of ten times the rows is read in the same memory."""
    peak = "import resource,subprocess,sys; subprocess.run(sys.argv[1:], check=True); "
    peak += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    used = []
    for rows in (4000, 40000):
        np.savez(tmp_path / "r.npz", image=np.zeros((rows, 3, 32, 33), np.uint8))
        path = tmp_path / f"{rows}.safetensors"
        assert execute("rb-data", "npz", tmp_path / "r.npz", "-o", path).status == 0
        done = subprocess.run(
            [sys.executable, "-c", peak, BIN / "rb-info", "--check", path],
            capture_output=True,
            env=environment(),
            check=True,
        )
        used.append(int(done.stdout))
    assert used[1] < used[0] + 16_000  # KiB; the rows are 12 and 121 MiB


def test_checks_name_what_does_not_hold(npz: Path) -> None:
    """A flipped bit, a cut and an appended byte are findings (8) of --check and failures (3) of every other reader."""
    good = execute("rb-data", "npz", npz).out
    bad = {"flipped": good[:-9] + bytes([good[-9] ^ 16]) + good[-8:], "cut": good[:-1], "longer": good + b"\0"}
    whole = npz.parent / "good.rbs"
    whole.write_bytes(good)
    silent = execute("rb-info", "--check", whole)
    assert (silent.status, silent.out, silent.err) == (0, b"", "")
    for name, raw in bad.items():
        path = npz.parent / f"{name}.rbs"
        path.write_bytes(raw)
        found = execute("rb-info", "--check", whole, path)
        assert found.status == 8 and found.out == b"" and path.name in found.err and whole.name not in found.err
        one_line(execute("rb-info", path), 3)


def test_a_traceback_is_for_those_who_ask(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    assert "Traceback" in execute("rb-info", missing, RB_DEBUG="1").err
    one_line(execute("rb-info", missing), 3)
