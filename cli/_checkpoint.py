"""Checkpoints of rb-train: one safetensors file with weights, optimiser, averages, position and the job's identity."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbkit.cli._errors import Input, Output, Usage, blame
from rbkit.cli._history import recorded
from rbkit.formats.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

    from rbkit.tools.examples import Data
    from rbkit.tools.ranks import Ranks
    from rbkit.tools.recipe import Recipe
    from rbkit.tools.train import State


class Job:
    """What is being trained: options and data. Its digest tells whether a checkpoint or output belongs to it."""

    def __init__(self, options: dict[str, Any], recipe: Recipe, data: Data, *, path: str | None) -> None:
        from rbkit.formats.document import digest

        self.identity = {**recorded(options), **recipe.recorded(), "data": _data_digest(data)}
        self.digest = digest(self.identity)
        self.path = path

    def save(self, state: State) -> bool:
        """Write the checkpoint, atomically; False where there is no place for one."""
        if self.path is None:
            return False
        state.settle()
        from rbkit.formats.atomic import write_atomically
        from rbkit.formats.document import encode

        meta = {
            "kind": "checkpoint", "part": {"index": 1, "last": True}, "identity": self.identity, **_position(state),
        }  # fmt: skip
        arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in _tensors(state).items()}
        with blame(Output, OSError, prefix=f"{self.path}: "):
            write_atomically(self.path, b"".join(encode(arrays, meta)))
        return True

    def restore(self, state: State) -> bool:
        """Bring `state` to where the checkpoint stands; False if there is none. Raises: Input, Usage."""
        if self.path is None or not Path(self.path).exists():
            return False
        import torch

        from rbkit.formats.reader import whole

        with blame(Input, FormatError, OSError), Path(self.path).open("rb") as file:
            chunk = whole(file, name=self.path)
        self._check(chunk.meta.get("identity") or {})
        with blame(Input, KeyError, RuntimeError, ValueError, prefix=f"{self.path}: not a checkpoint of this model: "):
            _load(state, {name: torch.from_numpy(array.copy()) for name, array in chunk.arrays.items()}, chunk.meta)
        return True

    def _check(self, found: dict[str, Any]) -> None:
        for key in sorted(set(self.identity) | set(found)):
            if self.identity.get(key) != found.get(key):
                raise Usage(
                    f"{self.path}: made with {key.replace('_', '-')} {found.get(key)}, now {self.identity.get(key)}; "
                    "start afresh without --resume, or restore the option"
                )

    def remove(self) -> None:
        """Delete the checkpoint of a finished job."""
        if self.path is not None:
            Path(self.path).unlink(missing_ok=True)


def _data_digest(data: Data) -> str:
    sha = hashlib.sha256()
    for tensor in (data.ids, data.label, data.image):
        sha.update(tensor.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def share(state: State, ranks: Ranks) -> None:
    """Bring the state of every process to that of the first."""
    tensors, position = ranks.share(_tensors(state), _position(state))
    if ranks.index:
        _load(state, tensors, position)


def _position(state: State) -> dict[str, Any]:
    """Where training stands and what was recorded on the way."""
    return {
        "epoch": state.epoch, "step": state.step, "best": state.best if state.best_epoch else None,
        "best_epoch": state.best_epoch, "sums": state.sums, "records": state.records,
    }  # fmt: skip


def _tensors(state: State) -> dict[str, Tensor]:
    """Everything that training changes, under prefixed names."""
    found = {f"net.{name}": t for name, t in state.classifier.net.state_dict().items()}
    for name, parameter in state.classifier.named_parameters():
        for key, tensor in state.optimiser.state.get(parameter, {}).items():
            if tensor is not None:
                found[f"optimiser.{key}.{name}"] = tensor
    if state.average is not None:
        found |= {f"average.{name}": t for name, t in state.average.net.state_dict().items()}
    return found | {f"best.{name}": t for name, t in state.best_weights.items()}


def _load(state: State, tensors: dict[str, Tensor], position: dict[str, Any]) -> None:
    import torch

    from rbkit.tools.weights import load_weights

    device = state.classifier.mean.device
    groups: dict[str, dict[str, Tensor]] = {"net": {}, "optimiser": {}, "average": {}, "best": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor.to(device)
    load_weights(state.classifier.net, groups["net"])
    if state.average is not None:
        load_weights(state.average.net, groups["average"])
    parameters = dict(state.classifier.named_parameters())
    for place, tensor in groups["optimiser"].items():
        key, _, name = place.partition(".")
        parameter = parameters[name]
        # In the layout of the parameter, as the optimiser itself would have made it: the sums then agree bit by bit.
        kept = torch.empty_like(parameter).copy_(tensor) if tensor.shape == parameter.shape else tensor.cpu()
        state.optimiser.state[parameter][key] = kept
    state.best_weights = groups["best"]
    state.epoch, state.step, state.best_epoch = position["epoch"], position["step"], position["best_epoch"]
    state.best = position["best"] if position["best"] is not None else state.best
    state.sums, state.records = list(position["sums"]), list(position["records"])
