"""The jobs of cluster/ in a real Slurm of two nodes: whatever is killed, doubled, requeued or preempted, the same bytes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import BIN, environment, execute

if "RB_SLURM" not in os.environ:
    pytest.skip("no Slurm: cluster/ was NOT tested; make test-cluster does it", allow_module_level=True)

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
# Models that learn nothing, so that the study ends with the status that says so.
KNOBS = ("N=64", "NTEST=12", "NMAPS=6", "NINV=5", "EPOCHS=1", "JUDGE_EPOCHS=1", "EPSS=0.25 0.5", "METHODS=gradient shap", "POINTS=2")  # fmt: skip


def slurm(*argv: object, cwd: Path | None = None) -> str:
    """What a command of Slurm prints."""
    done = subprocess.run(
        list(map(str, argv)), capture_output=True, text=True, env=environment(), cwd=cwd, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def submit(*argv: object, cwd: Path) -> str:
    """The id of a job submitted from `cwd`."""
    return slurm("sbatch", "--parsable", *argv, cwd=cwd)


def field(job: str, name: str) -> list[str]:
    """A field of a job, once per task of an array."""
    return re.findall(rf"\b{name}=(\S*)", slurm("scontrol", "show", "job", job))


def wait_until(holds: Callable[[], object], *, seconds: float = 500) -> None:
    """Until a condition holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, slurm("squeue", "--states=all")
        time.sleep(0.1)


def finish(*jobs: str) -> list[str]:
    """The states in which jobs ended."""
    wait_until(lambda: not slurm("squeue", "--noheader", f"--jobs={','.join(jobs)}"))
    return sorted({state for job in jobs for state in field(job, "JobState")})


def writer(folder: Path, shard: str) -> int | None:
    """The process that is writing the part of a shard in a folder."""
    for unfinished in folder.glob(".rb-tmp.*"):
        pid = unfinished.name.split(".")[3]
        if f"--shard\0{shard}\0".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            return int(pid)
    return None


@pytest.fixture
def place(tmp_path: Path, stream_file: Path, model_file: Path) -> Path:
    """A folder with rows and a model, from which jobs are submitted by relative names."""
    shutil.copy(stream_file, tmp_path / "test.safetensors")
    shutil.copy(model_file, tmp_path / "model.safetensors")
    return tmp_path


def test_the_study_of_arrays_is_that_of_make(tmp_path: Path) -> None:
    """Also run again, when nothing is made anew; every file of the study, the page included."""
    local = subprocess.run(
        ["make", "-C", ROOT, "-o", "setup", "-j2", "study", *KNOBS, f"OUT={tmp_path}/make"],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Error 8" in local.stderr, local.stderr
    words = (CLUSTER / "study.sh", *KNOBS, f"OUT={tmp_path}/jobs", "SHARDS=2")
    finish(last := slurm(*words, cwd=tmp_path))
    made, expected = tmp_path / "jobs/shapes", tmp_path / "make/shapes"
    logs = "".join(path.read_text() for path in sorted((made / "log").iterdir()))
    assert field(last, "JobState") == ["FAILED"] and "Error 8" in logs, logs

    names = [p.relative_to(expected) for p in expected.rglob("*") if p.is_file()]

    def differ() -> list[str]:
        """Files that are not the same; the page names the folder."""
        folders = [str(tmp_path / name).encode() for name in ("jobs", "make")]
        return [
            str(name)
            for name in names
            if (made / name).read_bytes().replace(*folders) != (expected / name).read_bytes()
        ]

    assert len(names) > 40 and not differ()
    parts = {p: p.stat().st_mtime_ns for p in (made / "parts").glob("*.rbs")}
    assert len(parts) == 2 * 2 * 7

    finish(last := slurm(*words, cwd=tmp_path))
    assert {p: p.stat().st_mtime_ns for p in (made / "parts").glob("*.rbs")} == parts
    assert not differ()


def test_a_killed_task_is_made_by_the_array_that_the_join_names(place: Path) -> None:
    """Submitted twice at once; then again, when there is nothing left to do. The shell's array string is rb-info's own."""
    attack = ("rb-attack", "test.safetensors", "-m", "model.safetensors", "--until", "end", "--steps", 200)
    words = (CLUSTER / "array.sbatch", 3, "parts/%-of-3.rbs", *attack)
    job = submit("--array=1-3", *words, cwd=place)
    wait_until(lambda: writer(place / "parts", "2/3"))
    os.kill(writer(place / "parts", "2/3") or 0, signal.SIGKILL)
    assert finish(job) == ["COMPLETED", "FAILED"]
    left = sorted(place.glob("parts/*.rbs"))
    assert [p.name for p in left] == ["1-of-3.rbs", "3-of-3.rbs"]

    joined = execute("rb-info", "--join", *left, "-o", place / "all.safetensors")
    missing = re.search(r"sbatch (--array=\S+)", joined.err)
    assert joined.status == 3 and missing and missing[1] == "--array=2", joined.err
    assert finish(submit(CLUSTER / "join.sbatch", 3, "all.safetensors", "parts/%-of-3.rbs", cwd=place)) == ["FAILED"]
    assert "1 of 3 parts are missing; try sbatch --array=2" in "".join(p.read_text() for p in place.glob("slurm-*.out"))

    again, twin = (submit(missing[1], *words, cwd=place) for _ in range(2))
    assert finish(again, twin) == ["COMPLETED"]
    before = [p.stat().st_mtime_ns for p in sorted(place.glob("parts/*.rbs"))]
    assert finish(submit("--array=1-3", *words, cwd=place)) == ["COMPLETED"]
    assert [p.stat().st_mtime_ns for p in sorted(place.glob("parts/*.rbs"))] == before
    assert finish(submit(CLUSTER / "join.sbatch", 3, "all.safetensors", "parts/%-of-3.rbs", cwd=place)) == ["COMPLETED"]
    assert execute(*attack, "-o", "whole.safetensors", cwd=place).status == 0
    assert (place / "all.safetensors").read_bytes() == (place / "whole.safetensors").read_bytes()
    assert not list(place.rglob(".rb-tmp.*"))


def test_other_options_and_newer_inputs_make_a_part_anew(place: Path) -> None:
    """A finished part is kept only where it is what would be made."""

    def made(*extra: object) -> bytes:
        words = (CLUSTER / "array.sbatch", 2, "%.rbs", "rb-saliency", "test.safetensors", "-m", "model.safetensors")
        assert finish(submit("--array=2", *words, *extra, cwd=place)) == ["COMPLETED"]
        return (place / "2.rbs").read_bytes()

    first = made()
    assert made("--method", "input-x-gradient") != first
    assert made() == first
    before = (place / "2.rbs").stat().st_ino
    (place / "model.safetensors").touch()
    assert made() == first and (place / "2.rbs").stat().st_ino != before


def test_training_goes_on_to_the_same_bytes(place: Path, train_file: Path) -> None:
    """Requeued, preempted, and stopped before its time limit: by the job itself, by Slurm, by Slurm's RequeueExit."""
    recipe = ("rb-train", train_file, "--width", 4, "--epochs", 100, "--eps", "0.5", "--steps", 2, "--resume")
    log, checkpoint = place / "train.log", place / "out.safetensors.ckpt"
    alone = subprocess.Popen(
        [BIN / "rb-train", *map(str, recipe[1:]), "-q", "-o", "whole.safetensors"], cwd=place, env=environment()
    )
    job = submit("-o", log, "--signal=B:USR1@50", CLUSTER / "train.sbatch", *recipe, "-o", "out.safetensors", cwd=place)

    def at_work(restarts: int) -> bool:
        """Whether it has trained an epoch since it was begun so often again."""
        begun = log.exists() and log.read_text().count("resumed at") == restarts
        return begun and checkpoint.exists() and checkpoint.stat().st_mtime > log.stat().st_mtime

    wait_until(lambda: at_work(0))
    slurm("scontrol", "requeue", job)
    wait_until(lambda: at_work(1))
    node = field(job, "NodeList")[0]
    high = submit("--partition=high", "--exclusive", f"--nodelist={node}", "--wrap", "true", cwd=place)
    assert finish(high) == ["COMPLETED"]
    wait_until(lambda: at_work(2))
    with Path(os.environ["SLURM_CONF"]).open("a") as conf:
        conf.write("RequeueExit=75\n")
    slurm("scontrol", "reconfigure")
    slurm("scontrol", "update", f"job={job}", "TimeLimit=1")  # minute; Slurm looks twice in one
    wait_until(lambda: field(job, "Restarts") == ["3"])
    slurm("scontrol", "update", f"job={job}", "TimeLimit=60")

    assert finish(job) == ["COMPLETED"], log.read_text()
    stops = re.findall(r"stopped by (\w+)", log.read_text())
    assert stops == ["SIGTERM", "SIGUSR1", "SIGUSR1"] and log.read_text().count("resumed at") == 3, log.read_text()
    assert alone.wait(600) == 0
    assert (place / "out.safetensors").read_bytes() == (place / "whole.safetensors").read_bytes()
    assert not checkpoint.exists()
