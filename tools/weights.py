"""Weights as other people save them: wrappers opened, prefixes removed, held against an architecture."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "ema_state_dict", "ema", "model_ema", "state_dict_ema")
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # torchvision's heads that are for training alone
PREFIXES = ("module.", "model.", "net.", "_orig_mod.", "backbone.")


def _unwrap(saved: object) -> dict[str, Tensor]:
    """The dictionary of tensors inside what people save."""
    for _ in range(3):
        if isinstance(saved, dict) and saved and all(isinstance(v, Tensor) for v in saved.values()):
            return dict(saved)
        inner = next((saved[k] for k in WRAPPERS if isinstance(saved, dict) and isinstance(saved.get(k), dict)), None)
        if inner is None:
            break
        saved = inner
    if isinstance(saved, dict) and saved and all(isinstance(k, str) for k in saved):
        tensors = {k: v for k, v in saved.items() if isinstance(v, Tensor)}
        if tensors:
            return tensors
    raise ValueError("no state dict found; expected a dictionary of tensors, or one under state_dict, model or ema")


def strip_wrapping(saved: object, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `saved` under the keys and dtypes of `expected`: wrappers opened, prefixes and heads that only training
    uses removed.

    Raises: ValueError listing missing and unexpected keys, or the first shape that differs.
    """
    state = _unwrap(saved)
    while state and not set(state) & set(expected):
        prefix = next((p for p in PREFIXES if any(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    state = {key: value for key, value in state.items() if key in expected or not key.startswith(AUXILIARY)}
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    missing, unexpected = sorted(set(expected) - set(state) - counters), sorted(set(state) - set(expected))
    if missing or unexpected:
        parts = [
            f"{len(k)} {w} keys ({', '.join(k[:4])}{', …' if len(k) > 4 else ''})"
            for k, w in ((missing, "missing"), (unexpected, "unexpected"))
            if k
        ]
        raise ValueError("the weights do not fit the architecture: " + "; ".join(parts))
    for key, tensor in expected.items():
        if key in state and state[key].shape != tensor.shape:
            raise ValueError(
                f"{key} has shape {list(state[key].shape)}, the architecture has {list(tensor.shape)}; are --classes and --input right?"
            )
    return {
        key: state.get(key, tensor).detach().to(tensor.dtype).contiguous().clone() for key, tensor in expected.items()
    }


def load_weights(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give `net` tensors that stand under its own keys, and say that they are of its version: torchvision's MNASNet takes no others.

    Raises: RuntimeError where they do not fit.
    """
    versioned = OrderedDict(state)
    versioned._metadata = net.state_dict()._metadata  # type: ignore[attr-defined]
    net.load_state_dict(versioned)
