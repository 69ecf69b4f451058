"""What rb-score does with its inputs: batches are judged by each model and their values pooled."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rbkit.cli import _input, _values
from rbkit.cli._compute import Model, to_tensor
from rbkit.cli._errors import Input, Usage, blame
from rbkit.cli._flags import Flags
from rbkit.cli._rows import check_input, check_numbering, checked, load_images, watched

if TYPE_CHECKING:
    from rbkit.formats.chunk import Chunk
    from rbkit.tools.batch import Batch
    from rbkit.tools.models import Evaluation
    from rbkit.tools.pool import Pools

PREFIX, FEATURES = "score.", "features."  # of the columns of a stream of scores
SHARED = 16  # chunks whose chance bands are kept for the next method
SIGNED = ("ig", "shap", "input-x-gradient", "occlusion", "grad-cam", "permutation-shap", "exact-shap")


class Judge:
    """A pass over the inputs: batches are judged by each model and their values pooled."""

    def __init__(
        self,
        options: dict[str, Any],
        names: list[str] | None,
        subjects: list[Model],
        referee: Model | None,
        device: Any,
    ) -> None:
        from rbkit.tools.pool import Pools

        self.options, self.names, self.device = options, names, device
        self.subjects = subjects
        self.evaluations: dict[tuple[str, str | None], Evaluation] = {}
        if referee is not None:
            for model in subjects:
                hint = "a judge of the same numbering"
                check_numbering(referee.meta, model.meta, place=referee.path, other=model.path, hint=hint)
        self.referee = None if referee is None else referee.evaluation(options["block"])
        self.referee_sha = None if referee is None else referee.sha
        self.background = self._background(options["background"])
        self.pools: Pools = Pools()
        self.flags = Flags() if options["flags"] else None
        self.lines: list[dict[str, Any]] = []
        self.shared: dict[bytes, dict[str, Any]] = {}
        self.history: list[dict[str, Any]] = []

    def _background(self, path: str | None) -> Any:
        if path is None:
            return None
        if not self.subjects:
            raise Usage("--background needs a model")
        return load_images(path, self.subjects[0], self.device, max_document=self.options["max_document"])[0]

    def read(self, source: str) -> None:
        """One input: a stream of images with what was made of them, or values of an earlier run."""
        stream = _input.chunks(
            source, shard=_values.shard(self.options["shard"]), max_document=self.options["max_document"]
        )
        for chunk in watched(
            self._images(stream), tool="rb-score", quiet=self.options["quiet"], shard=self.options["shard"]
        ):
            for model in self.subjects:
                check_input(model, chunk)
                self._judge(chunk, model)

    def _images(self, stream: Iterable[Chunk]) -> Iterator[Chunk]:
        """The chunks that are to be judged, checked and sampled; values of earlier runs are pooled on the way."""
        return map(self._sampled, checked(self._admitted(stream), self.subjects[0] if self.subjects else None))

    def _evaluation(self, model: Model, chunk: Chunk) -> Evaluation:
        """The form in which a model judges a chunk: maps of a layer may be made again."""
        layer = (chunk.meta.get("saliency") or {}).get("layer")
        key = (model.sha, None if layer is None else str(layer))
        if key not in self.evaluations:
            self.evaluations[key] = model.evaluation(self.options["block"], layer=key[1])
        return self.evaluations[key]

    def _admitted(self, stream: Iterable[Chunk]) -> Iterator[Chunk]:
        for chunk in stream:
            kind = chunk.meta["kind"]
            if kind == "scores":
                self._scores(chunk)
                continue
            if kind in ("model", "checkpoint"):
                raise Input(f"{chunk.place}: a {kind}, expected a stream of images; models go with -m")
            if not self.subjects:
                raise Usage("no model: give one with -m (only a stream of scores needs none)")
            self.history = self.history or list(chunk.meta.get("history") or [])
            yield chunk

    def _sampled(self, chunk: Chunk) -> Chunk:
        """The rows of a nested sample of the whole stream that lie in this chunk."""
        if self.options["n"] is None:
            return chunk
        import numpy as np

        from rbkit.tools.sample import nested_sample

        total = chunk.meta.get("total")
        if not isinstance(total, int):
            raise Usage("--n needs the total number of rows, which this input does not tell")
        chosen = nested_sample(total, min(self.options["n"], total), seed=0)
        inside = np.isin(np.arange(chunk.first, chunk.first + chunk.count), chosen)
        meta = {**chunk.meta, "count": int(inside.sum())}
        return type(chunk)({k: a[inside] for k, a in chunk.arrays.items()}, meta, chunk.last, chunk.place)

    def _judge(self, chunk: Chunk, model: Model) -> None:
        from rbkit.tools.metrics import applicable, evaluate

        batch = _batch(chunk, self._evaluation(model, chunk), self)
        names = applicable(chunk.meta["kind"], batch, self.names)
        if _unlabelled(chunk):
            names = [name for name in names if name != "clean_accuracy"]  # it would be 1 by definition
        self._share(batch, model)
        columns = evaluate(batch, names) | self._chance(batch, names) if chunk.count else {}
        if self.options["per_example"]:
            self.lines += _lines(chunk, model, batch, columns)
            return
        features = self._features(chunk, batch)
        if not names and not features:
            if self.names is not None:
                kind = chunk.meta["kind"]
                raise Input(
                    f"{chunk.place}: none of --metrics {','.join(self.names)} is of {kind} (or labels are missing)"
                )
            raise Input(f"{chunk.place}: nothing to score (no labels?); try rb-data --label, or --per-example")
        if chunk.count:
            about = _about(chunk, model, batch, self.referee_sha)
            self._pool(chunk, about, columns, features)
            if self.flags is not None:
                self.flags.add(batch, about)

    def _features(self, chunk: Chunk, batch: Batch) -> dict[str, Any]:
        """What the Fréchet distance of generated images is computed of, in the judge model's features."""
        from rbkit.tools.likeness import judged_features

        wanted = self.names is None or "frechet_distance" in self.names
        if not wanted or batch.judge is None or batch.inverted is None or not chunk.count:
            return {}
        return judged_features(batch)

    def _chance(self, batch: Batch, names: list[str]) -> dict[str, Any]:
        """The chance band of the batch's metrics, from what batches of the same rows and classes share."""
        from rbkit.tools.metrics import METRICS, chance

        banded = [name for name in names if METRICS[name].band]
        if not banded or not self.options["bands"]:
            return {}
        bands = batch.shared.setdefault("bands", {})
        missing = [name for name in banded if f"{name}@random" not in bands]
        bands.update(chance(batch, missing) if missing else {})
        return {key: values for key, values in bands.items() if key.partition("@")[0] in banded}

    def _share(self, batch: Batch, model: Model) -> None:
        """Let batches of the same model, rows and classes share what does not depend on the method."""
        if batch.explained is None or batch.target is None:
            return
        key = hashlib.sha256(f"{model.sha} {batch.output}".encode())
        for tensor in (batch.ids, batch.target, batch.explained):
            key.update(tensor.cpu().contiguous().numpy().tobytes())
        if key.digest() not in self.shared and len(self.shared) >= SHARED:
            self.shared.pop(next(iter(self.shared)))
        batch.shared = self.shared.setdefault(key.digest(), {})

    def _pool(
        self, chunk: Chunk, about: dict[str, Any], columns: dict[str, Any], features: dict[str, Any] | None = None
    ) -> None:
        from rbkit.formats.document import digest

        total = chunk.meta.get("total")
        # A shard and its siblings share history and total; another data set differs in one of them.
        origin = digest([chunk.meta.get("history") or chunk.meta.get("sha256"), total])
        with blame(Input, ValueError, prefix=f"{chunk.place}: "):
            pool = self.pools.of(about)
            ids = to_tensor(chunk.arrays["id"], "cpu")  # type: ignore[arg-type]
            pool.add(ids, columns, origin=origin, total=total, first=chunk.first, features=features)

    def _scores(self, chunk: Chunk) -> None:
        """Values per example of an earlier run."""
        import torch

        described = chunk.meta.get("scores") or {}
        names = [name for name in chunk.arrays if name.startswith(PREFIX)]
        if not isinstance(described.get("about"), dict) or "id" not in chunk.arrays:
            raise Input(f"{chunk.place}: scores without id or without what they are about")
        columns = {name.removeprefix(PREFIX): torch.from_numpy(chunk.arrays[name].astype("float64")) for name in names}
        features = {
            name.removeprefix(FEATURES): torch.from_numpy(array.astype("float32"))
            for name, array in chunk.arrays.items()
            if name.startswith(FEATURES)
        }
        self._pool(chunk, described["about"], columns, features)


def _unlabelled(chunk: Chunk) -> bool:
    """Whether an attacked stream has no labels: the model's predictions on the clean images then stand in."""
    return "adversarial" in chunk.arrays and "label" not in chunk.arrays


def _batch(chunk: Chunk, evaluation: Evaluation, run: Judge) -> Batch:
    """A chunk as what the metrics read."""
    from rbkit.tools.attribution import Saliency
    from rbkit.tools.batch import Batch
    from rbkit.tools.examples import as_float

    def tensor(name: str) -> Any:
        return to_tensor(chunk.arrays[name], run.device) if name in chunk.arrays else None

    attack, described = chunk.meta.get("attack") or {}, chunk.meta.get("saliency") or {}
    image = as_float(tensor("image"))
    spec = (
        Saliency(**{k: v for k, v in described.items() if k in Saliency.__dataclass_fields__})
        if described.get("method")
        else None
    )
    reduce = run.options["reduce"]
    signed = reduce == "signed" or (reduce == "auto" and described.get("method") in SIGNED)
    of = described.get("of", "image")
    made = image if of == "image" or of not in chunk.arrays else as_float(tensor(of))
    explained = made if "attribution" in chunk.arrays else None
    inversion = chunk.meta.get("inversion") or {}
    label = evaluation.logits(image).argmax(1) if _unlabelled(chunk) else tensor("label")
    return Batch(
        evaluation, tensor("id"), image, label=label, adversarial=tensor("adversarial"), norm=attack.get("norm", "l2"),
        eps=attack.get("eps"), attack_target=tensor("attack_target"), attribution=tensor("attribution"), explained=explained,
        distance=tensor("distance"), target=tensor("target"), saliency=spec, mask=tensor("mask"), cue_mask=tensor("cue_mask"), completeness=tensor("completeness_error"),
        inverted=tensor("inverted"), start=tensor("start"), fit=image if inversion.get("mode", "representation") == "representation" else None,
        judge=run.referee, background=run.background, signed=signed,
    )  # fmt: skip


def _about(chunk: Chunk, model: Model, batch: Batch, judge: str | None) -> dict[str, Any]:
    """What a record is of: the model, and the attack, method or inversion with all parameters, and who judged it."""
    recipe = model.meta.get("recipe") or {}
    about: dict[str, Any] = {
        "kind": chunk.meta["kind"], "model_sha": model.sha, "arch": model.meta.get("arch"), "train_method": recipe.get("method"),
        "train_norm": recipe.get("norm"), "train_eps": recipe.get("eps"), "train_seed": recipe.get("seed"),
    }  # fmt: skip
    about |= {key: value for key, value in (chunk.meta.get("data") or {}).items() if key.startswith("cue")}
    attack = chunk.meta.get("attack")
    if attack:
        about |= {
            "attack": attack["name"],
            "norm": attack["norm"],
            "eps": attack["eps"],
            "crafted_on": attack.get("surrogate") or attack.get("model"),
        }
    for kind, key in (("attributions", "saliency"), ("inversions", "inversion"), ("adversarial", "attack")):
        if chunk.meta["kind"] == kind:
            about["params"] = {k: v for k, v in (chunk.meta.get(key) or {}).items() if k != "model"}
    if _unlabelled(chunk):
        about["label"] = "predicted"
    if "saliency" in chunk.meta:
        about |= {"method": chunk.meta["saliency"].get("method"), "reduce": "signed" if batch.signed else "abs"}
    if chunk.meta["kind"] == "inversions" and judge is not None:
        about["judge"] = judge
    if "inversion" in chunk.meta:
        about["mode"] = chunk.meta["inversion"].get("mode")
    return about


def _lines(chunk: Chunk, model: Model, batch: Batch, columns: dict[str, Any]) -> list[dict[str, Any]]:
    """A record per example: what the picture is called and taken for, and its values."""
    from rbkit.formats.names import decode_names
    from rbkit.tools.statistics import finite_or_none

    names = decode_names(chunk.arrays["name"]) if "name" in chunk.arrays else [None] * chunk.count
    classes = model.meta.get("classes")
    shown = batch.clean_logits.softmax(1)
    confidence, predicted = shown.max(1)
    lines = []
    for row in range(chunk.count):
        k = int(predicted[row])
        line: dict[str, Any] = {
            "id": int(chunk.arrays["id"][row]),
            "name": names[row],
            "model_sha": model.sha,
            "predicted": k,
        }
        line |= {"class": classes[k] if classes else None, "confidence": float(confidence[row])}
        if batch.label is not None:
            line["label"] = int(batch.label[row])
        line |= {name: finite_or_none(float(values[row])) for name, values in columns.items() if "@" not in name}
        lines.append(line)
    return lines
