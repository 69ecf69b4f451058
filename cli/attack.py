"""rb-attack: images and a model to adversarial images."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rbkit.cli import _attack_rows, _attack_spec, _history, _input, _output, _values
from rbkit.cli._app import program
from rbkit.cli._attack_rows import Models
from rbkit.cli._compute import Model, block_on, load_model, set_up, side_digest, to_tensor
from rbkit.cli._errors import Input, Usage
from rbkit.cli._log import note
from rbkit.cli._options import (
    DOCUMENT_LIMIT,
    EPS_HELP,
    ArchName,
    Block,
    Device,
    MaxDocument,
    ModelFile,
    NoClobber,
    NoHistory,
    Norm,
    Output,
    Quiet,
    Seed,
    Shard,
    Source,
    Threads,
)
from rbkit.cli._progress import Progress
from rbkit.cli._rows import check_input, check_numbering, checked, size_of

if TYPE_CHECKING:
    from rbkit.formats.chunk import Chunk
    from rbkit.tools.attack import Attack
    from rbkit.tools.slots import Batch


def attack(
    model: ModelFile,
    source: Source = "-",
    attack: Annotated[
        str,
        typer.Option(
            "--attack",
            metavar="|".join(_attack_spec.NAMES),
            help="auto: apgd-ce, apgd-t, fab-t and square in sequence.",
        ),
    ] = "pgd",
    norm: Norm = "l2",
    eps: Annotated[
        list[str] | None,
        typer.Option(
            "--eps",
            metavar="X",
            help=EPS_HELP
            + " Repeat for one stream per radius. Default that of an attacked stream, else 0.5 (l2), 8/255 (linf).",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            metavar="N",
            min=1,
            help="Gradient steps per restart, and per target of apgd-t and fab-t. Default 20 (pgd), 100 (others).",
            show_default=False,
        ),
    ] = None,
    queries: Annotated[
        int | None,
        typer.Option(
            "--queries",
            metavar="N",
            min=1,
            help="square, auto: forward passes of the random search per restart; default 5000.",
            show_default=False,
        ),
    ] = None,
    step_size: Annotated[
        str | None,
        typer.Option(
            "--step-size", metavar="X", help="pgd: length of a step; default 2.5 eps / steps.", show_default=False
        ),
    ] = None,
    restarts: Annotated[
        int, typer.Option("--restarts", metavar="N", min=1, help="Worst of N starts, per example.")
    ] = 1,
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            metavar="random|clean",
            help="Uniform in the ball (default of pgd and apgd) or the image (fgsm's).",
            show_default=False,
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            "--loss",
            metavar="|".join(_attack_spec.LOSSES),
            help="fgsm, pgd: what is raised, cross-entropy (default), margin, or DLR.",
            show_default=False,
        ),
    ] = None,
    targeted: Annotated[
        bool,
        typer.Option("--targeted", help="fgsm, pgd: towards another class: --target, else a random one per example."),
    ] = False,
    target: Annotated[
        int | None,
        typer.Option("--target", metavar="K", min=0, help="The class that --targeted aims at.", show_default=False),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(
            "--until",
            metavar="broken|end",
            help="Leave an example once it is broken, or take all steps and keep the worst (default of fab-t).",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep",
            metavar="|".join(_attack_spec.KEEPS),
            help="pgd: the best iterate of each example (default), that of the highest mean loss over the block, as the paper does, or the last.",
            show_default=False,
        ),
    ] = None,
    last_iterate: Annotated[
        str | None,
        typer.Option(
            "--last-iterate",
            metavar="judged|unjudged",
            help="pgd: unjudged leaves the iterate after the last step out, as the paper does.",
            show_default=False,
        ),
    ] = None,
    sprint: Annotated[
        int | None,
        typer.Option(
            "--sprint",
            metavar="N",
            min=1,
            help="pgd: first N steps of length eps from the image; only examples that stand this take all steps.",
            show_default=False,
        ),
    ] = None,
    surrogate: Annotated[
        str | None,
        typer.Option(
            "--surrogate",
            metavar="MODEL",
            help="Make the images on this model, to the end; whether they broke is told by --model.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    refill: Annotated[
        bool, typer.Option("--refill/--no-refill", help="Give the slot of a broken example to the next one.")
    ] = True,
    tf32: Annotated[
        bool | None,
        typer.Option(
            "--tf32",
            help="On a GPU: search by products in TF32, several times as fast; success is told in float32.",
            show_default=False,
        ),
    ] = None,
    block: Block = None,
    arch: ArchName = None,
    shard: Shard = None,
    device: Device = "auto",
    threads: Threads = None,
    max_document: MaxDocument = DOCUMENT_LIMIT,
    output: Output = "-",
    no_clobber: NoClobber = False,
    quiet: Quiet = False,
    no_history: NoHistory = False,
) -> None:
    """Find adversarial images within eps of each image of a stream.

    The output holds what came in plus adversarial (float32), success and the cost per example. Images that the model
    misclassifies are returned as they are and count as broken. Without labels the prediction stands in.
    """
    options = dict(locals())
    _output.refuse_taken(output, no_clobber=no_clobber)
    _attack_spec.check(options)
    radii = _attack_spec.radii(options)
    _output.refuse_same_file(source, output)
    part = _values.shard(shard)
    place = set_up(device, threads)
    options["block"] = block_on(place, block)
    victim = load_model(model, archs=arch, device=place)
    victim.check_class(target, option="--target")
    maker = None if surrogate is None else _surrogate(surrogate, victim, archs=arch, device=place)
    with _output.Sink(output, no_history=no_history, no_clobber=no_clobber) as sink:
        if len(radii) > 1 and not sink.many:
            raise Usage(
                f"{len(radii)} radii give {len(radii)} streams; write them to a name ending in .rbs, or to a pipe"
            )
        stream = _input.chunks(source, shard=part, max_document=max_document)
        _attack_all(options, radii, (victim, maker), stream, sink)


def _surrogate(path: str, victim: Model, *, archs: list[str] | None, device: Any) -> Model:
    """The model that images are made on. Raises: Input where its classes or its input are not the victim's."""
    model = load_model(path, archs=archs, device=device)
    if model.classes != victim.classes:
        raise Input(f"{path}: a model of {model.classes} classes, expected {victim.classes} as the attacked one")
    hint = "a surrogate of the same numbering"
    check_numbering(model.meta, victim.meta, place=path, other=victim.path, hint=hint)
    takes, expected = model.meta.get("input"), victim.meta.get("input")
    if takes is not None and expected is not None and takes != expected:
        raise Input(f"{path}: takes images of {size_of(takes)}, expected {size_of(expected)} as the attacked model")
    return model


def _attack_all(
    options: dict[str, Any], radii: list[float], models: Models, stream: Iterator[Chunk], sink: _output.Sink
) -> None:
    """One pass per radius; several radii need the rows again, so these are held."""
    victim, surrogate = models
    specs = [_attack_spec.spec(options, eps, victim.classes) for eps in radii]
    rows = _labels_missed(checked(stream, victim), quiet=options["quiet"])
    first = next(rows)
    if surrogate is not None:
        check_input(surrogate, first)
    options = {**options, "refill": _refills(surrogate or victim, first, options)}
    chunks: Iterable[Chunk] = itertools.chain([first], rows)
    if options["eps"] is None:
        for eps, part in _attack_rows.by_radius(chunks, default=specs[0]):
            _attack_stream(options, _attack_spec.spec(options, eps, victim.classes), models, part, sink)
        return
    if len(specs) > 1:
        chunks = list(chunks)
    for spec in specs:
        _attack_stream(options, spec, models, chunks, sink)


def _attack_stream(
    options: dict[str, Any], spec: Attack, models: Models, chunks: Iterable[Chunk], sink: _output.Sink
) -> None:
    from rbkit.tools import stages

    victim, surrogate = models
    evaluation = (surrogate or victim).evaluation(options["block"])
    judge = None if surrogate is None else victim.evaluation(options["block"])
    inputs = {} if surrogate is None else {"surrogate": side_digest(surrogate.path)}
    history = _history.entry("rb-attack", _attack_spec.recorded(options, spec), model=victim.sha, inputs=inputs)
    with Progress("rb-attack", total=None, unit="images", quiet=options["quiet"]) as progress:
        poll = _poll(_input.ReadAhead(_admitted(chunks, spec)), evaluation.device, options)
        results = stages.run(evaluation, spec, poll, refill=options["refill"], judge=judge, tf32=bool(options["tf32"]))
        for chunk, result in results:
            _attack_rows.check_ball(chunk, result, spec)
            arrays = {**chunk.arrays, **_attack_rows.columns(chunk, result)}
            sink.write(arrays, _attack_rows.described(chunk, spec, models, history), last=chunk.last)
            progress.expect(None if options["shard"] else chunk.meta.get("total"))
            progress.advance(chunk.count)


def _labels_missed(stream: Iterator[Chunk], *, quiet: bool) -> Iterator[Chunk]:
    """The chunks; says once where labels are missing."""
    said = quiet
    for chunk in stream:
        if "label" not in chunk.arrays and not said:
            said = True
            note("rb-attack", f"{chunk.place}: no labels; the model's own predictions stand in")
        yield chunk


def _admitted(chunks: Iterable[Chunk], spec: Attack) -> Iterator[Chunk]:
    """The chunks that this attack may add to."""
    for chunk in chunks:
        _attack_rows.check_earlier(chunk, spec)
        yield chunk


def _refills(maker: Model, first: Chunk, options: dict[str, Any]) -> bool:
    """Whether the slot of a broken example goes to the next one: not where all are judged together, or slots matter."""
    return options["keep"] != "batch" and options["refill"] and not _slots_matter(maker, first, options)


def _slots_matter(maker: Model, first: Chunk, options: dict[str, Any]) -> bool:
    """Try once whether rows of somebody's architecture depend on their slot; rbkit's own were tested not to."""
    import torch

    from rbkit.tools.architectures import OWN
    from rbkit.tools.examples import as_float
    from rbkit.tools.sameness import slots_matter

    if maker.meta["arch"] in OWN or not first.count:
        return False
    evaluation = maker.evaluation(options["block"])
    images = as_float(to_tensor(first.arrays["image"][: evaluation.block], evaluation.device))
    found = slots_matter(evaluation, images, torch.zeros(len(images), dtype=torch.int64, device=images.device))
    if found and not options["quiet"]:
        note("rb-attack", f"{maker.path}: a row's numbers depend on its place in the block; going on with --no-refill")
    return found


def _poll(ahead: _input.ReadAhead, device: Any, options: dict[str, Any]) -> Callable[[bool], Batch | None]:
    """Chunks as batches of the tool; without refilling a batch never meets another in a block."""
    import torch

    from rbkit.tools.examples import as_float
    from rbkit.tools.slots import Batch

    def poll(wait: bool) -> Batch | None:
        if not wait and not options["refill"]:
            return None
        chunk = ahead.poll(wait)
        if chunk is None:
            return None
        clean = as_float(to_tensor(chunk.arrays["image"], device))
        context: dict[str, torch.Tensor] = {
            name: to_tensor(chunk.arrays[name], device) for name in ("label", "adversarial") if name in chunk.arrays
        }
        if options["target"] is not None:
            context["target"] = torch.full((chunk.count,), options["target"], device=device)
        return Batch(to_tensor(chunk.arrays["id"], device), clean, context, tag=chunk)

    return poll


main = program("rb-attack", attack)

if __name__ == "__main__":
    sys.exit(main())
