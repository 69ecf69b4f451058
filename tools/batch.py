"""What the metrics read: rows to be judged, the model that judges them, and what was made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rbkit.tools.attribution import Explained, Saliency
from rbkit.tools.lanes import Lanes
from rbkit.tools.models import Evaluation
from rbkit.tools.saliency import explain


@dataclass
class Batch:
    """Rows to be judged and the model that judges them.

    image float32 (N, C, H, W) is the clean image; adversarial, attribution, inverted, mask are None where the stream
    has none. `explained` is what the attribution is of. Derived quantities are computed once. `shared`
    holds those of rows, model and output alone, for all methods; `own` those of this attribution.
    """

    evaluation: Evaluation
    ids: Tensor
    image: Tensor
    label: Tensor | None = None
    adversarial: Tensor | None = None
    norm: str = "l2"
    eps: float | None = None
    attack_target: Tensor | None = None
    distance: Tensor | None = None
    attribution: Tensor | None = None
    explained: Tensor | None = None
    target: Tensor | None = None
    saliency: Saliency | None = None
    mask: Tensor | None = None
    cue_mask: Tensor | None = None
    completeness: Tensor | None = None
    inverted: Tensor | None = None
    start: Tensor | None = None
    fit: Tensor | None = None
    background: Tensor | None = None
    judge: Evaluation | None = None
    signed: bool = True
    shared: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict, init=False)  # so that a changed copy begins anew

    @cached_property
    def clean_logits(self) -> Tensor:
        """Logits of the clean images."""
        return self.evaluation.logits(self.image)

    @cached_property
    def explained_logits(self) -> Tensor:
        """Logits of the images that the attribution is of."""
        assert self.explained is not None
        return self.clean_logits if self.explained is self.image else self.evaluation.logits(self.explained)

    @cached_property
    def adversarial_logits(self) -> Tensor:
        """Logits of the stored adversarial bytes."""
        assert self.adversarial is not None
        return self.evaluation.logits(self.adversarial)

    @cached_property
    def maps(self) -> Tensor:
        """The attribution per location (N, H, W): channels summed, signed or absolute."""
        assert self.attribution is not None
        return reduce_channels(self.attribution, signed=self.signed)

    @property
    def lanes(self) -> Lanes | None:
        """In which blocks of these images may be computed at once."""
        return self.evaluation.lanes_for(self.image)

    @property
    def output(self) -> str:
        """What is explained: a key of OUTPUTS."""
        return "logit" if self.saliency is None else self.saliency.output

    @property
    def can_explain(self) -> bool:
        """Whether the attribution can be made again: some methods need background images."""
        spec = self.saliency
        return spec is not None and (self.background is not None or not spec.needs_background)

    def once(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives, computed once for all methods and reference maps of these rows."""
        if key not in self.shared:
            self.shared[key] = compute()
        return self.shared[key]

    def with_maps(self, maps: Tensor) -> Batch:
        """The same batch with other maps (N, H, W) of no method, sharing what does not depend on them."""
        spec = None if self.saliency is None else replace(self.saliency, method="reference")
        return replace(self, attribution=maps[:, None], signed=True, saliency=spec)

    def explain_again(
        self, images: Tensor, *, evaluation: Evaluation | None = None, target: Tensor | None = None
    ) -> Tensor:
        """The attribution (N, C, H, W) of other images, of another model or class, by the method of the stored one."""
        return self.explanation(images, evaluation=evaluation, target=target).attribution

    def explanation(
        self, images: Tensor, *, evaluation: Evaluation | None = None, target: Tensor | None = None
    ) -> Explained:
        """The same with all that its making tells."""
        assert self.target is not None and self.saliency is not None
        model = self.evaluation if evaluation is None else evaluation
        goal = self.target if target is None else target
        return explain(model, images, goal, self.saliency, ids=self.ids, background=self.background)


def reduce_channels(attribution: Tensor, *, signed: bool) -> Tensor:
    """Attributions (N, C, H, W) as maps (N, H, W): the sum over channels, or of absolute values."""
    return attribution.sum(1) if signed else attribution.abs().sum(1)


def defined(valid: Tensor, values: Tensor) -> Tensor:
    """Values as float64, NaN where they are not defined: such examples are left out and counted."""
    return torch.where(valid, values.double(), torch.nan)
