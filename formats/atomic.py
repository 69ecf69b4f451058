"""Files that are old, new or absent, never half-written.

The new content goes to a temporary file beside the target (same file system and quota), is synced, renamed over the
target, and the directory is synced. The temporary file is locked while its writer lives, so the next writer of the
same target can tell an orphan and remove it. Devices and FIFOs are written in place; symbolic links are followed.
A target that must not be replaced gets its name by a hard link, which fails where somebody else took the name.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
from pathlib import Path
from typing import BinaryIO

MARK = ".rb-tmp."
_unfinished: set[Path] = set()


def _prefix(target: Path) -> str:
    # A digest, not the name: a name of 255 bytes leaves no room for a suffix.
    return f"{MARK}{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}."


def remove_orphans(target: Path) -> None:
    """Delete temporary files of `target` that no living writer holds."""
    for orphan in target.parent.glob(_prefix(target) + "*"):
        try:
            fd = os.open(orphan, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            orphan.unlink(missing_ok=True)
        except OSError:
            pass  # held by a writer at work, or not ours to remove
        finally:
            os.close(fd)


class AtomicFile:
    """An output file: write to `file`, then `commit()`, or `abort()` to leave the target as it was.

    replace: whether a target that is there, or appears meanwhile, is replaced; else `commit` raises FileExistsError.
    Raises: OSError when the target cannot be created; nothing is left behind.
    """

    def __init__(self, path: str | os.PathLike[str], *, replace: bool = True) -> None:
        self.replace = replace
        self.target = Path(os.path.realpath(path))
        self.temporary: Path | None = None
        if os.fspath(path).endswith("/") or self.target.is_dir():
            raise IsADirectoryError(21, "Is a directory", os.fspath(path))
        # `path`, not its real path: /dev/stdout of a pipe resolves to a name that does not exist.
        if Path(path).exists() and not Path(path).is_file():
            self.file: BinaryIO = Path(path).open("wb", buffering=0)  # noqa: SIM115
            return
        remove_orphans(self.target)
        temporary = self.target.parent / f"{_prefix(self.target)}{os.getpid()}.{secrets.token_hex(4)}"
        _unfinished.add(temporary)
        try:
            self.file = self._create(temporary)
        except OSError as error:  # name what was asked for, not the temporary file
            temporary.unlink(missing_ok=True)
            _unfinished.discard(temporary)
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        self.temporary = temporary

    def _create(self, temporary: Path) -> BinaryIO:
        """The temporary file, locked for as long as it is open, with the mode of the file that it will replace."""
        file = os.fdopen(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "w+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.target.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(self.target.stat().st_mode))
        except OSError:
            file.close()
            raise
        return file

    @property
    def in_place(self) -> bool:
        """Whether the target is a device or FIFO, which cannot be replaced or rewound."""
        return self.temporary is None

    def commit(self) -> None:
        """Make the new content the target, on disk, or raise OSError and leave the target as it was."""
        try:
            self.file.flush()
            if self.temporary is not None:
                os.fsync(self.file.fileno())
                self._name(self.temporary)
                _unfinished.discard(self.temporary)
                self.temporary = None
                _sync_directory(self.target.parent)
            self.file.close()
        except OSError:
            self.abort()
            raise

    def _name(self, temporary: Path) -> None:
        """Give the content the name of the target."""
        try:
            if self.replace:
                temporary.rename(self.target)
            else:
                self.target.hardlink_to(temporary)
                temporary.unlink()
        except OSError as error:  # name the target, not the temporary file
            raise OSError(error.errno, error.strerror, os.fspath(self.target)) from None

    def abort(self) -> None:
        """Forget the new content."""
        if self.temporary is not None:
            self.temporary.unlink(missing_ok=True)
            _unfinished.discard(self.temporary)
            self.temporary = None
        with contextlib.suppress(OSError):  # a full disk may refuse the last flush; the file is gone already
            self.file.close()


def forget_unfinished() -> None:
    """Remove the temporary files of this process: for one that ends by a signal, wherever that reached it."""
    while _unfinished:
        with contextlib.suppress(OSError):
            _unfinished.pop().unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError:
        pass  # some file systems cannot sync a directory; the rename itself stands
    finally:
        os.close(fd)


def write_atomically(path: str | os.PathLike[str], content: bytes, *, replace: bool = True) -> None:
    """Make `content` what `path` holds, or leave it as it was. Raises: OSError."""
    out = AtomicFile(path, replace=replace)
    try:
        out.file.write(content)
    except OSError:
        out.abort()
        raise
    out.commit()
