"""rb-model: import, export and show models."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from rbkit.cli import _history, _input, _output, _values
from rbkit.cli._app import program
from rbkit.cli._compute import model_chunk, model_sha
from rbkit.cli._errors import Input, Usage, blame
from rbkit.cli._options import Json, NoClobber, NoHistory, Output
from rbkit.formats.errors import FormatError, printable

ACTIONS = ("import", "export", "show")


def model(
    action: Annotated[str, typer.Argument(metavar="ACTION", help="import, export or show.")],
    source: Annotated[str, typer.Argument(metavar="FILE", help="The weights (import) or the model (export, show).")],
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            metavar="NAME",
            help="import: resnet8, resnet18, torchvision:NAME or package.module:factory.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes", metavar="K|A,B,...", help="import: number of classes, or their names.", show_default=False
        ),
    ] = None,
    mean: Annotated[
        str,
        typer.Option(
            "--mean", metavar="X[,X...]", help="import: subtracted from [0, 1] pixels, one value or one per channel."
        ),
    ] = "0",
    std: Annotated[str, typer.Option("--std", metavar="X[,X...]", help="import: divided by, after the mean.")] = "1",
    width: Annotated[
        int | None,
        typer.Option("--width", metavar="N", min=1, help="import: width of resnet8 or resnet18.", show_default=False),
    ] = None,
    input_: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="CxHxW",
            help="import: the images that it takes; else the first stream decides.",
            show_default=False,
        ),
    ] = None,
    json_: Json = False,
    output: Output = "-",
    no_clobber: NoClobber = False,
    no_history: NoHistory = False,
) -> None:
    """Bring in weights of others, take them out again, or show what a model file says.

    import reads .pt (without trusting a pickle) and .safetensors, unwraps state_dict, model and EMA keys, removes
    prefixes such as module., and lists what is missing or unexpected. It runs no forward pass.
    """
    options = dict(locals())
    _output.refuse_taken(output, no_clobber=no_clobber)
    if _values.choice(action, ACTIONS, option="ACTION") == "show":
        _show(source, json_)
    elif action == "export":
        _export(source, output, no_clobber=no_clobber)
    else:
        _import(options)


def _show(source: str, json_: bool) -> None:
    from rbkit.formats.document import canonical

    chunk = model_chunk(source)
    parameters = sum(a.size for a in chunk.arrays.values())
    record = {k: v for k, v in chunk.meta.items() if k not in ("part", "schema", "count", "first")}
    record |= {"file": source, "model_sha": model_sha(chunk.meta), "parameters": parameters}
    if json_:
        _output.print_line(canonical(record))
        return
    for key in sorted(record):
        if key != "history":
            _output.print_line(f"{key}: {printable(canonical(record[key]), limit=400)}")


def _export(source: str, output: str, *, no_clobber: bool) -> None:
    """The bare state dict, as a safetensors file for other libraries."""
    from rbkit.formats.document import encode

    chunk = model_chunk(source)
    if output == "-":
        _output.refuse_terminal()
    _output.write_file(output, b"".join(encode(chunk.arrays, None)), no_clobber=no_clobber)


def _import(options: dict[str, Any]) -> None:
    from rbkit.tools.architectures import build
    from rbkit.tools.weights import strip_wrapping

    if options["arch"] is None or options["classes"] is None:
        raise Usage("import needs --arch and --classes")
    names, count = _classes(options["classes"])
    size = None if options["input_"] is None else _values.size(options["input_"], option="--input")
    mean = _values.numbers(options["mean"], option="--mean", low=-1e6)
    std = _values.numbers(options["std"], option="--std", low=1e-9)
    state = _read_weights(options["source"])
    channels = size[0] if size else 3
    with blame(Usage, ValueError):
        net = build(options["arch"], num_classes=count, channels=channels, width=options["width"])
    with blame(Input, ValueError, prefix=f"{options['source']}: "):
        kept = strip_wrapping(state, net.state_dict())
    meta: dict[str, Any] = {
        "kind": "model", "arch": options["arch"], "width": options["width"], "num_classes": count, "classes": names,
        "input": None if size is None else list(size), "mean": mean, "std": std, "recipe": {"method": "imported"},
        "first": 0, "history": [_history.entry("rb-model", {**options, "action": None, "input": options["input_"]})],
    }  # fmt: skip
    with _output.Sink(options["output"], no_history=options["no_history"], no_clobber=options["no_clobber"]) as sink:
        sink.write({name: tensor.numpy() for name, tensor in kept.items()}, meta, last=True)


def _classes(text: str) -> tuple[list[str] | None, int]:
    """(names or None, number) from `10` or `cat,dog`."""
    if text.isdecimal():
        if int(text) < 1:
            raise Usage("--classes: got 0, expected at least 1")
        return None, int(text)
    names = [part.strip() for part in text.split(",")]
    if len(names) < 2 or not all(names):
        raise Usage(f"--classes: got {text!r}, expected a number or names separated by commas")
    return names, len(names)


def _read_weights(source: str) -> dict[str, Any]:
    """Tensors, possibly nested, of a .pt or .safetensors file. No code in the file is ever run."""
    import torch

    with blame(Input, OSError):
        file, name = _input.open_bytes(source)
        start = file.read(8)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        with blame(Input, OSError):
            try:
                return torch.load(source, map_location="cpu", weights_only=True)
            except OSError:
                raise
            except Exception as error:
                raise Input(
                    f"{name}: refused: holds more than tensors, or is damaged ({type(error).__name__}); where you trust "
                    "it, keep its state alone by torch.save(model.state_dict(), FILE)"
                ) from None
    from rbkit.formats.reader import Reader

    with blame(Input, FormatError, OSError):
        file, name = _input.open_bytes(source)
        chunks = list(Reader(file, name=name, rows=2**62))
    if len(chunks) != 1:
        raise Input(f"{name}: holds {len(chunks)} documents, expected one state dict")
    return {key: torch.from_numpy(array.copy()) for key, array in chunks[0].arrays.items()}


main = program("rb-model", model)

if __name__ == "__main__":
    sys.exit(main())
