"""rb-invert: images and a model to images that the model takes for them, for a class, or for a unit."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rbkit.cli import _history, _input, _invert_spec, _output, _values
from rbkit.cli._app import program
from rbkit.cli._compute import Model, block_on, load_model, set_up, side_digest, to_tensor
from rbkit.cli._errors import Input, Usage, blame
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
    from rbkit.tools.invert import Inversion
    from rbkit.tools.models import Evaluation

TOP = 3


def invert(
    model: ModelFile,
    source: Source = "-",
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            metavar="|".join(_invert_spec.MODES),
            help="Invert representations, make class images, or excite units.",
        ),
    ] = "representation",
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            metavar="|".join(_invert_spec.STARTS),
            help="First iterate: grey noise, mean colour, a draw of --seeds-from, or another image (--start-from).",
            show_default=False,
        ),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option("--start-from", metavar="FILE", help="Stream of images to start from.", show_default=False),
    ] = None,
    seeds_from: Annotated[
        str | None,
        typer.Option(
            "--seeds-from",
            metavar="FILE",
            help="class: training stream that Gaussian seeds are fitted on.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer",
            metavar="NAME",
            help="Layer to invert or excite; default the features before the head.",
            show_default=False,
        ),
    ] = None,
    class_: Annotated[
        int | None,
        typer.Option(
            "--class",
            metavar="K",
            min=0,
            help="class: this class in every row; default the labels.",
            show_default=False,
        ),
    ] = None,
    units: Annotated[str, typer.Option("--units", metavar="K,K,...", help="feature: units to excite.")] = "0,1,2,3",
    objective: Annotated[str, typer.Option("--objective", metavar="ce|logit", help="class: what is raised.")] = "ce",
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Gradient steps.")] = 200,
    optimizer: Annotated[
        str,
        typer.Option(
            "--optimizer",
            metavar="|".join(_invert_spec.OPTIMIZERS),
            help="Steps of one L2 length, along the gradient, or by Adam.",
        ),
    ] = "normalised",
    step_size: Annotated[
        str | None,
        typer.Option(
            "--step-size",
            metavar="X",
            help="L2 length of a step (0.5), factor of the gradient (1), or Adam's rate (0.02).",
            show_default=False,
        ),
    ] = None,
    tv: Annotated[str, typer.Option("--tv", metavar="X", help="Weight of a penalty on the total variation.")] = "0",
    eps: Annotated[
        str, typer.Option("--eps", metavar="X", help="L2 radius around the start; 1000: the box alone bounds.")
    ] = "1000",
    restarts: Annotated[int, typer.Option("--restarts", metavar="N", min=1, help="Best of N starts, per example.")] = 1,
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            metavar="|".join(_invert_spec.KEEPS),
            help="The best iterate of each example, that of the best mean over the block, as the paper does for class images, or the last.",
        ),
    ] = "best",
    last_iterate: Annotated[
        str,
        typer.Option(
            "--last-iterate",
            metavar="judged|unjudged",
            help="unjudged leaves the iterate after the last step out, as the paper does.",
        ),
    ] = "judged",
    fake_relu: Annotated[
        bool,
        typer.Option(
            "--fake-relu", help="Let gradients through the last ReLU before what is inverted, as the paper does."
        ),
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
    """Make images from a model's inner view of images, classes or units.

    The output holds what came in plus inverted (float32), start, and loss (feature: activation, unit, and top_id, the
    ids of the images of the stream that excite the unit most; image is then the first of them).
    """
    options = dict(locals())
    _output.refuse_taken(output, no_clobber=no_clobber)
    options = _invert_spec.filled(options)
    spec = _invert_spec.spec(options)
    _output.refuse_same_file(source, output)
    part = _values.shard(shard)
    place = set_up(device, threads)
    options["block"] = block_on(place, block)
    subject = load_model(model, archs=arch, device=place)
    subject.check_class(class_, option="--class")
    side = _Side(options, subject, place)
    hidden = ("start_from", "seeds_from")
    entry = _history.entry(
        "rb-invert",
        {k.rstrip("_"): v for k, v in options.items() if k not in hidden},
        model=subject.sha,
        inputs=side.digests,
    )
    evaluation = subject.evaluation(options["block"], layer=layer)
    stream = checked(_input.chunks(source, shard=part, max_document=max_document), subject)
    rows = watched(stream, tool="rb-invert", quiet=quiet, shard=shard)
    with _output.Sink(output, no_history=no_history, no_clobber=no_clobber) as sink:
        if mode == "feature":
            arrays, meta = _excite(options, spec, evaluation, side, list(rows))
            sink.write(arrays, _meta(meta, spec, options, subject, entry), last=True)
            return
        for chunk in rows:
            arrays = _invert_chunk(options, spec, evaluation, side, chunk)
            sink.write(arrays, _meta(chunk.meta, spec, options, subject, entry), last=chunk.last)


class _Side:
    """Side inputs: images to start from, and the Gaussians of class seeds."""

    def __init__(self, options: dict[str, Any], subject: Model, device: torch.device) -> None:
        self.kind, self.seed, limit = options["start"], options["seed"], options["max_document"]
        self.digests = {k: side_digest(options[k]) for k in ("start_from", "seeds_from") if options[k] is not None}
        self.images: torch.Tensor | None = None
        self.ids: torch.Tensor | None = None
        self.gaussians: Any = None
        if options["start_from"] is not None:
            self.images, self.ids, _ = load_images(options["start_from"], subject, device, max_document=limit)
        if options["seeds_from"] is not None:
            from rbkit.tools.starts import fit_seeds

            images, _, labels = load_images(options["seeds_from"], subject, device, max_document=limit)
            if labels is None:
                raise Input(
                    f"{options['seeds_from']}: no labels, which class seeds need; try rb-data folder, or rb-data --label"
                )
            with blame(Input, ValueError, prefix=f"{options['seeds_from']}: "):
                self.gaussians = fit_seeds(images, labels, subject.classes)

    def starts(
        self, evaluation: Evaluation, ids: torch.Tensor, shape: tuple[int, ...], labels: Any, restarts: int
    ) -> list[torch.Tensor]:
        """First iterates, one set per restart."""
        return [self._start(evaluation, ids, shape, labels, draw) for draw in range(restarts)]

    def _start(
        self, evaluation: Evaluation, ids: torch.Tensor, shape: tuple[int, ...], labels: Any, draw: int
    ) -> torch.Tensor:
        from rbkit.tools import random, starts

        if self.kind == "mean":
            return evaluation.model.mean.clamp(0, 1).expand(len(ids), *shape).clone()
        if self.kind == "seeds":
            return starts.draw_seeds(self.gaussians, labels, ids=ids, seed=self.seed, draw=draw)
        if self.kind == "image":
            assert self.images is not None and self.ids is not None
            chosen = random.integers(ids, len(self.images), seed=self.seed, purpose="start image", draw=draw)
            same = self.ids[chosen] == ids  # another image, where there is one
            return self.images[(chosen + same.long()) % len(self.images)]
        return starts.grey_noise(ids, shape, seed=self.seed, draw=draw)


def _invert_chunk(
    options: dict[str, Any], spec: Inversion, evaluation: Evaluation, side: _Side, chunk: Chunk
) -> dict[str, Any]:
    import torch

    from rbkit.tools import invert as tool
    from rbkit.tools.examples import as_float

    device = evaluation.device
    images, ids = as_float(to_tensor(chunk.arrays["image"], device)), to_tensor(chunk.arrays["id"], device)
    labels = to_tensor(chunk.arrays["label"], device) if "label" in chunk.arrays else None
    if options["class_"] is not None:
        labels = torch.full((chunk.count,), options["class_"], device=device)
    if spec.mode == "class" and labels is None:
        raise Input(f"{chunk.place}: no labels; try --class K")
    starts = side.starts(evaluation, ids, tuple(images.shape[1:]), labels, spec.restarts)
    with blame(Usage, ValueError):
        if spec.mode == "class":
            assert labels is not None
            made, loss = tool.class_images(evaluation, labels, starts, spec, ids=ids)
        else:
            made, loss = tool.invert(evaluation, images, starts, spec, ids=ids)
    added: dict[str, Any] = {"inverted": made, "start": starts[0], "loss": loss}
    if options["class_"] is not None:
        added["label"] = labels
    return {**chunk.arrays, **{name: t.detach().cpu().numpy() for name, t in added.items()}}


def _excite(
    options: dict[str, Any], spec: Inversion, evaluation: Evaluation, side: _Side, chunks: list[Chunk]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One row per unit, and its metadata; the stream gives the images among which the most exciting are found."""
    import numpy as np
    import torch

    from rbkit.tools import invert as tool
    from rbkit.tools.examples import as_float

    shown = np.concatenate([c.arrays["image"] for c in chunks])
    known = np.concatenate([c.arrays["id"] for c in chunks])
    if not len(known):
        raise Input("no rows; exciting units needs images to compare with")
    device = evaluation.device
    numbers = [int(v) for v in _values.numbers(options["units"], option="--units")]
    units = torch.tensor(numbers, device=device)
    images = as_float(torch.from_numpy(shown).to(device))
    starts = side.starts(evaluation, units, tuple(images.shape[1:]), None, spec.restarts)
    with blame(Usage, ValueError):
        top = tool.top_images(evaluation, images, units, layer=spec.layer, count=TOP)
        made, activation = tool.unit_images(evaluation, units, starts, spec)
    arrays = {
        "image": shown[top[:, 0].cpu().numpy()], "inverted": made.cpu().numpy(), "start": starts[0].cpu().numpy(),
        "activation": activation.cpu().numpy(), "unit": units.cpu().numpy(), "id": units.cpu().numpy(),
        "top_id": known[top.cpu().numpy()],
    }  # fmt: skip
    return arrays, {**chunks[0].meta, "first": 0, "total": len(units)}


def _meta(
    meta: dict[str, Any], spec: Inversion, options: dict[str, Any], subject: Model, entry: dict[str, Any]
) -> dict[str, Any]:
    described = {**asdict(spec), "start": options["start"], "model": subject.sha}
    return _history.passed_on(meta, entry) | {"kind": "inversions", "inversion": described}


main = program("rb-invert", invert)

if __name__ == "__main__":
    sys.exit(main())
