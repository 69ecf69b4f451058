"""rb-train: images to a model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rbkit.cli import _checkpoint, _examples, _output, _ranks, _train_output, _train_recipe
from rbkit.cli._app import program
from rbkit.cli._compute import load_model, set_up
from rbkit.cli._errors import Input, Numbers, Stopped, Usage, blame
from rbkit.cli._log import note
from rbkit.cli._options import (
    DOCUMENT_LIMIT,
    EPS_HELP,
    Device,
    MaxDocument,
    NoClobber,
    NoHistory,
    Norm,
    Quiet,
    Seed,
    Source,
    Threads,
)
from rbkit.cli._options import Output as OutputFile
from rbkit.cli._progress import Progress
from rbkit.cli._rows import check_numbering
from rbkit.cli._watch import Watch, pace

if TYPE_CHECKING:
    import torch

    from rbkit.tools.examples import Data
    from rbkit.tools.models import Classifier
    from rbkit.tools.ranks import Ranks
    from rbkit.tools.recipe import Recipe
    from rbkit.tools.train import State

# What the processes after the first leave to it: files, and words.
FOLLOWING = {"output": "-", "last": None, "log": None, "init": None, "resume": False, "quiet": True}


def train(
    source: Source = "-",
    arch: Annotated[
        str,
        typer.Option("--arch", metavar="NAME", help="resnet8, resnet18, torchvision:NAME or package.module:factory."),
    ] = "resnet8",
    width: Annotated[
        int | None,
        typer.Option("--width", metavar="N", min=1, help="Width of resnet8 (16) or resnet18 (64).", show_default=False),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="|".join(_train_recipe.METHODS),
            help="Default pgd where --eps is given, else standard.",
            show_default=False,
        ),
    ] = None,
    norm: Norm = "l2",
    eps: Annotated[str, typer.Option("--eps", metavar="X", help=EPS_HELP + " Of the inner attack.")] = "0",
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Gradient steps of the inner attack.")] = 7,
    step_size: Annotated[
        str | None,
        typer.Option(
            "--step-size",
            metavar="X",
            help="Of the inner attack; default 2.5 eps / steps (fgsm: 1.25 eps).",
            show_default=False,
        ),
    ] = None,
    eps_ramp: Annotated[
        float,
        typer.Option(
            "--eps-ramp", metavar="X", min=0, max=1, help="Share of the steps over which the radius rises from 0."
        ),
    ] = 0.0,
    beta: Annotated[
        float,
        typer.Option(
            "--beta", metavar="X", min=0, help="trades: weight of the robust term; gradient-penalty: of the penalty."
        ),
    ] = 6.0,
    sigma: Annotated[
        str | None,
        typer.Option("--sigma", metavar="X", help="noise: Gaussian noise in [0, 1] pixels.", show_default=False),
    ] = None,
    attack_bn: Annotated[
        str,
        typer.Option(
            "--attack-bn", metavar="eval|train", help="BatchNorm during the inner attack; train is the paper's."
        ),
    ] = "eval",
    attack_start: Annotated[
        str,
        typer.Option(
            "--attack-start", metavar="random|clean", help="First iterate of the inner attack; clean is the paper's."
        ),
    ] = "random",
    attack_keep: Annotated[
        str,
        typer.Option(
            "--attack-keep",
            metavar="last|batch",
            help="Train on its last iterate, or on that of the highest mean loss over the batch, as the paper does.",
        ),
    ] = "last",
    last_iterate: Annotated[
        str,
        typer.Option(
            "--last-iterate",
            metavar="judged|unjudged",
            help="--attack-keep batch: unjudged leaves the iterate after the last step out, as the paper does.",
        ),
    ] = "judged",
    epochs: Annotated[
        int, typer.Option("--epochs", metavar="N", min=0, help="Passes over the data; 0 keeps the fresh weights.")
    ] = 8,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=2, help="Examples per step.")] = 32,
    micro: Annotated[
        int | None,
        typer.Option(
            "--micro",
            metavar="N",
            min=2,
            help="Examples that share their BatchNorm statistics, a divisor of --batch and by default all; what several processes divide.",
            show_default=False,
        ),
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(
            "--optimizer",
            metavar="|".join(_train_recipe.OPTIMIZERS),
            help="What takes the steps; muon makes those of inner weights orthogonal.",
        ),
    ] = "sgd",
    lr: Annotated[float, typer.Option("--lr", metavar="X", min=0, help="Largest learning rate.")] = 0.1,
    momentum: Annotated[float, typer.Option("--momentum", metavar="X", min=0, max=1, help="Of SGD and Muon.")] = 0.9,
    nesterov: Annotated[bool, typer.Option("--nesterov/--no-nesterov", help="Nesterov's momentum.")] = True,
    weight_decay: Annotated[
        float, typer.Option("--weight-decay", metavar="X", min=0, help="L2 penalty on all weights.")
    ] = 5e-4,
    smoothing: Annotated[
        float | None,
        typer.Option(
            "--smoothing",
            metavar="X",
            min=0,
            max=0.99,
            help="Share of each label that is spread over all classes, outside of the inner attack; default none.",
            show_default=False,
        ),
    ] = None,
    clip_value: Annotated[
        float,
        typer.Option("--clip-value", metavar="X", min=0, help="Bound of each entry of the weights' gradient; 0: none."),
    ] = 0.0,
    schedule: Annotated[
        str, typer.Option("--schedule", metavar="|".join(_train_recipe.SCHEDULES), help="onecycle and cosine end at 0.")
    ] = "onecycle",
    schedule_epochs: Annotated[
        int | None,
        typer.Option(
            "--schedule-epochs",
            metavar="N",
            min=1,
            help="Length of the schedule, of which --epochs may be a part; default --epochs.",
            show_default=False,
        ),
    ] = None,
    warmup: Annotated[
        float,
        typer.Option("--warmup", metavar="X", min=0.01, max=0.99, help="onecycle: share of the steps spent rising."),
    ] = 0.25,
    augment: Annotated[
        str,
        typer.Option(
            "--augment",
            metavar="|".join(_train_recipe.AUGMENTS),
            help="Random crop with padding 4, mirroring, or both; resized: a random part at full size, mirrored and turned.",
        ),
    ] = "crop-flip",
    ema: Annotated[
        float,
        typer.Option(
            "--ema", metavar="X", min=0, max=0.99999, help="Decay of averaged weights, which are then kept; 0: none."
        ),
    ] = 0.0,
    amp: Annotated[bool, typer.Option("--amp", help="bfloat16 autocast in training; never in validation.")] = False,
    tf32: Annotated[
        bool | None,
        typer.Option("--tf32", help="TF32 products in training on a GPU; never in validation.", show_default=False),
    ] = None,
    val: Annotated[
        str,
        typer.Option("--val", metavar="FILE|X", help="Held-out rows: a stream, or a share of the training rows by id."),
    ] = "0.1",
    select: Annotated[
        str,
        typer.Option(
            "--select",
            metavar="|".join(_train_recipe.SELECTS),
            help="Which epoch -o gets, by validation: mean of clean and robust, ...",
        ),
    ] = "mean",
    init: Annotated[
        str | None, typer.Option("--init", metavar="MODEL", help="Start from this model's weights.", show_default=False)
    ] = None,
    seed: Seed = 0,
    last: Annotated[
        str | None,
        typer.Option("--last", metavar="FILE", help="Where the model of the last epoch goes.", show_default=False),
    ] = None,
    log: Annotated[
        str | None, typer.Option("--log", metavar="FILE", help="JSON lines, one per epoch.", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint beside the output, if there is one.")
    ] = False,
    checkpoint_every: Annotated[
        str | None,
        typer.Option(
            "--checkpoint-every",
            metavar="N|TIME",
            help="Save within an epoch too: every N steps, or after 90s, 10m, 2h.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    max_document: MaxDocument = DOCUMENT_LIMIT,
    output: OutputFile = "-",
    no_clobber: NoClobber = False,
    quiet: Quiet = False,
    no_history: NoHistory = False,
) -> None:
    """Train a classifier on a labelled image stream: standard, or robust within an L2 or Linf ball.

    -o gets the epoch that is best on held-out rows. A checkpoint, OUTPUT.ckpt, is kept after every epoch, and as often
    as --checkpoint-every says; SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C finish the step and save. The same command with
    --resume goes on to the same bytes.
    """
    options = dict(locals())
    with _ranks.told_once(Usage):
        _ranks.check_launch()
        recipe, every = _train_recipe.recipe(options), pace(checkpoint_every)
        _output.refuse_same_file(source, output)
    with _ranks.told_once(Numbers, Stopped), _ranks.joined() as ranks:
        followers = options if ranks.index == 0 else options | FOLLOWING
        _train({**followers, "micro": recipe.micro}, recipe, every, ranks)


def _train(options: dict[str, Any], recipe: Recipe, every: tuple[int, float], ranks: Ranks) -> None:
    """What each process does."""
    if ranks.index == 0:
        _train_output.check(options)
    place = _ranks.own_device(set_up(options["device"], options["threads"] or _ranks.threads()))
    data, meta = _examples.read(options["source"], options["max_document"], place, ranks)
    training, held_out = _examples.hold_out(options, data, meta, place, ranks)
    options["val"] = options["val"] if _examples.is_share(options["val"]) else None
    path = None if options["output"] == "-" else f"{options['output']}.ckpt"
    job = _checkpoint.Job(options, recipe, data, path=path)
    if ranks.largest(options["resume"] and _train_output.finished(options["output"], job)):
        return
    if options["resume"]:  # whose log is the one that goes on
        _output.refuse_taken(options["output"], options["last"], no_clobber=options["no_clobber"])
    state = _begin(options, recipe, data, meta, place, job)
    _checkpoint.share(state, ranks)
    _run(options, state, training, held_out, recipe, Watch(job, every=every, ranks=ranks))
    if ranks.index == 0:
        _train_output.write(options, recipe, state, meta, data, job)


def _begin(
    options: dict[str, Any],
    recipe: Recipe,
    data: Data,
    meta: dict[str, Any],
    device: torch.device,
    job: _checkpoint.Job,
) -> State:
    """A fresh state, one with the weights of --init, or the one of the checkpoint."""
    from rbkit.tools.train import begin

    classifier = _fresh(options, data, meta, device)
    if options["init"] is not None:
        loaded = load_model(options["init"], archs=[options["arch"]], device=device)
        hint = f"rb-data --classes-of {options['init']}"
        check_numbering(meta, loaded.meta, place="the rows to train on", other=options["init"], hint=hint)
        with blame(Input, RuntimeError, prefix=f"{options['init']}: "):
            classifier.net.load_state_dict(loaded.classifier.net.state_dict())
    state = begin(classifier, recipe)
    if options["resume"] and job.restore(state):
        state.records.append({"event": "resume", "epoch": state.epoch + 1, "step": state.step})
        if not options["quiet"]:
            note("rb-train", f"resumed at epoch {state.epoch + 1}, step {state.step}")
    return state


def _fresh(options: dict[str, Any], data: Data, meta: dict[str, Any], device: torch.device) -> Classifier:
    import torch

    from rbkit.tools import architectures, train
    from rbkit.tools.examples import statistics
    from rbkit.tools.models import Classifier, check_logits, copied

    classes = _examples.class_count(data, meta)
    mean, std = statistics(data.image)
    with train.seeded(options["seed"]), blame(Usage, ValueError):
        net = architectures.build(
            options["arch"], num_classes=classes, channels=data.image.shape[1], width=options["width"]
        )
    classifier = Classifier(net, mean=mean, std=std).to(device).to(memory_format=torch.channels_last)
    with train.seeded(options["seed"]), blame(Usage, ValueError, prefix=f"{options['arch']}: "):
        check_logits(copied(classifier), data.image.shape[1:], classes)  # a copy: its statistics move
    return classifier


def _run(
    options: dict[str, Any], state: State, training: Data, held_out: Data | None, recipe: Recipe, watch: Watch
) -> None:
    """Train to the end; signals are looked at after each step, checkpoints written after each epoch at least."""
    from rbkit.tools.risk import NumericError
    from rbkit.tools.train import fit, steps_per_epoch

    watch.listen()
    total = steps_per_epoch(training, recipe) * recipe.epochs

    def tick(step: int) -> None:
        progress.advance()
        watch.after_step(state)

    with (
        Progress("rb-train", total=total, unit="steps", quiet=options["quiet"], done=state.step) as progress,
        blame(Numbers, NumericError),
    ):
        for record in fit(state, training, held_out, recipe, tick=tick, ranks=watch.ranks):
            progress.advance(0, note=_summary(record))
            watch.save(state)
            if options["log"] is not None:
                _train_output.write_log(options["log"], state)


def _summary(record: dict[str, Any]) -> str:
    names = {"train_loss": "loss", "val_accuracy": "val", "val_robust_accuracy": "robust"}
    return " ".join(f"{short} {record[name]:.3f}" for name, short in names.items() if name in record)


main = program("rb-train", train, alone=True, resumable=True)

if __name__ == "__main__":
    sys.exit(main())
