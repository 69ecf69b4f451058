"""rb-saliency: images and a model to attributions."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rbkit.cli import _history, _input, _output, _values
from rbkit.cli._app import program
from rbkit.cli._compute import Model, block_on, load_model, set_up, side_digest, to_tensor
from rbkit.cli._errors import Input, Usage, blame
from rbkit.cli._log import note
from rbkit.cli._options import (
    DOCUMENT_LIMIT,
    ArchName,
    Block,
    Device,
    MaxDocument,
    ModelFile,
    NoClobber,
    NoHistory,
    Output,
    Quiet,
    Seed,
    Shard,
    Source,
    Threads,
)
from rbkit.cli._rows import checked, load_images, watched

if TYPE_CHECKING:
    import torch

    from rbkit.formats.chunk import Chunk
    from rbkit.tools.attribution import Saliency
    from rbkit.tools.models import Evaluation

METHODS = (
    "gradient", "input-x-gradient", "ig", "smoothgrad", "shap", "occlusion", "grad-cam", "guided-backprop",
    "permutation-shap", "exact-shap",
)  # fmt: skip
OUTPUTS = ("logit", "probability", "log-probability")
BASELINES = ("black", "white", "mean", "blur", "uniform", "data")
MASKERS = ("black", "mean", "blur", "data")
OF = ("auto", "image", "adversarial")


def saliency(
    model: ModelFile,
    source: Source = "-",
    method: Annotated[
        str, typer.Option("--method", metavar="|".join(METHODS), help="shap: expected gradients.")
    ] = "gradient",
    target: Annotated[
        str, typer.Option("--target", metavar="predicted|label|K", help="Which class is explained.")
    ] = "predicted",
    explain: Annotated[str, typer.Option("--explain", metavar="|".join(OUTPUTS), help="What of that class.")] = "logit",
    of: Annotated[
        str, typer.Option("--of", metavar="|".join(OF), help="auto: adversarial where present, else image.")
    ] = "auto",
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="ig: intervals of the path.")] = 50,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--ig-tolerance",
            metavar="X",
            min=0,
            help="ig: double the steps until the completeness error is below X times the change of output.",
            show_default=False,
        ),
    ] = None,
    max_steps: Annotated[
        int, typer.Option("--max-steps", metavar="N", min=1, help="ig: where --ig-tolerance gives up.")
    ] = 1600,
    baseline: Annotated[
        str,
        typer.Option("--baseline", metavar="|".join(BASELINES), help="ig: start of the path; data takes --background."),
    ] = "black",
    baselines: Annotated[
        int, typer.Option("--baselines", metavar="N", min=1, help="ig: draws of uniform or data to average over.")
    ] = 1,
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", min=1, help="smoothgrad, shap, permutation-shap: draws per image.")
    ] = 50,
    sigma: Annotated[str, typer.Option("--sigma", metavar="X", help="smoothgrad: noise in [0, 1] pixels.")] = "0.1",
    background: Annotated[
        str | None,
        typer.Option(
            "--background",
            metavar="FILE",
            help="shap, --baseline data, --masker data: a stream of reference images.",
            show_default=False,
        ),
    ] = None,
    masker: Annotated[
        str,
        typer.Option(
            "--masker",
            metavar="|".join(MASKERS),
            help="occlusion, permutation-shap, exact-shap: what hidden pixels take; data takes --background.",
        ),
    ] = "mean",
    players: Annotated[
        str | None,
        typer.Option(
            "--players",
            metavar="N|RxC",
            help="permutation-shap, exact-shap: blocks per side, or down and across; default 8, for exact-shap 3.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            metavar="N",
            min=1,
            help="occlusion: side of the square, in pixels; default a quarter of the image's shorter side.",
            show_default=False,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            metavar="N",
            min=1,
            help="occlusion: step of the square, in pixels; default half of the window.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer",
            metavar="NAME",
            help="grad-cam: layer of the feature map; default the last map before the head.",
            show_default=False,
        ),
    ] = None,
    signed: Annotated[
        bool, typer.Option("--signed", help="grad-cam: keep negative values, which the paper drops.")
    ] = False,
    seed: Seed = 0,
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
    """Explain a model's outputs on each image of a stream.

    The output holds what came in plus attribution (float32, signed, one value per pixel and channel), target, and
    where the method has them completeness_error, output_change, steps, standard_error and block_standard_error.
    """
    options = dict(locals())
    _output.refuse_taken(output, no_clobber=no_clobber)
    spec = _spec(options)
    _output.refuse_same_file(source, output)
    part = _values.shard(shard)
    place = set_up(device, threads)
    options["block"] = block_on(place, block)
    subject = load_model(model, archs=arch, device=place)
    subject.check_class(int(target) if target.isdecimal() else None, option="--target")
    reference = None if background is None else load_images(background, subject, place, max_document=max_document)[0]
    inputs = {} if background is None else {"background": side_digest(background)}
    entry = _history.entry(
        "rb-saliency", {k: v for k, v in options.items() if k != "background"}, model=subject.sha, inputs=inputs
    )
    stream = _input.chunks(source, shard=part, max_document=max_document)
    with _output.Sink(output, no_history=no_history, no_clobber=no_clobber) as sink:
        evaluation, missed = subject.evaluation(options["block"], layer=layer), 0
        for chunk in watched(checked(stream, subject), tool="rb-saliency", quiet=quiet, shard=shard):
            arrays, explained_of, above = _explain_chunk(options, spec, evaluation, reference, chunk)
            missed += above
            sink.write(arrays, _meta(chunk, spec, options, subject, explained_of, entry), last=chunk.last)
    if missed and not quiet:
        note("rb-saliency", f"{missed} maps are above --ig-tolerance {tolerance:g}; try a larger --max-steps")


def _spec(options: dict[str, Any]) -> Saliency:
    from rbkit.tools.attribution import Saliency

    _values.choices(options, method=METHODS, explain=OUTPUTS, of=OF, baseline=BASELINES, masker=MASKERS)
    _values.block(options["block"])
    if options["target"] not in ("predicted", "label") and not options["target"].isdecimal():
        raise Usage(f"--target: got {options['target']!r}, expected predicted, label or a class number")
    if options["method"] == "shap" and options["background"] is None:
        raise Usage("--method shap needs --background FILE, a stream of reference images")
    if options["baseline"] == "data" and options["background"] is None:
        raise Usage("--baseline data needs --background FILE")
    if options["baselines"] > 1 and options["baseline"] not in ("uniform", "data"):
        raise Usage(
            f"--baselines {options['baselines']} goes with --baseline uniform or data; {options['baseline']} has one"
        )
    if options["method"] == "occlusion" and options["masker"] == "data":
        raise Usage("--method occlusion hides with --masker black, mean or blur, not with data")
    if options["layer"] is not None and options["method"] != "grad-cam":
        raise Usage(f"--layer goes with --method grad-cam, not with {options['method']}")
    down, across = (None, None) if options["players"] is None else _values.grid(options["players"], option="--players")
    spec = Saliency(
        options["method"], output=options["explain"], steps=options["steps"], samples=options["samples"],
        sigma=_values.number(options["sigma"], option="--sigma"), baseline=options["baseline"], baselines=options["baselines"],
        tolerance=options["tolerance"], max_steps=options["max_steps"], seed=options["seed"],
        masker=options["masker"], window=options["window"], stride=options["stride"],
        layer=options["layer"], signed=options["signed"], players=down, players_across=across,
    )  # fmt: skip
    if spec.needs_background and options["background"] is None:
        raise Usage(f"--method {spec.method} --masker data needs --background FILE")
    return spec


def _explain_chunk(
    options: dict[str, Any], spec: Saliency, evaluation: Evaluation, reference: Any, chunk: Chunk
) -> tuple[dict[str, Any], str, int]:
    from rbkit.tools.examples import as_float
    from rbkit.tools.saliency import explain

    device = evaluation.device
    of = options["of"] if options["of"] != "auto" else "adversarial" if "adversarial" in chunk.arrays else "image"
    if of not in chunk.arrays:
        raise Input(f"{chunk.place}: no tensor named {of}; try --of image")
    images = as_float(to_tensor(chunk.arrays[of], device))
    target = _target(options, evaluation, images, chunk)
    ids = to_tensor(chunk.arrays["id"], device)
    with blame(Usage, ValueError, prefix=f"--method {spec.method}: "):
        found = explain(evaluation, images, target, spec, ids=ids, background=reference)
    columns = {
        "attribution": found.attribution, "target": found.target, "completeness_error": found.completeness_error,
        "output_change": found.output_change, "steps": found.steps, "standard_error": found.standard_error,
        "block_standard_error": found.block_standard_error,
    }  # fmt: skip
    arrays = {**chunk.arrays, **{k: v.cpu().numpy() for k, v in columns.items() if v is not None}}
    return arrays, of, 0 if found.missed is None else int(found.missed.sum())


def _target(options: dict[str, Any], evaluation: Evaluation, images: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """The class explained in each row."""
    import torch

    logits = evaluation.logits(images)
    rule = options["target"]
    if rule == "predicted":
        return logits.argmax(1)
    if rule == "label":
        if "label" not in chunk.arrays:
            if not options["quiet"] and chunk.first == 0:
                note("rb-saliency", f"{chunk.place}: no labels; the model's own predictions stand in")
            return logits.argmax(1)
        return to_tensor(chunk.arrays["label"], images.device)
    return torch.full((len(images),), int(rule), device=images.device)


def _meta(
    chunk: Chunk, spec: Saliency, options: dict[str, Any], subject: Model, explained_of: str, entry: dict[str, Any]
) -> dict[str, Any]:
    described = {**asdict(spec), "target": options["target"], "of": explained_of, "model": subject.sha}
    return _history.passed_on(chunk.meta, entry) | {"kind": "attributions", "saliency": described}


main = program("rb-saliency", saliency)

if __name__ == "__main__":
    sys.exit(main())
