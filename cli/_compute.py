"""Device, threads and models: what a command needs before it can compute."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbkit.cli._errors import Input, Usage, blame
from rbkit.cli._input import open_bytes
from rbkit.formats.errors import FormatError

if TYPE_CHECKING:
    import torch

    from rbkit.formats.chunk import Chunk
    from rbkit.tools.models import Classifier, Evaluation


MALLOC_THRESHOLDS = (-1, -3)  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
FREED = 1 << 30  # bytes that may lie free, and of the largest piece that is not mapped on its own


def available_threads() -> int:
    """CPUs that this process may use: affinity, cut to the container's quota."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no cgroup v2 here
    return count


def set_up(device: str, threads: int | None) -> torch.device:
    """Fix the threads and return the device. Raises: Usage for a device that is not there."""
    import torch

    from rbkit.tools.gpu import repeatable

    keep_freed_memory()
    torch.set_num_threads(threads or available_threads())
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    place = _place(device)
    if place.type == "cuda":
        repeatable()
    return place


def keep_freed_memory() -> None:
    """Let what one block has freed serve the next one, where the C library is glibc.

    By default it may go back to the system each time, and its pages are zeroed and mapped anew: in some runs a fifth of the
    time of a small network. The peak of the process stays as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in MALLOC_THRESHOLDS:
            mallopt(parameter, FREED)


def _place(device: str) -> torch.device:
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise Usage(f"--device: got {device!r}, expected auto, cpu, cuda or cuda:N") from None
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(chosen.type, 0)
    if (chosen.index or 0) >= there:
        raise Usage(f"--device: {device} is not available here; try cpu")
    return chosen


def block_on(device: torch.device, block: int | None) -> int:
    """Rows that are computed at a time on a device: as asked for, or its default."""
    from rbkit.tools.models import default_block

    return block or default_block(device)


@dataclass(frozen=True)
class Model:
    """A model file, ready to run."""

    classifier: Classifier
    meta: dict[str, Any]
    sha: str
    path: str
    runs_on: set[tuple[int, ...]] = field(default_factory=set, compare=False)

    def check_runs(self, shape: Sequence[int]) -> None:
        """Try the network once on images of a shape. Raises: ValueError."""
        from rbkit.tools.models import check_logits

        if tuple(shape) not in self.runs_on:
            check_logits(self.classifier, shape, self.classes)
            self.runs_on.add(tuple(shape))

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.meta["num_classes"])

    def check_class(self, number: int | None, *, option: str) -> None:
        """Refuse a class that the model does not have; None names none. Raises: Usage."""
        if number is not None and number >= self.classes:
            raise Usage(f"{option} {number}: the model has classes 0 to {self.classes - 1}")

    def evaluation(self, block: int, *, layer: str | None = None) -> Evaluation:
        """The form in which it is run, in which `layer` gives what the network's own does.

        Code of a user's own architecture may not bear to be run by several threads.
        """
        from rbkit.tools.architectures import is_factory
        from rbkit.tools.lanes import Lanes
        from rbkit.tools.models import Evaluation

        lanes = None if is_factory(str(self.meta["arch"])) else Lanes()
        return Evaluation(self.classifier, block=block, lanes=lanes, layer=layer)


def model_chunk(path: str) -> Chunk:
    """The document of a model file. Raises: Input."""
    from rbkit.formats.reader import whole

    with blame(Input, FormatError, OSError):
        file, name = open_bytes(path)
        chunk = whole(file, name=name)
    if chunk.meta["kind"] != "model":
        what = "a state dict of others?" if chunk.meta["kind"] == "foreign" else f"kind {chunk.meta['kind']}"
        raise Input(f"{path}: no model of rbkit ({what}); try rb-model import")
    return chunk


IDENTITY = ("arch", "width", "num_classes", "mean", "std", "sha256")


def model_sha(meta: dict[str, Any]) -> str:
    """Identity of a model: a digest of its weights, architecture and normalisation, not of its history."""
    from rbkit.formats.document import digest

    return digest({key: meta.get(key) for key in IDENTITY})


def load_model(path: str, *, archs: Sequence[str] | None, device: torch.device) -> Model:
    """A model file as a classifier on `device`. Code of a factory runs only if `--arch` names it too."""
    import torch

    from rbkit.tools.architectures import build, is_factory
    from rbkit.tools.models import Classifier

    chunk = model_chunk(path)
    meta = chunk.meta
    arch = str(meta.get("arch"))
    if is_factory(arch) and arch not in (archs or ()):
        raise Usage(f"{path}: its architecture is code of its author; if you trust it, add --arch {arch}")
    if archs and not is_factory(arch) and arch not in archs:
        raise Usage(f"{path}: its architecture is {arch}, not {', '.join(archs)}; for both, add --arch {arch}")
    channels = (meta.get("input") or [3])[0]
    with blame(Input, ValueError, KeyError, TypeError, prefix=f"{path}: "):
        net = build(arch, num_classes=meta["num_classes"], channels=channels, width=meta.get("width"))
        state = {name: torch.from_numpy(array.copy()) for name, array in chunk.arrays.items()}
        _load_state(net, state)
        classifier = Classifier(net, mean=meta["mean"], std=meta["std"])
    return Model(classifier.eval().to(device), meta, model_sha(meta), path)


def _load_state(net: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    from rbkit.tools.weights import load_weights

    try:
        load_weights(net, state)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None


def to_tensor(array: Any, device: torch.device) -> torch.Tensor:
    """An array of a chunk as a tensor on `device`."""
    import torch

    if not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(array).to(device)


def side_digest(path: str) -> str:
    """sha256 of a side input, for the history."""
    import hashlib

    with blame(Input, OSError):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
