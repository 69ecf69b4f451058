"""The table of metrics: each a small function of a batch to values per example, and one line here.

NaN marks an example for which a metric is not defined; such examples are left out and counted. Metrics of attributions
that read `batch.maps` alone are also applied to reference maps, which gives the chance band.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor

from rbkit.tools import (
    alignment,
    complexity,
    faithfulness,
    infidelity,
    likeness,
    localisation,
    road,
    robustness,
    sanity,
    stability,
)
from rbkit.tools.batch import Batch
from rbkit.tools.references import reference_maps

Metric = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Entry:
    """A line of the table: the function and what a reader of the number must know.

    needs: attributes of the batch that must be there. kind: of the stream. share: 0/1 per example (Wilson interval).
    band: whether the metric is also computed on reference maps. default: computed also where nobody asks for it by name.
    median: pooled by the median instead of the mean; values may then be infinite.
    """

    function: Metric
    kind: str
    unit: str
    better: str
    source: str
    needs: tuple[str, ...] = ()
    share: bool = False
    band: bool = False
    default: bool = True
    median: bool = False


_MAP = ("attribution", "explained", "target")
_AGAIN = (*_MAP, "saliency")  # the map is made again
METRICS: dict[str, Entry] = {
    "clean_accuracy": Entry(robustness.clean_accuracy, "any", "share", "higher", "-", ("label",), share=True),
    "robust_accuracy": Entry(robustness.robust_accuracy, "adversarial", "share", "higher", "Madry et al. 2018", ("label", "adversarial"), share=True),
    "robust_accuracy_png": Entry(robustness.robust_accuracy_png, "adversarial", "share", "higher", "-", ("label", "adversarial", "eps"), share=True),
    "target_rate": Entry(robustness.target_rate, "adversarial", "share", "lower", "-", ("attack_target",), share=True),
    "ties": Entry(robustness.ties, "adversarial", "share", "lower", "-", ("label", "adversarial"), share=True),
    "perturbation": Entry(robustness.perturbation, "adversarial", "pixels", "lower", "-", ("adversarial",)),
    "minimal_distance": Entry(robustness.minimal_distance, "adversarial", "pixels", "higher", "Croce and Hein 2020", ("label", "adversarial", "distance"), median=True),
    "ball_violation": Entry(robustness.ball_violation, "adversarial", "share", "lower", "-", ("adversarial", "eps"), share=True),
    "insertion": Entry(faithfulness.insertion, "attributions", "probability", "higher", "Petsiuk et al. 2018", _MAP, band=True),
    "deletion": Entry(faithfulness.deletion, "attributions", "probability", "lower", "Petsiuk et al. 2018", _MAP, band=True),
    "insertion_mean": Entry(faithfulness.insertion_mean, "attributions", "probability", "higher", "Petsiuk et al. 2018", _MAP, band=True),
    "deletion_mean": Entry(faithfulness.deletion_mean, "attributions", "probability", "lower", "Petsiuk et al. 2018", _MAP, band=True),
    "road_morf": Entry(road.road_morf, "attributions", "probability", "lower", "Rong et al. 2022", _MAP, band=True, default=False),
    "road_lerf": Entry(road.road_lerf, "attributions", "probability", "higher", "Rong et al. 2022", _MAP, band=True, default=False),
    "infidelity": Entry(infidelity.infidelity, "attributions", "output squared", "lower", "Yeh et al. 2019", _MAP),
    "infidelity_scaled": Entry(infidelity.infidelity_scaled, "attributions", "share", "lower", "after Yeh et al. 2019", _MAP, band=True),
    "sensitivity_n": Entry(infidelity.sensitivity_n, "attributions", "correlation", "higher", "Ancona et al. 2018", _MAP, band=True, default=False),
    "relevance_mass": Entry(localisation.relevance_mass, "attributions", "share", "higher", "Arras et al. 2022", (*_MAP, "mask"), band=True),
    "relevance_rank": Entry(localisation.relevance_rank, "attributions", "share", "higher", "Arras et al. 2022", (*_MAP, "mask"), band=True),
    "pointing_game": Entry(localisation.pointing_game, "attributions", "share", "higher", "Zhang et al. 2018", (*_MAP, "mask"), band=True),
    "cue_mass": Entry(localisation.cue_mass, "attributions", "share", "lower", "-", (*_MAP, "cue_mask"), band=True),
    "gini": Entry(complexity.gini, "attributions", "index", "higher", "Chalasani et al. 2020", _MAP, band=True),
    "entropy": Entry(complexity.entropy, "attributions", "nats", "lower", "Bhatt et al. 2020", _MAP, band=True),
    "alignment": Entry(alignment.alignment, "attributions", "cosine", "higher", "after Etmann et al. 2019", _MAP, band=True),
    "alignment_uncentred": Entry(alignment.alignment_uncentred, "attributions", "cosine", "higher", "after Etmann et al. 2019", _MAP, band=True),
    "low_frequency_energy": Entry(alignment.low_frequency_energy, "attributions", "share", "higher", "after Kim et al. 2019", _MAP, band=True),
    "etmann_alignment": Entry(alignment.etmann_alignment, "attributions", "pixels", "higher", "Etmann et al. 2019", ("explained",)),
    "completeness_error": Entry(faithfulness.completeness_error, "attributions", "output", "lower", "Sundararajan et al. 2017", ("completeness",)),
    "completeness_error_median": Entry(faithfulness.completeness_error_median, "attributions", "output", "lower", "Sundararajan et al. 2017", ("completeness",), default=False, median=True),
    "max_sensitivity": Entry(stability.max_sensitivity, "attributions", "relative", "lower", "Yeh et al. 2019", _AGAIN),
    "attack_sensitivity": Entry(stability.attack_sensitivity, "attributions", "relative", "lower", "Ghorbani et al. 2019", _AGAIN, default=False),
    "attack_overlap": Entry(stability.attack_overlap, "attributions", "share", "higher", "Ghorbani et al. 2019", _AGAIN, default=False),
    "randomisation": Entry(sanity.randomisation, "attributions", "rank correlation", "lower", "Adebayo et al. 2018", _AGAIN, default=False),
    "randomisation_signed": Entry(sanity.randomisation_signed, "attributions", "rank correlation", "lower", "Adebayo et al. 2018", _AGAIN, default=False),
    "randomisation_ssim": Entry(sanity.randomisation_ssim, "attributions", "index", "lower", "Adebayo et al. 2018", _AGAIN, default=False),
    "randomisation_floor": Entry(sanity.randomisation_floor, "attributions", "rank correlation", "lower", "-", _AGAIN, default=False),
    "random_logit": Entry(sanity.random_logit, "attributions", "rank correlation", "lower", "Sixt et al. 2020", _AGAIN, default=False),
    "latent_error": Entry(likeness.latent_error, "inversions", "relative", "lower", "Engstrom et al. 2019", ("inverted", "fit")),
    "pixel_error": Entry(likeness.pixel_error, "inversions", "pixels", "lower", "-", ("inverted", "fit")),
    "low_frequency_error": Entry(likeness.low_frequency_error, "inversions", "pixels", "lower", "-", ("inverted", "fit")),
    "ssim": Entry(likeness.ssim, "inversions", "index", "higher", "Wang et al. 2004", ("inverted", "fit")),
    "feature_distance": Entry(likeness.feature_distance, "inversions", "features", "lower", "-", ("inverted", "fit", "judge")),
    "own_accuracy": Entry(likeness.own_accuracy, "inversions", "share", "higher", "-", ("inverted", "label"), share=True),
    "judge_accuracy": Entry(likeness.judge_accuracy, "inversions", "share", "higher", "-", ("inverted", "label", "judge"), share=True),
}  # fmt: skip


@dataclass(frozen=True)
class SetEntry:
    """A metric of a set of examples, which has no value per example: what a reader of the number must know."""

    unit: str
    better: str
    source: str


OF_SETS = {"frechet_distance": SetEntry("features squared", "lower", "after Heusel et al. 2017")}


def applicable(kind: str, batch: Batch, names: Collection[str] | None = None) -> list[str]:
    """Names of the metrics for a kind of stream that this batch has everything for, of `names` or of the default ones."""
    return [
        name
        for name, entry in METRICS.items()
        if entry.kind in ("any", kind)
        and (entry.default if names is None else name in names)
        and all(getattr(batch, need) is not None for need in entry.needs)
        and ("saliency" not in entry.needs or batch.can_explain)
    ]


def evaluate(batch: Batch, names: list[str]) -> dict[str, Tensor]:
    """Values per example, float64 (N,), by metric name."""
    return {name: METRICS[name].function(batch).double() for name in names}


def chance(batch: Batch, names: list[str]) -> dict[str, Tensor]:
    """Values of the banded metrics on the reference maps, under `metric@reference`; they do not depend on the method."""
    columns = {}
    for reference, maps in reference_maps(batch).items():
        other = batch.with_maps(maps)
        for name in names:
            columns[f"{name}@{reference}"] = METRICS[name].function(other).double()
    return columns
