"""Which inversion the options of rb-invert ask for: values that exist, options that go together, defaults filled in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rbkit.cli import _values
from rbkit.cli._errors import Usage

if TYPE_CHECKING:
    from rbkit.tools.invert import Inversion

MODES = ("representation", "class", "feature")
OPTIMIZERS = ("normalised", "plain", "adam")
STARTS = ("noise", "mean", "seeds", "image")
KEEPS = ("best", "batch", "last")


def filled(options: dict[str, Any]) -> dict[str, Any]:
    """The options, checked, with the defaults that follow from others."""
    from rbkit.tools.invert import STEP_SIZES

    _values.choices(
        options, optimizer=OPTIMIZERS, keep=KEEPS, last_iterate=_values.LAST_ITERATES, mode=MODES, objective=("ce", "logit")
    )  # fmt: skip
    _values.block(options["block"])
    size = str(STEP_SIZES[options["optimizer"]]) if options["step_size"] is None else options["step_size"]
    usual = "image" if options["start_from"] else "seeds" if options["seeds_from"] else "noise"
    start = usual if options["start"] is None else options["start"]
    _values.choice(start, STARTS, option="--start")
    if (start == "image") != (options["start_from"] is not None):
        raise Usage("--start image and --start-from FILE go together")
    if (start == "seeds") != (options["seeds_from"] is not None) or (start == "seeds" and options["mode"] != "class"):
        raise Usage("--start seeds and --seeds-from FILE go together, with --mode class")
    if options["layer"] is not None and options["mode"] == "class":
        raise Usage("--layer goes with --mode representation or feature; class images are made by the output")
    return {**options, "step_size": size, "start": start}


def spec(options: dict[str, Any]) -> Inversion:
    """What is asked for, as the tool takes it."""
    from rbkit.tools.invert import Inversion

    return Inversion(
        options["mode"], layer=options["layer"], steps=options["steps"],
        step_size=_values.number(options["step_size"], option="--step-size"), eps=_values.number(options["eps"], option="--eps"),
        restarts=options["restarts"], objective=options["objective"], fake_relu=options["fake_relu"], seed=options["seed"],
        optimizer=options["optimizer"], tv=_values.number(options["tv"], option="--tv"),
        keep=options["keep"], last_iterate=options["last_iterate"],
    )  # fmt: skip
