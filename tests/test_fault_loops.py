"""One fault after the other, until there is none left: afterwards a target is old, new or absent, and nothing lies beside it.

RB_FAULTS=long tries every command and more moments (half an hour); the default is one that starts without torch.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import BIN, Result, environment, execute, shell

from rbkit.formats.atomic import MARK

LONG = os.environ.get("RB_FAULTS") == "long"
FAULTS = {
    "write": "ENOSPC", "fsync": "EIO", "rename": "EIO", "close": "EIO", "fchmod": "EPERM", "link": "EMLINK",
    "linkat": "EMLINK", "openat": "EACCES", "ftruncate": "EFBIG", "flock": "ENOLCK", "lseek": "EIO",
}  # fmt: skip
needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="strace is not installed: NO fault was injected"
)

# TARGET is what is written; the other names are made by `stock`.
DATA = "rb-data npz rows.npz -q -o TARGET.safetensors"
LINES = [DATA]
if LONG:
    LINES += [
        "rb-data npz rows.npz -q --no-clobber -o TARGET.safetensors",
        "rb-data npz rows.npz -q -o TARGET.rbs",
        "rb-train train.safetensors --width 4 --epochs 1 --batch 32 -q -o TARGET.safetensors",
        "rb-attack rows.safetensors -m model.safetensors --steps 1 -q -o TARGET.safetensors",
        "rb-saliency rows.safetensors -m model.safetensors -q -o TARGET.safetensors",
        "rb-invert rows.safetensors -m model.safetensors --steps 1 -q -o TARGET.safetensors",
        "rb-score rows.safetensors -m model.safetensors --json -q -o TARGET.rbs",
        "rb-model export model.safetensors -o TARGET.safetensors",
        "rb-info --join rows.safetensors -o TARGET.safetensors",
        "rb-view rows.safetensors -o TARGET.png",
        "rb-report scores.jsonl -o TARGET.html",
    ]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder with what the lines read."""
    folder = tmp_path_factory.mktemp("stock")
    np.savez(
        folder / "rows.npz", image=np.arange(40 * 126, dtype=np.uint8).reshape(40, 3, 6, 7), label=np.arange(40) % 4
    )
    if LONG:
        for name, fixture in (("rows", "stream_file"), ("model", "model_file"), ("train", "train_file")):
            shutil.copy(request.getfixturevalue(fixture), folder / f"{name}.safetensors")
        assert shell("rb-score rows.safetensors -m model.safetensors --json > scores.jsonl", cwd=folder).status == 0
    return folder


def fill(line: str, target: Path) -> tuple[str, Path]:
    """A line with its target, which goes to a folder of its own, and the path of that."""
    words = line.replace("TARGET", str(target)).split()
    return f"{BIN}/{' '.join(words)}", Path(words[-1])


def touching(line: str, folder: Path, stock: Path) -> list[tuple[str, int]]:
    """The calls of the main thread that touch a folder: (name, number among all calls of that name, from 1)."""
    log = folder.parent / "calls"
    done = shell(f"strace -f -y -qq -e signal=none -e trace={','.join(FAULTS)} -o {log} {line}", cwd=stock)
    assert done.status == 0, done.err
    lines = [text.split(maxsplit=1) for text in log.read_text().splitlines() if " resumed>" not in text]
    counts, found = Counter[str](), []
    for call in (call for thread, call in lines if thread == lines[0][0]):
        name = call.partition("(")[0]
        counts[name] += 1
        if str(folder) in call:
            found.append((name, counts[name]))
    return found


def injected(line: str, name: str, number: int, what: str) -> str:
    """A line of which one call is made to fail, or to be the last."""
    return f"strace -f -qq -o /dev/null -e trace={name} -e inject={name}:{what}:when={number} {line}"


def one_line(result: Result, status: int) -> None:
    assert result.status == status and result.err.count("\n") == 1 and "Traceback" not in result.err, result


@needs_strace
@pytest.mark.parametrize("line", LINES)
def test_whichever_call_fails_the_target_is_old_or_new(line: str, stock: Path, tmp_path: Path) -> None:
    """Each call that touches the folder of the target fails in one run, for good (4) or without a loss (0)."""
    folder = tmp_path / "out"
    folder.mkdir()
    old = None if "--no-clobber" in line else b"old"
    command, target = fill(line, folder / "x")
    assert shell(command, cwd=stock).status == 0
    new = target.read_bytes()
    restore(target, old)
    faults, told = touching(command, folder, stock), 0
    for name, number in faults:
        restore(target, old)
        result = shell(injected(command, name, number, f"error={FAULTS[name]}"), cwd=stock)
        found = target.read_bytes() if target.exists() else None
        assert {p.name for p in folder.iterdir()} <= {target.name, f"{target.name}.ckpt"}, "something was left behind"
        assert found in (old, new) and (result.status or found == new), (name, number)
        if result.status:
            one_line(result, 4)
            told += 1
    assert told >= 4
    print(f"{len(faults)} faults, {told} of them told")


def restore(target: Path, old: bytes | None) -> None:
    """The folder as before a run."""
    for path in target.parent.iterdir():
        path.unlink()
    if old is not None:
        target.write_bytes(old)


@needs_strace
def test_killed_at_whichever_call(stock: Path, tmp_path: Path) -> None:
    """SIGKILL at calls that touch the folder: no part is taken for a whole, and the next writer cleans up."""
    folder = tmp_path / "out"
    folder.mkdir()
    command, target = fill(DATA, folder / "x")
    assert shell(command, cwd=stock).status == 0
    new = target.read_bytes()
    calls = touching(command, folder, stock)[:: 1 if LONG else 3]
    for name, number in calls:
        target.write_bytes(b"old")
        assert shell(injected(command, name, number, "signal=KILL"), cwd=stock).status in (-9, 137)
        assert target.read_bytes() in (b"old", new)
        assert shell(command, cwd=stock).status == 0
        assert target.read_bytes() == new and list(folder.iterdir()) == [target]
    assert len(calls) > 5
    print(f"killed at {len(calls)} calls")


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Twenty moments of a run that writes 8 MB; each leaves at most its own temporary file, which the next removes."""
    np.savez(tmp_path / "rows.npz", image=np.zeros((4000, 3, 26, 27), np.uint8))
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "x.safetensors"
    command = [BIN / "rb-data", "npz", tmp_path / "rows.npz", "-o", target]
    begin = time.monotonic()
    subprocess.run(command, env=environment(), check=True)
    lasts, new = time.monotonic() - begin, target.read_bytes()
    moments, killed = random.Random(0), 0
    for _ in range(400 if LONG else 20):
        target.write_bytes(b"old")
        job = subprocess.Popen(command, env=environment())
        try:
            job.wait(moments.uniform(0, lasts))
        except subprocess.TimeoutExpired:
            job.kill()
        killed += job.wait() == -signal.SIGKILL
        left = [p for p in folder.iterdir() if p != target]
        assert target.read_bytes() in (b"old", new) and len(left) <= 1 and all(p.name.startswith(MARK) for p in left)
    subprocess.run(command, env=environment(), check=True)
    assert list(folder.iterdir()) == [target] and target.read_bytes() == new and killed
    print(f"{killed} killed")


def test_a_limit_of_the_file_size(stock: Path, tmp_path: Path) -> None:
    """The file may be of K bytes at most: 4 and the old target, until it fits."""
    folder = tmp_path / "out"
    folder.mkdir()
    command, target = fill(DATA, folder / "x")
    size = len(execute("rb-data", "npz", stock / "rows.npz").out)
    tried = [*range(0, size, 97 if LONG else 2500), size - 1]
    for limit in tried:
        target.write_bytes(b"old")
        one_line(shell(f"trap '' XFSZ; exec prlimit --fsize={limit} {command}", cwd=stock), 4)
        assert target.read_bytes() == b"old" and list(folder.iterdir()) == [target], limit
    assert shell(f"exec prlimit --fsize={size} {command}", cwd=stock).status == 0 and target.stat().st_size == size
    print(f"{len(tried)} limits")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[str]:
    """What a line of bash is put into to run with a file system of 64 kB at `disk`."""
    (tmp_path / "disk").mkdir()
    line = f"unshare -rm bash -euc 'mount -t tmpfs -o size=64k none {tmp_path}/disk; cd {tmp_path}; LINE'"
    if shell(line.replace("LINE", "true")).status:
        pytest.skip("no name space for mounts here: a full disk was NOT tried")
    return line


def test_a_full_disk(small_disk: str, stock: Path, tmp_path: Path) -> None:
    """Of -o, of a redirection, and of a folder of pictures; then there is room again and the same command gets through."""
    np.savez(tmp_path / "rows.npz", image=np.random.default_rng(0).integers(0, 256, (300, 3, 16, 16), np.uint8))
    script = """
        echo old > disk/x.safetensors
        rb-data npz rows.npz -o disk/x.safetensors && exit 90; echo $?
        cat disk/x.safetensors; ls -A disk
        rb-data npz rows.npz > disk/y && exit 91; echo $?
        rm disk/y
        rb-data npz rows.npz --n 5 | rb-view -o disk/pictures/; echo $?
        rm -r disk/pictures
        rb-data npz rows.npz | rb-view -o disk/pictures/ && exit 92; echo $?
        find disk -name "*rb-tmp*"
        rm -r disk/pictures
        rb-data npz rows.npz --n 20 -o disk/x.safetensors && rb-info --check disk/x.safetensors; echo $?
    """
    done = shell(small_disk.replace("LINE", script))
    assert done.status == 0, done.err
    assert done.out.decode().split() == ["4", "old", "x.safetensors", "4", "0", "4", "0"], done
    assert done.err.count("No space left on device") == 3 == done.err.count("\n"), done.err
    assert "disk/x.safetensors: " in done.err and "disk/pictures/" in done.err, (
        "the message names what could not be written"
    )
