"""Where bytes go to: files, pipes, terminals and pictures. Nothing here knows what a tool computes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rbkit.cli._errors import Output, Usage, blame, reason
from rbkit.cli._input import widen
from rbkit.formats.errors import FormatError

if TYPE_CHECKING:
    import numpy as np

    from rbkit.formats.writer import Writer


def refuse_same_file(source: str, output: str) -> None:
    """Refuse an output that is the input."""
    if source == "-" or output == "-" or not Path(output).exists():
        return
    if Path(source).exists() and Path(source).samefile(output) and Path(output).is_file():
        raise Usage(f"{output}: input and output are the same file")


def refuse_taken(*outputs: str | None, no_clobber: bool) -> None:
    """Where asked to, refuse outputs that are there, before the work: files, and folders that hold something.

    A file that appears meanwhile is refused in the end, by `Sink` and `write_file`.
    """
    for output in outputs if no_clobber else ():
        if output not in (None, "-") and _is_taken(Path(output)):
            raise Output(f"{output}: is already there; leave out --no-clobber to replace it")


def _is_taken(path: Path) -> bool:
    with blame(Output, OSError):
        return any(path.iterdir()) if path.is_dir() else path.is_file()


class Sink:
    """The output of a command: a document, a stream or pictures, to a file or standard output.

    A context manager: on success the output is completed (`-o` targets appear at once, whole), on failure it is
    forgotten. Raises Usage for binary to a terminal and Output for what cannot be written.
    """

    def __init__(self, output: str, *, no_history: bool = False, no_clobber: bool = False) -> None:
        self.output, self.no_history, self.no_clobber = output, no_history, no_clobber
        self.atomic: Any = None
        self.writer: Writer
        with blame(Output, OSError, prefix=""):
            self.writer = self._open()

    def _open(self) -> Writer:
        from rbkit.formats.atomic import AtomicFile
        from rbkit.formats.writer import FileWriter, StreamWriter

        if self.output == "-":
            return _stdout_writer()
        if self.output.endswith("/") or self.output.lower().endswith(".png"):
            from rbkit.cli._pictures import PictureWriter

            return PictureWriter(self.output, no_clobber=self.no_clobber)
        self.atomic = AtomicFile(self.output, replace=not self.no_clobber)
        streamed = self.atomic.in_place or self.output.endswith(".rbs")
        if streamed:
            return StreamWriter(self.atomic.file)
        return FileWriter(self.atomic.file, directory=os.fspath(self.atomic.target.parent))

    @property
    def many(self) -> bool:
        """Whether the output can hold several streams."""
        from rbkit.formats.writer import StreamWriter

        return isinstance(self.writer, StreamWriter)

    def write(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], *, last: bool) -> None:
        """Append rows; `last` with the final ones of a stream."""
        if self.no_history:
            meta = {key: value for key, value in meta.items() if key != "history"}
        with self._blame():
            self.writer.write(arrays, meta, last=last)

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            if self.atomic is not None:
                self.atomic.abort()
            return
        try:
            with self._blame():
                self.writer.close()
                if self.atomic is not None:
                    self.atomic.commit()
        except BaseException:
            if self.atomic is not None:
                self.atomic.abort()
            raise

    @contextlib.contextmanager
    def _blame(self) -> Iterator[None]:
        name = "standard output" if self.output == "-" else self.output
        try:
            yield
        except BrokenPipeError:
            if self.output == "-":
                raise
            raise Output(f"{name}: the reader went away") from None
        except OSError as error:
            raise Output(f"{name}: write error: {error.strerror or reason(error)}") from error
        except FormatError as error:
            raise Usage(f"{name}: {reason(error)}") from error


def _stdout_writer() -> Writer:
    from rbkit.formats.writer import FileWriter, StreamWriter

    refuse_terminal()
    raw = stdout_bytes()
    info = os.fstat(1)
    if (
        stat.S_ISREG(info.st_mode)
        and info.st_size == 0
        and raw.tell() == 0
        and not fcntl.fcntl(1, fcntl.F_GETFL) & os.O_APPEND
    ):
        return FileWriter(raw)
    widen(1)
    return StreamWriter(raw)


def stdout_bytes() -> BinaryIO:
    """Standard output as a raw file, whatever PYTHONUNBUFFERED says; `write_all` writes every byte to it."""
    sys.stdout.flush()
    return open(1, "wb", buffering=0, closefd=False)


def refuse_terminal() -> None:
    """Binary never goes to a terminal."""
    if os.isatty(1):
        raise Usage("refusing to write binary data to a terminal; use -o FILE, or a pipe")


def check_writable(output: str) -> None:
    """Refuse an output that cannot be created, before the work; devices and FIFOs are opened only when written."""
    from rbkit.formats.atomic import AtomicFile

    if output == "-":
        refuse_terminal()
    elif not Path(output).exists() or Path(output).is_file() or Path(output).is_dir():
        with blame(Output, OSError):
            AtomicFile(output).abort()


def write_stdout(content: bytes) -> None:
    """All of `content` to standard output, now."""
    from rbkit.formats.writer import write_all

    try:
        write_all(stdout_bytes(), content)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Output(f"standard output: write error: {error.strerror}") from error


def print_line(text: str) -> None:
    """A line of text to standard output, as UTF-8 whatever the locale."""
    write_stdout(text.encode("utf-8", "surrogateescape") + b"\n")


def write_file(output: str, content: bytes, *, no_clobber: bool = False) -> None:
    """Bytes to a path (atomically) or to standard output (`-`)."""
    from rbkit.formats.atomic import write_atomically

    if output == "-":
        write_stdout(content)
        return
    try:
        write_atomically(output, content, replace=not no_clobber)
    except OSError as error:
        raise Output(reason(error) if error.filename else f"{output}: write error: {reason(error)}") from error


class Folder:
    """A folder of figures, made with the first of them."""

    def __init__(self, path: str, *, no_clobber: bool) -> None:
        self.path, self.no_clobber = Path(path), no_clobber

    def inside(self, name: str) -> Folder:
        """A folder in it."""
        return Folder(str(self.path / name), no_clobber=self.no_clobber)

    def check(self) -> None:
        """Refuse a folder that cannot be made or written to, before the work."""
        place = next(path for path in (self.path, *self.path.parents) if path.exists())
        check_writable(str(place / "figure"))

    def write(self, name: str, content: bytes) -> None:
        """Put a file there. Raises: Output."""
        with blame(Output, OSError):
            self.path.mkdir(parents=True, exist_ok=True)
        write_file(str(self.path / name), content, no_clobber=self.no_clobber)


def figures_folder(path: str | None, *, no_clobber: bool) -> Folder | None:
    """The folder that figures go to, if any. Raises: Output, before the work, where it cannot be made or written to."""
    if path is None:
        return None
    folder = Folder(path, no_clobber=no_clobber)
    folder.check()
    return folder
