"""Streams through real pipes: shards, order of rows, promptness, early readers and cut streams."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import BIN, environment, execute, shell
from safetensors import numpy as st

ATTACK = ("--steps", 2, "--eps", "0.25", "-q")


@pytest.fixture(scope="module")
def whole(folder: Path, stream_file: Path, model_file: Path) -> Path:
    """The 40 rows attacked in one piece."""
    path = folder / "pipes-whole.safetensors"
    assert execute("rb-attack", stream_file, "-m", model_file, *ATTACK, "-o", path).status == 0
    return path


def scores(*argv: object, stdin: bytes = b"", cwd: Path | None = None) -> str:
    result = execute("rb-score", *argv, stdin=stdin, cwd=cwd)
    assert result.status == 0, result.err
    return result.out.decode()


# All shards of every count, and what they join to, in one process.
SHARDS = """
import sys
from rbkit.cli.attack import attack
from rbkit.cli.info import info
model, rows, folder = sys.argv[1:]
for count in range(1, 8):
    names = [f"{folder}/{k}-of-{count}.safetensors" for k in range(1, count + 1)]
    for k, name in enumerate(names, 1):
        attack(model, rows, steps=2, eps=["0.25"], threads=1, quiet=True, shard=f"{k}/{count}", output=name)
    info(names[::-1], join=True, output=f"{folder}/{count}.safetensors")
"""


@pytest.fixture(scope="module")
def shards(folder: Path, stream_file: Path, model_file: Path) -> Path:
    """The 40 rows attacked in 1 to 7 shards, `2-of-3.safetensors`, and joined again, `3.safetensors`."""
    made = folder / "shards"
    made.mkdir()
    in_shards(model_file, stream_file, made)
    return made


def in_shards(model: Path, rows: Path, made: Path) -> None:
    subprocess.run([sys.executable, "-c", SHARDS, model, rows, made], env=environment(), check=True)


def test_shards_join_to_the_whole(shards: Path, whole: Path) -> None:
    for count in range(1, 8):
        assert (shards / f"{count}.safetensors").read_bytes() == whole.read_bytes(), count


def test_more_shards_than_rows(tmp_path: Path, model_file: Path) -> None:
    small, whole = tmp_path / "small.safetensors", tmp_path / "whole.safetensors"
    assert execute("rb-data", "shapes", "--n", 3, "-o", small).status == 0
    assert execute("rb-attack", small, "-m", model_file, *ATTACK, "-o", whole).status == 0
    in_shards(model_file, small, tmp_path)
    assert [len(st.load_file(tmp_path / f"{k}-of-4.safetensors")["id"]) for k in (1, 2, 3, 4)] == [0, 1, 1, 1]
    for count in range(1, 8):
        assert (tmp_path / f"{count}.safetensors").read_bytes() == whole.read_bytes(), count


def test_shards_in_order_are_the_stream_and_missing_ones_are_named(
    shards: Path, model_file: Path, whole: Path, tmp_path: Path
) -> None:
    names = [shards / f"{k}-of-3.safetensors" for k in (1, 2, 3)]
    stream = b"".join(name.read_bytes() for name in names)
    assert scores("-m", model_file, stdin=stream) == scores("-m", model_file, whole)
    joined = tmp_path / "joined.safetensors"
    joined.write_bytes(b"old")
    missing = execute("rb-info", "--join", names[1], "-o", joined)
    assert missing.status == 3 and "--array=1,3" in missing.err
    assert joined.read_bytes() == b"old"


def test_shards_with_several_radii_join_to_as_many_streams(tmp_path: Path, stream_file: Path, model_file: Path) -> None:
    attack = ("rb-attack", stream_file, "-m", model_file, "--steps", 1, "--eps", "0.25,0.1", "-q")
    parts, whole, joined = [tmp_path / f"{k}.rbs" for k in (1, 2, 3)], tmp_path / "whole.rbs", tmp_path / "joined.rbs"
    for k, part in enumerate(parts, start=1):
        assert execute(*attack, "--shard", f"{k}/3", "-o", part).status == 0
    assert execute(*attack, "-o", whole).status == 0
    done = execute("rb-info", "--join", parts[2], parts[0], parts[1], "-o", joined)
    assert done.status == 0, done.err
    shown = [json.loads(line) for line in execute("rb-info", "--json", joined).out.splitlines()]
    assert [(record["attack"]["eps"], record["rows"]) for record in shown] == [(0.25, 40), (0.1, 40)]
    assert scores("-m", model_file, joined) == scores("-m", model_file, whole)
    missing = execute("rb-info", "--join", parts[0], parts[2], "-o", joined)
    assert missing.status == 3 and "--array=2" in missing.err
    narrow = execute("rb-info", "--join", *parts, "-o", tmp_path / "joined.safetensors")
    assert narrow.status == 2 and "2 streams" in narrow.err and not (tmp_path / "joined.safetensors").exists()


def test_the_shard_of_an_array_task(tmp_path: Path) -> None:
    """`slurm` is the task of a whole array, `slurm/N` that of any; outside of an array both are refused."""
    np.savez(tmp_path / "rows.npz", image=np.zeros((10, 3, 6, 7), np.uint8))
    data = ("rb-data", "npz", tmp_path / "rows.npz")
    task = {
        f"SLURM_ARRAY_TASK_{name}": text for name, text in (("ID", "2"), ("MIN", "1"), ("MAX", "4"), ("COUNT", "4"))
    }
    expected = execute(*data, "--shard", "2/4").out
    assert execute(*data, "--shard", "slurm", **task).out == expected
    assert execute(*data, "--shard", "slurm/4", SLURM_ARRAY_TASK_ID="2").out == expected
    again = {**task, "SLURM_ARRAY_TASK_COUNT": "2"}  # sbatch --array=1,4 or 2,4: of how many?
    for text, place in (("slurm", {}), ("slurm/4", {}), ("slurm", again), ("slurm/1", task), ("slurmy", task)):
        found = execute(*data, "--shard", text, **place)
        assert found.status == 2 and "--shard" in found.err and found.err.count("\n") == 1, (text, found.err)


def test_pipe_equals_file(tmp_path: Path, stream_file: Path, model_file: Path, whole: Path) -> None:
    """The same tensors through pipes; redirected to an empty file, the same bytes."""
    line = f"cat {stream_file} | rb-attack -m {model_file} --steps 2 --eps 0.25 -q > out.safetensors"
    assert shell(line, cwd=tmp_path).status == 0
    assert (tmp_path / "out.safetensors").read_bytes() == whole.read_bytes()
    line = f"rb-data shapes --n 40 | rb-attack -m {model_file} --steps 2 --eps 0.25 -q | cat > pipe.rbs"
    assert shell(line, cwd=tmp_path).status == 0
    assert scores("-m", model_file, tmp_path / "pipe.rbs") == scores("-m", model_file, whole)
    joined = execute("rb-info", "--join", tmp_path / "pipe.rbs", "-o", tmp_path / "joined.safetensors")
    assert joined.status == 0, joined.err
    assert (tmp_path / "joined.safetensors").read_bytes() == whole.read_bytes()


def test_order_of_rows_changes_no_row(tmp_path: Path, stream_file: Path, model_file: Path, whole: Path) -> None:
    """Reversed rows of a foreign file, with ids: each id has the same adversarial image and cost, bit for bit."""
    rows = st.load_file(stream_file)
    st.save_file({k: np.ascontiguousarray(v[::-1]) for k, v in rows.items()}, tmp_path / "back.safetensors")
    out = tmp_path / "out.safetensors"
    assert execute("rb-attack", tmp_path / "back.safetensors", "-m", model_file, *ATTACK, "-o", out).status == 0
    found, expected = st.load_file(out), st.load_file(whole)
    assert found["id"].tolist() == expected["id"][::-1].tolist()
    for name in ("adversarial", "success", "forwards"):
        assert np.array_equal(found[name][::-1], expected[name]), name


@pytest.mark.parametrize("extra", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_head_ends_a_writer_quietly(extra: dict[str, str]) -> None:
    writer = subprocess.Popen(
        [BIN / "rb-data", "shapes", "--n", "4000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(**extra),
    )  # fmt: skip
    assert writer.stdout is not None and writer.stderr is not None
    assert len(writer.stdout.read(1000)) == 1000
    writer.stdout.close()
    assert writer.wait(60) == -13
    assert writer.stderr.read() == b""
    writer.stderr.close()


def documents(*, count: int) -> list[bytes]:
    """The parts of a stream of shapes, cut at their borders."""
    raw = execute("rb-data", "shapes", "--n", count).out
    parts = []
    while raw:
        header = int.from_bytes(raw[:8], "little")
        end = max(t["data_offsets"][1] for n, t in json.loads(raw[8 : 8 + header]).items() if n != "__metadata__")
        parts.append(raw[: 8 + header + end])
        raw = raw[8 + header + end :]
    return parts


def test_results_leave_before_more_input_comes(model_file: Path) -> None:
    """The rows of the first document are out while the second has not been sent."""
    parts = documents(count=600)
    assert len(parts) >= 2
    tool = subprocess.Popen(
        [BIN / "rb-attack", "-m", model_file, "--steps", "1", "-q"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    assert tool.stdin is not None and tool.stdout is not None
    tool.stdin.write(parts[0])
    tool.stdin.flush()
    ready, _, _ = select.select([tool.stdout], [], [], 60)
    assert ready, "nothing came out before the second document was sent"
    assert tool.poll() is None
    first = os.read(tool.stdout.fileno(), 1 << 16)
    assert b'"adversarial"' in first
    tool.send_signal(signal.SIGUSR1)  # a question, which ends nothing
    rest, err = tool.communicate(b"".join(parts[1:]))
    assert tool.returncode == 0
    assert err.startswith(b"rb-attack: ") and b" images in " in err and err.count(b"\n") == 1, err
    assert execute("rb-info", "--check", stdin=first + rest).status == 0


def test_a_cut_stream_stays_cut(tmp_path: Path, model_file: Path) -> None:
    """A stream cut inside or between documents is refused in the middle of a pipe, and by the command after it."""
    parts = documents(count=600)
    for raw in (parts[0], parts[0] + parts[1][:-7]):
        middle = execute("rb-attack", "-m", model_file, "--steps", 1, "-q", stdin=raw)
        assert middle.status == 3 and middle.err.count("\n") == 1 and middle.err.startswith("rb-attack: "), middle.err
        assert b'"last\\":true' not in middle.out.replace(b'"last":true', b'"last\\":true')
        after = execute("rb-score", "-m", model_file, stdin=middle.out)
        assert after.status == 3 and after.out == b"" and after.err.startswith("rb-score: ")


def test_appended_output_is_a_stream(tmp_path: Path) -> None:
    assert shell("rb-data shapes --n 2 > one.rbs; rb-data shapes --n 3 >> one.rbs", cwd=tmp_path).status == 0
    described = execute("rb-info", tmp_path / "one.rbs")
    assert [line.split(", ")[1] for line in described.out.decode().splitlines() if "images, " in line] == [
        "2 rows",
        "3 rows",
    ]
    assert execute("rb-data", "shapes", "--n", 2, "-o", tmp_path / "file.safetensors").status == 0
    assert (tmp_path / "one.rbs").read_bytes().startswith((tmp_path / "file.safetensors").read_bytes())


def test_commands_that_share_one_output_file_follow_each_other(tmp_path: Path) -> None:
    """The shell opens the file once: the second command writes behind the first, never over it."""
    made = shell(
        "{ rb-data shapes --n 3; rb-data shapes --n 2; } > both; rb-info --check both && rb-info both", cwd=tmp_path
    )
    assert made.status == 0
    assert b"3 rows" in made.out and b"2 rows" in made.out


def test_output_to_a_fifo_and_to_null(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    line = "rb-info --check pipe & rb-data shapes --n 5 -o pipe && wait $! && test -p pipe"
    assert shell(line, cwd=tmp_path, timeout=60).status == 0
    assert execute("rb-data", "shapes", "--n", 5, "-o", "/dev/null").status == 0
    assert Path("/dev/null").is_char_device()


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Ten times the rows through a pipe do not cost ten times the memory of rb-data and rb-info."""
    peak = "import resource,subprocess,sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True); "
    peak += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)"
    np.savez(tmp_path / "images.npz", image=np.zeros((20_000, 3, 32, 32), np.uint8))
    used = []
    for rows in ("1000", "20000"):
        raw = subprocess.Popen(
            [BIN / "rb-data", "npz", tmp_path / "images.npz", "--n", rows], stdout=subprocess.PIPE, env=environment()
        )
        done = subprocess.run(
            [sys.executable, "-c", peak, BIN / "rb-info"], stdin=raw.stdout, stderr=subprocess.PIPE, env=environment(),
            check=True,
        )  # fmt: skip
        assert raw.stdout is not None
        raw.stdout.close()
        raw.wait()
        used.append(int(done.stderr))
    assert used[1] < used[0] + 20_000  # KiB; the rows alone are 60 MB


def test_help_loads_no_torch() -> None:
    """The modules of the commands are imported without torch."""
    assert execute("rb-attack", "--help").status == 0
    code = "import sys; import rbkit.cli.attack, rbkit.cli.score, rbkit.cli.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0


def test_scores_load_no_scipy_stats() -> None:
    """It takes as long to load as a block to judge; only tests between models and rank correlations need it."""
    code = "import sys; import rbkit.tools.pool, rbkit.tools.metrics; sys.exit('scipy.stats' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0


@pytest.mark.parametrize(
    ("makeflags", "piped", "given", "policy", "spins"),
    [
        ("", False, {}, None, None),
        ("", True, {}, "PASSIVE", "3000"),
        (" -j2 --jobserver-auth=3,4", True, {}, "PASSIVE", "1000"),
        (" -j2 --jobserver-auth=3,4", False, {}, "PASSIVE", "1000"),
        ("", True, {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", None),
        ("", True, {"GOMP_SPINCOUNT": "7"}, "PASSIVE", "7"),
    ],
)
def test_threads_sleep_where_neighbours_need_the_cpus(
    tmp_path: Path, makeflags: str, piped: bool, given: dict[str, str], policy: str | None, spins: str | None
) -> None:
    told = tmp_path / "told"
    code = f"""
import json, os
from rbkit.cli._app import _share_cpus
_share_cpus(alone=False)
open({str(told)!r}, "w").write(json.dumps([os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")]))
"""
    clean = {k: v for k, v in environment().items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    subprocess.run(
        [sys.executable, "-c", code], check=True, stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, env=clean | {"MAKEFLAGS": makeflags} | given,
    )  # fmt: skip
    assert json.loads(told.read_text()) == [policy, spins]
