"""What rb-train leaves: the kept model, that of the last epoch, the log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbkit.cli import _checkpoint, _examples, _history, _input, _output
from rbkit.cli._errors import Input, Output, Usage, blame
from rbkit.formats.errors import FormatError

if TYPE_CHECKING:
    from rbkit.tools.examples import Data
    from rbkit.tools.recipe import Recipe
    from rbkit.tools.train import State


def check(options: dict[str, Any]) -> None:
    """Refuse now what could not be written after hours of training."""
    output, last, log = (options[name] for name in ("output", "last", "log"))
    if not options["resume"]:
        _output.refuse_taken(output, last, log, no_clobber=options["no_clobber"])
    for path in (output, last):
        if path is not None and (path.endswith("/") or path.lower().endswith(".png")):
            raise Usage(f"{path}: a model is no picture; write it to .safetensors")
    for path in (output, last, log):
        if path is not None and (path != "-" or path == output):
            _output.check_writable(path)


def finished(output: str, job: _checkpoint.Job) -> bool:
    """Whether the output of this very job is already there."""
    if output == "-" or not Path(output).exists():
        return False
    with blame(Input, FormatError, OSError):
        found = next(iter(_input.reader(output))).meta
    return found.get("kind") == "model" and found.get("job") == job.digest


def write_log(path: str, state: State) -> None:
    """All records so far, a line of JSON each."""
    from rbkit.formats.document import canonical

    _output.write_file(path, "".join(canonical(record) + "\n" for record in state.records).encode())


def write(
    options: dict[str, Any], recipe: Recipe, state: State, meta: dict[str, Any], data: Data, job: _checkpoint.Job
) -> None:
    """The kept models, then the checkpoint goes."""
    entry = _history.entry(
        "rb-train", {**options, "method": recipe.method, "steps": recipe.steps, "step_size": recipe.step_size}
    )
    if options["init"] is not None:
        from rbkit.cli._compute import side_digest

        entry = {**entry, "inputs": {"init": side_digest(options["init"])}}
    net = state.subject.net
    best = state.best_weights if state.best_weights and recipe.select != "last" else state.weights()
    described: dict[str, Any] = {
        "kind": "model", "arch": options["arch"], "width": options["width"], "num_classes": _examples.class_count(data, meta),
        "classes": meta.get("classes"), "input": list(data.image.shape[1:]), "first": 0,
        "mean": state.classifier.mean.flatten().tolist(), "std": state.classifier.std.flatten().tolist(),
        "recipe": recipe.recorded(), "job": job.digest, "epochs": [r for r in state.records if r["event"] == "epoch"],
        "history": _history.extended(meta.get("history") or [], entry),
    }  # fmt: skip
    outputs = [(options["output"], best, state.best_epoch)]
    if options["last"] is not None:
        outputs.append((options["last"], net.state_dict(), state.epoch))
    for path, weights, epoch in reversed(outputs):
        with _output.Sink(path, no_history=options["no_history"], no_clobber=options["no_clobber"]) as sink:
            arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in weights.items()}
            sink.write(arrays, {**described, "epoch": epoch}, last=True)
    if options["log"] is not None:
        write_log(options["log"], state)
    with blame(Output, OSError):
        job.remove()
