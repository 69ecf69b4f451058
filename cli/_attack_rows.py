"""What an attack adds to the rows of a stream, and which rows it refuses, before and after."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rbkit.cli import _history
from rbkit.cli._compute import Model, to_tensor
from rbkit.cli._errors import Numbers, Usage

if TYPE_CHECKING:
    from rbkit.formats.chunk import Chunk
    from rbkit.tools.attack import Attack
    from rbkit.tools.stages import Attacked

Models = tuple[Model, Model | None]  # the attacked one, and the surrogate that images are made on


def by_radius(chunks: Iterable[Chunk], *, default: Attack) -> Iterator[tuple[float, Iterator[Chunk]]]:
    """Chunks that follow each other and were attacked at one radius, in the norm of `default`; its own where they were not."""

    def radius(chunk: Chunk) -> float:
        earlier = chunk.meta.get("attack") or {}
        eps = earlier.get("eps") if earlier.get("norm") == default.norm else None
        return eps if isinstance(eps, int | float) and 0 < eps < math.inf else default.eps

    return itertools.groupby(chunks, key=radius)


def check_earlier(chunk: Chunk, spec: Attack) -> None:
    """A second attack on an attacked stream adds to it, within the same ball."""
    earlier = chunk.meta.get("attack")
    if "adversarial" in chunk.arrays and earlier is None:
        raise Usage(f"{chunk.place}: already attacked by another tool, ball unknown; attack its images instead")
    if earlier is not None and (earlier.get("norm"), earlier.get("eps")) != (spec.norm, spec.eps):
        raise Usage(
            f"{chunk.place}: already attacked at {earlier.get('norm')} {earlier.get('eps')}, not {spec.norm} {spec.eps}; "
            "use the same norm and eps to add to it"
        )


def check_ball(chunk: Chunk, result: Attacked, spec: Attack) -> None:
    """Nothing leaves that is not within the ball, whatever the model made of the attack. Raises: Numbers."""
    from rbkit.tools.examples import as_float
    from rbkit.tools.quantise import leaves_ball

    images = result.outcome.images
    clean = as_float(to_tensor(chunk.arrays["image"], images.device))
    outside = leaves_ball(images, clean, norm=spec.norm, eps=spec.eps)
    if outside.any():
        ids = chunk.arrays["id"][outside.cpu().numpy()].tolist()
        raise Numbers(
            f"{chunk.place}: {len(ids)} of {chunk.count} adversarial images left the {spec.norm} ball of {spec.eps} or "
            f"are not finite, first id {ids[0]}; look at the model by rb-score --flags"
        )


def columns(chunk: Chunk, result: Attacked) -> dict[str, Any]:
    """The tensors that the attack adds; the cost adds to that of an earlier attack."""
    import numpy as np

    outcome = result.outcome
    added = {
        "adversarial": outcome.images.cpu().numpy(),
        "success": result.success.cpu().numpy().astype("uint8"),
        "forwards": outcome.forwards.cpu().numpy(),
        "backwards": outcome.backwards.cpu().numpy(),
        "zero_gradients": outcome.zero_gradients.cpu().numpy(),
    }
    for name in ("forwards", "backwards", "zero_gradients"):
        if name in chunk.arrays:
            added[name] = added[name] + chunk.arrays[name]
    if result.target is not None:
        added["attack_target"] = result.target.cpu().numpy()
    if result.distance is not None:
        distance = result.distance.cpu().numpy()
        added["distance"] = np.minimum(distance, chunk.arrays.get("distance", distance)).astype("float32")
    return added


def described(chunk: Chunk, spec: Attack, models: Models, history: dict[str, Any]) -> dict[str, Any]:
    """The metadata of what comes out: the attack beside what came in."""
    victim, surrogate = models
    attack = {key: value for key, value in asdict(spec).items() if value is not None} | {"model": victim.sha}
    if surrogate is not None:
        attack["surrogate"] = surrogate.sha
    earlier = chunk.meta.get("attack")
    if earlier is not None:
        attack["name"] = f"{earlier['name']}+{spec.name}"
    return _history.passed_on(chunk.meta, history) | {"kind": "adversarial", "attack": attack}
