"""Output files: old, new or absent; what stays of their mode, links, devices; whose temporary file is removed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rbkit.formats.atomic import MARK, AtomicFile, remove_orphans, write_atomically


def temporaries(folder: Path) -> list[Path]:
    """What writers left in a folder."""
    return list(folder.glob(MARK + "*"))


def names(folder: Path) -> list[str]:
    """What a folder holds."""
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask() -> Iterator[None]:
    """Restores the process's umask."""
    old = os.umask(0o022)
    yield
    os.umask(old)


@pytest.mark.parametrize("existing", [False, True])
def test_commit_replaces_and_leaves_nothing_else(existing: bool, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if existing:
        path.write_bytes(b"old, and longer than the new")
    out = AtomicFile(path)
    out.file.write(b"new")
    out.file.flush()
    assert path.exists() == existing and (not existing or path.read_bytes().startswith(b"old"))
    assert len(temporaries(tmp_path)) == 1
    out.commit()
    assert path.read_bytes() == b"new" and names(tmp_path) == ["x"]


@pytest.mark.parametrize("existing", [False, True])
def test_abort_keeps_the_old_content(existing: bool, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if existing:
        path.write_bytes(b"old")
    out = AtomicFile(path)
    out.file.write(b"new")
    out.abort()
    assert names(tmp_path) == (["x"] if existing else [])
    assert not existing or path.read_bytes() == b"old"
    assert out.file.closed


def test_a_target_to_be_kept_is_never_replaced(tmp_path: Path) -> None:
    """Also where it appears while the new content is being written; elsewhere the new file is like any other."""
    path = tmp_path / "x"
    out = AtomicFile(path, replace=False)
    out.file.write(b"new")
    path.write_bytes(b"appeared")
    with pytest.raises(FileExistsError) as caught:
        out.commit()
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"appeared" and names(tmp_path) == ["x"] and out.file.closed
    write_atomically(tmp_path / "y", b"new", replace=False)
    assert (tmp_path / "y").read_bytes() == b"new" and (tmp_path / "y").stat().st_nlink == 1
    assert names(tmp_path) == ["x", "y"]
    write_atomically("/dev/null", b"gone", replace=False)


def test_a_reader_of_the_old_file_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with path.open("rb") as file:
        write_atomically(path, b"new")
        assert file.read() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failed_commit_keeps_the_old_content(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "rename")), fail)
    with pytest.raises(OSError, match="Input/output") as caught:
        write_atomically(path, b"new")
    assert caught.value.filename in (None, str(path))
    assert path.read_bytes() == b"old" and names(tmp_path) == ["x"]


def test_a_failed_write_keeps_the_old_content(tmp_path: Path) -> None:
    """The process may write files of 1,000 bytes at most."""
    path = tmp_path / "x"
    path.write_bytes(b"old")
    code = (
        "import resource, signal, sys; from rbkit.formats.atomic import write_atomically\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_atomically(sys.argv[1], bytes(1000))\n"
        "try: write_atomically(sys.argv[1], bytes(100_000))\n"
        "except OSError as error: print(error.errno)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == "27\n" and not done.stderr
    assert path.read_bytes() == bytes(1000) and names(tmp_path) == ["x"]


def test_content_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def watch_fsync(fd: int) -> None:
        seen.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else f"file of {os.fstat(fd).st_size}")
        fsync(fd)

    def watch_rename(self: Path, target: Path) -> Path:
        seen.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(Path, "rename", watch_rename)
    write_atomically(tmp_path / "x", b"12345")
    assert seen == ["file of 5", "rename", "directory"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
@pytest.mark.usefixtures("umask")
def test_a_new_file_obeys_the_umask_and_an_old_one_keeps_its_mode(mask: int, mode: int, tmp_path: Path) -> None:
    os.umask(mask)
    path = tmp_path / "x"
    write_atomically(path, b"1")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    path.chmod(0o664)
    write_atomically(path, b"2")
    assert stat.S_IMODE(path.stat().st_mode) == 0o664


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    target, link = tmp_path / "a" / "x", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to("a/x")
    out = AtomicFile(link)
    assert len(temporaries(tmp_path / "a")) == 1
    out.file.write(b"new")
    out.commit()
    assert link.is_symlink() and target.read_bytes() == b"new"
    dangling = tmp_path / "dangling"
    dangling.symlink_to("a/y")
    write_atomically(dangling, b"fresh")
    assert dangling.is_symlink() and (tmp_path / "a" / "y").read_bytes() == b"fresh"


def test_devices_are_written_in_place() -> None:
    before = Path("/dev/null").stat()
    out = AtomicFile("/dev/null")
    assert out.in_place
    out.file.write(b"gone")
    out.commit()
    after = Path("/dev/null").stat()
    assert stat.S_ISCHR(after.st_mode) and (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    with pytest.raises(OSError, match="No space left"):
        write_atomically("/dev/full", b"x")


def test_a_fifo_is_written_in_place(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()))
    reader.start()
    write_atomically(path, bytes(200_000))
    reader.join()
    assert found == [bytes(200_000)]
    assert stat.S_ISFIFO(path.stat().st_mode) and names(tmp_path) == ["fifo"]


def test_a_pipe_by_its_number_is_written_in_place() -> None:
    read_end, write_end = os.pipe()
    write_atomically(f"/dev/fd/{write_end}", b"through")
    os.close(write_end)
    with os.fdopen(read_end, "rb") as file:
        assert file.read() == b"through"


@pytest.mark.parametrize("name", ["", "new/"])
def test_directories_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        AtomicFile(f"{tmp_path}/{name}")
    assert not names(tmp_path)


def test_a_missing_directory_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        AtomicFile(tmp_path / "no" / "x")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        AtomicFile(tmp_path / "file" / "x")


def test_names_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    write_atomically(path, b"1")
    assert path.read_bytes() == b"1"


# A writer that says when it holds its temporary file, then sleeps.
HOLD = (
    "import sys, time; from rbkit.formats.atomic import AtomicFile\n"
    "out = AtomicFile(sys.argv[1]); out.file.write(b'half'); out.file.flush(); print('held', flush=True); time.sleep(60)"
)


def test_an_orphan_is_removed_but_not_the_file_of_a_living_writer(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout is not None and writer.stdout.readline() == b"held\n"
            (held,) = temporaries(tmp_path)
            remove_orphans(path)
            write_atomically(path, b"mine")
            assert temporaries(tmp_path) == [held] and held.read_bytes() == b"half"
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
    assert temporaries(tmp_path) == [held]
    write_atomically(tmp_path / "y", b"other")
    assert temporaries(tmp_path) == [held]  # another target's orphan is not ours to judge
    write_atomically(path, b"again")
    assert not temporaries(tmp_path) and path.read_bytes() == b"again"


def test_two_writers_of_one_target_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "x"
    one, two = AtomicFile(path), AtomicFile(path)
    one.file.write(b"one" * 1000)
    two.file.write(b"two")
    two.commit()
    assert path.read_bytes() == b"two"
    one.commit()
    assert path.read_bytes() == b"one" * 1000 and names(tmp_path) == ["x"]
