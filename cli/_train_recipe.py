"""Which recipe of training the options of rb-train ask for: values that exist, options that go together, defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rbkit.cli import _ranks, _values
from rbkit.cli._errors import Usage

if TYPE_CHECKING:
    from rbkit.tools.recipe import Recipe

METHODS = ("standard", "pgd", "fgsm", "trades", "noise", "gradient-penalty")
ROBUST = ("pgd", "fgsm", "trades")  # = tools.recipe.ROBUST, which would cost torch to import here
SCHEDULES = ("onecycle", "cosine", "constant")
AUGMENTS = ("crop-flip", "crop", "flip", "resized", "none")
OPTIMIZERS = ("sgd", "muon", "adam")
SELECTS = ("mean", "clean", "robust", "last")


def recipe(options: dict[str, Any]) -> Recipe:
    """The recipe with its defaults filled in. Raises: Usage for values that do not exist or do not go together."""
    from rbkit.tools.recipe import Recipe

    _values.choices(
        options, schedule=SCHEDULES, augment=AUGMENTS, select=SELECTS, norm=_values.NORMS, optimizer=OPTIMIZERS,
        attack_bn=("eval", "train"), attack_start=("random", "clean"), attack_keep=("last", "batch"),
        last_iterate=_values.LAST_ITERATES,
    )  # fmt: skip
    if options["last_iterate"] == "unjudged" and options["attack_keep"] != "batch":
        raise Usage("--last-iterate unjudged goes with --attack-keep batch; the last iterate alone is never judged")
    if options["schedule_epochs"] is not None and options["schedule_epochs"] < options["epochs"]:
        raise Usage(
            f"--schedule-epochs {options['schedule_epochs']}: shorter than the {options['epochs']} epochs of training"
        )
    radius = _values.number(options["eps"], option="--eps")
    method = _method(options, radius)
    sigma = 0.0 if options["sigma"] is None else _values.number(options["sigma"], option="--sigma")
    steps = 1 if method == "fgsm" else options["steps"]
    default = 1.25 * radius if method == "fgsm" else 2.5 * radius / steps
    size = default if options["step_size"] is None else _values.number(options["step_size"], option="--step-size")
    names = Recipe.__dataclass_fields__
    plain = {name: options[name] for name in names if name in options}
    own = {"method": method, "eps": radius, "steps": steps if radius else 0, "step_size": size, "sigma": sigma}
    return Recipe(**{**plain, **own, "micro": _micro(options["micro"], options["batch"])})


def _method(options: dict[str, Any], radius: float) -> str:
    """The method of training, where it and the radius and noise that are asked for fit one another."""
    method = str(options["method"] or ("pgd" if radius else "standard"))
    _values.choice(method, METHODS, option="--method")
    if (method in ROBUST) != (radius > 0):
        raise Usage(
            f"--method {method} with --eps {options['eps']}: {', '.join(ROBUST)} need a radius, others have none"
        )
    if method == "gradient-penalty" and options["smoothing"] is not None:
        raise Usage("--smoothing goes with the other methods: gradient-penalty is of the loss of the plain labels")
    if (method == "noise") != (options["sigma"] is not None):
        raise Usage("--method noise and --sigma X go together")
    return method


def _micro(micro: int | None, batch: int) -> int | None:
    """Rows of a micro-batch; None where that is the batch, as it is then recorded nowhere."""
    size, processes = micro or batch, _ranks.count()
    if batch % size:
        raise Usage(f"--micro {size} does not divide --batch {batch}")
    if processes > batch // size:
        idle = f"--micro {size} leaves work for {batch // size} of {processes} processes in a step of {batch}"
        raise Usage(f"{idle}; try --micro {batch // processes} or less, or fewer processes")
    return None if size == batch else size
