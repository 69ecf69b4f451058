"""Which attack the options of rb-attack ask for: values that exist, options that go together, defaults filled in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rbkit.cli import _values
from rbkit.cli._errors import Usage

if TYPE_CHECKING:
    from rbkit.tools.attack import Attack

NAMES = ("fgsm", "pgd", "apgd-ce", "apgd-dlr", "apgd-t", "square", "fab-t", "auto")
LOSSES = ("ce", "margin", "dlr")
KEEPS = ("best", "batch", "last")
APGD = ("apgd-ce", "apgd-dlr", "apgd-t")
TAKES = {  # options that not every attack has, and those that have them
    "steps": ("fgsm", "pgd", *APGD, "fab-t", "auto"),  # fgsm: recorded, and of no effect
    "step_size": ("fgsm", "pgd"),
    "queries": ("square", "auto"),
    "start": ("fgsm", "pgd", *APGD),
    "loss": ("fgsm", "pgd"),
    "targeted": ("fgsm", "pgd"),
    "keep": ("pgd",),
    "last_iterate": ("pgd",),
    "sprint": ("pgd",),
}


def check(options: dict[str, Any]) -> None:
    """Refuse values that do not exist, and options that do not go together."""
    _values.choices(
        options, attack=NAMES, norm=_values.NORMS, loss=LOSSES, until=("broken", "end"), start=("random", "clean"), keep=KEEPS,
        last_iterate=_values.LAST_ITERATES,
    )  # fmt: skip
    _values.block(options["block"])
    for name, takers in TAKES.items():
        if options[name] not in (None, False) and options["attack"] not in takers:
            raise Usage(f"--{name.replace('_', '-')} goes with --attack {', '.join(takers)}, not {options['attack']}")
    _check_until(options)
    if options["tf32"] and options["attack"] == "fab-t":
        raise Usage("--tf32 goes with attacks in a ball; the distances of fab-t are those of float32")
    if options["target"] is not None and not options["targeted"]:
        raise Usage("--target goes with --targeted")


def _takes_all_steps(options: dict[str, Any]) -> bool:
    """Whether broken examples go on, whatever --until says: the surrogate is not told, and some iterates need all steps."""
    return options["surrogate"] is not None or options["keep"] in ("batch", "last")


def _check_until(options: dict[str, Any]) -> None:
    until = options["until"]
    if until == "broken" and options["surrogate"] is not None:
        raise Usage(
            "--surrogate goes to the end: it is not told when the attacked model breaks; leave out --until broken"
        )
    if until == "broken" and _takes_all_steps(options):
        raise Usage(f"--keep {options['keep']} takes all steps; leave out --until broken")
    if options["sprint"] is not None and (until == "end" or _takes_all_steps(options)):
        raise Usage(
            "--sprint leaves out steps of examples that break early; it goes with --until broken and --keep best"
        )


def radii(options: dict[str, Any]) -> list[float]:
    """The radii that are asked for, each once, or the usual one of the norm."""
    texts = options["eps"] or [{"l2": "0.5", "linf": "8/255"}[options["norm"]]]
    found = [_values.number(part, option="--eps") for text in texts for part in text.split(",")]
    if len(set(found)) < len(found):
        raise Usage("--eps: the same radius twice")
    return found


def spec(options: dict[str, Any], eps: float, classes: int) -> Attack:
    """The attack with its own defaults filled in, and what so few classes make of it."""
    from rbkit.tools.attack import ATTACKS

    given = ("steps", "queries", "start", "loss", "until", "keep", "last_iterate", "sprint")
    extra = {name: options[name] for name in given if options[name] is not None}
    if options["targeted"]:
        extra["targeted"] = True
    if options["step_size"] is not None:
        extra["step_size"] = _values.number(options["step_size"], option="--step-size")
    if options["attack"] == "fgsm":
        extra = {name: value for name, value in extra.items() if name not in ("steps", "step_size")}
    if _takes_all_steps(options):
        extra["until"] = "end"
    ball = {"norm": options["norm"], "eps": eps, "seed": options["seed"], "restarts": options["restarts"]}
    return ATTACKS[options["attack"]](**ball, **extra).settled(classes)


def recorded(options: dict[str, Any], attack: Attack) -> dict[str, Any]:
    """The options with their defaults filled in, as the history keeps them: those that this attack takes."""
    filled = {"eps": attack.eps, "until": attack.until, "surrogate": None}
    taken = [name for name, takers in TAKES.items() if attack.name in takers]
    return {**options, **{name: getattr(attack, name) for name in taken}, **filled}
