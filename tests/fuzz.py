"""Mutation fuzzing of every reader of foreign bytes: `python tests/fuzz.py --seconds 600 --seed 1 [TARGET...]`.

A reader may accept bytes or raise FormatError. Anything else is a finding: another exception, more memory than MEMORY
(so whatever a header claims, memory stays bounded), more time than SECONDS for one input, or a safetensors document
that the safetensors library refuses or reads differently. The input of a finding is kept as finding-TARGET-N.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
from PIL import Image

from rbkit.formats import cifar, idx, npz, png, table
from rbkit.formats.chunk import Chunk
from rbkit.formats.document import encode
from rbkit.formats.errors import FormatError
from rbkit.formats.reader import Reader
from rbkit.formats.rows import RowChecker

MEMORY = 512 << 20  # bytes that a reader may take for inputs of a few kB; pictures may have 2^24 pixels
SECONDS = 10
NUMBERS = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
TOKENS = (
    b'"data_offsets":[0,0]', b'"shape":[0,4611686018427387904]', b'"dtype":"BF16"', b'"__metadata__":{}', b"[" * 500,
    b"1" * 5000, b"-1", b"1e999", b"NaN", b"\\ud800", b"\xff\xfe", b"\0", b"null", b"{}", b'"rb"', b"IEND", b"IDAT", b"tRNS",
    b"eXIf", b"acTL", b"cos\nsystem\n", b"(dp0\n", b"\x80\x04\x95", b"'descr': '|O'", b"(9999999999,)", b"PK\x01\x02",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ readers


def rows_of(chunks: Iterator[Chunk]) -> list[Chunk]:
    """The chunks of a stream, with their rows checked as the commands check them."""
    checker, found = RowChecker(), []
    for chunk in chunks:
        found.append(chunk)
        if chunk.meta["kind"] in ("images", "adversarial", "attributions", "inversions"):
            checker(chunk)
    return found


def piped(raw: bytes, path: Path) -> None:
    """A stream from a pipe; one document must be one for the safetensors library too."""
    reader = Reader(io.BytesIO(raw), name="fuzz")
    chunks = list(reader)
    if reader.number == 1:  # the library knows neither streams of several documents nor pictures
        theirs = {
            name: bytes(t["data"]) for name, t in safetensors.deserialize(raw) if t["dtype"] not in ("BOOL", "BF16")
        }
        ours = {name: b"".join(c.arrays[name].tobytes() for c in chunks) for name in theirs}
        assert ours == theirs, "other tensors than the library's"
    rows_of(iter(chunks))


def stored(raw: bytes, path: Path) -> None:
    """A stream from a file: what it accepts, the pipe accepts, with the same rows."""
    path.write_bytes(raw)
    with path.open("rb") as file:
        found = rows_of(iter(Reader(file, name="fuzz", rows=2)))
    again = rows_of(iter(Reader(io.BytesIO(raw), name="fuzz", rows=2)))
    assert [c.meta for c in found] == [c.meta for c in again]
    for one, other in zip(found, again, strict=True):
        assert {n: a.tobytes() for n, a in one.arrays.items()} == {n: a.tobytes() for n, a in other.arrays.items()}


def picture(raw: bytes, path: Path) -> None:
    """Pictures back to back."""
    for _ in png.read_many(io.BytesIO(raw[8:]), name="fuzz", start=raw[:8]):
        pass


def from_file(read: Callable[[Path], object]) -> Callable[[bytes, Path], None]:
    """A reader that takes a path."""

    def parse(raw: bytes, path: Path) -> None:
        path.write_bytes(raw)
        read(path)

    return parse


# ------------------------------------------------------------------------------------------------------ seeds


def documents() -> list[bytes]:
    """Streams of one and of several documents, foreign files, and a model."""
    rng = np.random.default_rng(0)
    image = rng.random((5, 3, 4, 6), np.float32)
    rows = {"image": image, "label": np.arange(5), "id": np.arange(5), "mask": np.ones((5, 4, 6), bool)}
    base = {"kind": "images", "history": [], "total": 5, "classes": list("abcde")}
    whole = b"".join(encode(rows, {**base, "part": {"index": 1, "last": True}, "first": 0, "count": 5}))
    stream = b""
    for index, (start, stop) in enumerate(((0, 2), (2, 2), (2, 5)), 1):
        part = {**base, "part": {"index": index, "last": stop == 5}, "first": start, "count": stop - start}
        stream += b"".join(encode({name: array[start:stop] for name, array in rows.items()}, part))
    foreign = b"".join(encode({"image": image, "x": np.zeros((5, 2), np.float64), "y": np.zeros(5, np.float16)}, None))
    model = {"kind": "model", "part": {"index": 1, "last": True}, "history": [], "arch": "resnet8", "num_classes": 3}
    return [whole, stream, foreign, b"".join(encode({"w": np.zeros((2, 3), np.float32), "n": np.array(7)}, model))]


def pictures() -> list[bytes]:
    """PNGs of every colour type, one of them interlaced, and two back to back."""
    rng = np.random.default_rng(0)
    made = []
    for mode in ("L", "RGB", "RGBA", "LA", "P", "1"):
        image = Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)).convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **({"transparency": 3} if mode == "P" else {}))
        made.append(buffer.getvalue())
    return [*made, png.encode(rng.integers(0, 256, (1, 5, 4), np.uint8), text={"kind": "images"}), made[0] + made[1]]


def archives() -> list[bytes]:
    """NPZ files, stored and deflated."""
    arrays = {"image": np.zeros((4, 3, 5, 6), np.uint8), "label": np.arange(4)}
    made = []
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, **arrays)  # type: ignore[arg-type]
        made.append(buffer.getvalue())
    return made


def idx_files() -> list[bytes]:
    """IDX files of images and of labels, plain and zipped."""
    images = b"\0\0\x08\x03" + struct.pack(">III", 3, 4, 5) + bytes(60)
    return [images, b"\0\0\x08\x01" + struct.pack(">I", 9) + bytes(9), gzip.compress(images, mtime=0)]


def batches() -> list[bytes]:
    """CIFAR-10's Python batches of several protocols."""
    pixels = np.zeros((2, 3072), np.uint8)
    return [pickle.dumps({b"data": pixels, b"labels": [1, 2]}, protocol) for protocol in (0, 2, 4)]


# ------------------------------------------------------------------------------------------------------ mutations


def mutate(raw: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """A few edits: bits, numbers, tokens, cuts, copies, and pieces of another seed."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(out) + 1)
        if rng.random() < 0.5:  # headers come first, and most is decided there
            at = rng.randrange(min(len(out), 200) + 1)
        end = min(len(out), at + rng.choice((1, 2, 4, 8, 40)))
        kind = rng.randrange(9)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            number = rng.choice(NUMBERS) + rng.choice((-1, 0, 1))
            size = rng.choice((1, 2, 4, 8))
            out[at : at + size] = (number % 256**size).to_bytes(size, rng.choice(("little", "big")))
        elif kind == 2:
            out[at:at] = rng.choice(TOKENS)
        elif kind == 3:
            del out[at:end]
        elif kind == 4:
            out[at:at] = out[at:end]
        elif kind == 5:
            del out[at:]
        elif kind == 6:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            out[at:end] = other[start : start + rng.choice((1, 8, 64, 10**6))]
        elif kind == 7:
            digits = [i for i in range(max(at - 50, 0), min(at + 50, len(out))) if 48 <= out[i] <= 57]
            if digits:
                out[digits[0] : digits[0] + 1] = str(rng.choice(NUMBERS)).encode()
        else:
            out += bytes(rng.randrange(256) for _ in range(rng.randrange(1, 20)))
    return bytes(out)


def mend_document(raw: bytes, rng: random.Random) -> bytes:
    """The length of the header as it has become, or only the header edited as JSON."""
    if len(raw) < 10:
        return raw
    end = raw.rfind(b"}", 0, 4000) + 1
    return (max(end, 8) - 8).to_bytes(8, "little") + raw[8:]


def mend_picture(raw: bytes, rng: random.Random) -> bytes:
    """Chunks with the checksums of what they have become; image data sometimes packed again."""
    out, at = raw[:8], 8
    while at + 12 <= len(raw):
        size = int.from_bytes(raw[at : at + 4], "big")
        kind, body = raw[at + 4 : at + 8], raw[at + 8 : at + 8 + size]
        if kind == b"IDAT" and rng.random() < 0.3:
            body = zlib.compress(body)
        out += len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        at += 12 + size
    return out


def mend_archive(raw: bytes, rng: random.Random) -> bytes:
    """The members of a good archive, one of them edited, stored with right checksums."""
    names = ["image.npy", "label.npy"]
    edited = rng.choice(names)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archives()[0])) as good, zipfile.ZipFile(buffer, "w") as made:
        for name in names:
            content = good.read(name)
            made.writestr(name, mutate(content, rng, [content]) if name == edited else content)
    return buffer.getvalue()


def mend_zipped(raw: bytes, rng: random.Random) -> bytes:
    """Zipped, so that what is edited lies within."""
    return gzip.compress(raw, mtime=0)


def as_it_is(raw: bytes, rng: random.Random) -> bytes:
    """No mending."""
    return raw


@dataclass(frozen=True)
class Target:
    """A reader, good inputs, and what makes an edited input whole enough to get further."""

    parse: Callable[[bytes, Path], None]
    seeds: list[bytes]
    mend: Callable[[bytes, random.Random], bytes] = as_it_is


TARGETS = {
    "pipe": Target(piped, documents() + pictures()[:1], mend_document),
    "file": Target(stored, documents(), mend_document),
    "png": Target(picture, pictures(), mend_picture),
    "npz": Target(from_file(npz.read), archives(), mend_archive),
    "idx": Target(from_file(idx.read), idx_files(), mend_zipped),
    "cifar-python": Target(from_file(cifar.read_python), batches()),
    "cifar-binary": Target(from_file(cifar.read_binary), [bytes(3073 * 2)]),
    "records": Target(from_file(table.read_records), [json.dumps({"metric": "a", "value": 0.5}).encode() + b"\n{}\n"]),
}


# ------------------------------------------------------------------------------------------------------ the loop


class TooLongError(Exception):
    """An input took more than SECONDS."""


def late(*_: object) -> None:
    """The handler of the alarm."""
    raise TooLongError(f"more than {SECONDS} s")


def fuzz(name: str, *, seconds: float, seed: int, folder: Path) -> int:
    """Try inputs for a while; prints what came out and returns the number of different findings."""
    target, rng = TARGETS[name], random.Random(f"{seed} {name}")
    path = folder / "input"
    inputs = size = accepted = 0
    findings: dict[str, bytes] = {}
    end = time.process_time() + seconds
    while time.process_time() < end:
        raw = mutate(rng.choice(target.seeds), rng, target.seeds)
        raw = target.mend(raw, rng) if rng.random() < 0.5 else raw
        inputs, size = inputs + 1, size + len(raw)
        signal.alarm(SECONDS)
        try:
            target.parse(raw, path)
            accepted += 1
        except FormatError:
            pass
        except Exception as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            place = "" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
            findings.setdefault(f"{type(error).__name__} at {place}: {str(error)[:100]}", raw)
        finally:
            signal.alarm(0)
    print(f"{name}: {inputs} inputs, {size / 1e6:.1f} MB, {accepted} accepted, {len(findings)} findings")
    for number, (text, raw) in enumerate(findings.items()):
        kept = Path(f"finding-{name}-{number}")
        kept.write_bytes(raw)
        print(f"  {kept}: {text}")
    return len(findings)


def main() -> int:
    """Fuzz the targets in turn; 1 if there are findings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=60, help="CPU time of all together")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chosen = options.targets or list(TARGETS)
    for name in chosen:  # once, so that what is imported late does not count
        for good in TARGETS[name].seeds:
            with tempfile.TemporaryDirectory() as folder:
                TARGETS[name].parse(good, Path(folder) / "good")
    resource.setrlimit(resource.RLIMIT_AS, (_in_use() + MEMORY,) * 2)
    signal.signal(signal.SIGALRM, late)
    share = options.seconds / len(chosen)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        found = sum(fuzz(name, seconds=share, seed=options.seed, folder=Path(folder)) for name in chosen)
    return 1 if found else 0


def _in_use() -> int:
    """Bytes of address space that this process has by now."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
