"""Streams as pictures: one contact sheet (`x.png`), or one PNG per example (a folder/, or standard output)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbkit.cli import _output
from rbkit.cli._errors import Output, Usage, blame
from rbkit.formats import png, sheet
from rbkit.formats.names import decode_names

if TYPE_CHECKING:
    import numpy as np

SHEET_ROWS = 24


class PictureWriter:
    """A writer of streams that draws them. `rows`: the most rows of a sheet, the first of each stream or, with `spread`,
    as many at even distances."""

    def __init__(self, output: str, *, rows: int = SHEET_ROWS, spread: bool = False, no_clobber: bool = False) -> None:
        self.output, self.limit, self.spread, self.no_clobber = output, rows, spread, no_clobber
        self.kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.streams: list[int] = []  # rows kept of each
        self.source = ""  # what the stream that comes next is called on a sheet of several
        self.files: list[str] = []  # names of what a sheet is drawn from, without folders
        self.names: list[str] = []  # of each stream
        self.seen = 0
        self.begin = True
        if output.endswith("/"):
            Path(output).mkdir(parents=True, exist_ok=True)

    def write(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], *, last: bool) -> None:
        """Draw or keep rows."""
        if meta["kind"] in ("model", "checkpoint", "scores"):
            raise Usage(f"a stream of kind {meta['kind']} has no pictures; write it to .safetensors")
        if self.begin:
            self.streams.append(0)
            self.names.append(self.source)
        self.begin = last
        count = len(arrays["id"]) if "id" in arrays else len(arrays["image"])
        for row in range(count):
            self.seen += 1
            one = {name: array[row] for name, array in arrays.items()}
            if self.output.lower().endswith(".png"):
                if self._wanted(meta, row):
                    self.kept.append((one, dict(meta)))
                    self.streams[-1] += 1
            else:
                self._single(one, meta)

    def _wanted(self, meta: Mapping[str, Any], row: int) -> bool:
        """Whether a row of this part of a stream goes on the sheet."""
        if not self.spread:
            return self.streams[-1] < self.limit
        total, place = meta.get("total"), int(meta.get("first") or 0) + row
        if not isinstance(total, int):
            raise Usage("--spread needs the total number of rows, which this input does not tell")
        return place * self.limit // total > (place - 1) * self.limit // total

    def close(self) -> None:
        """Write the sheet."""
        if self.output.lower().endswith(".png"):
            files = {"files": self.files} if len(self.files) > 1 else {}
            made = {"sheet": {"rows": self.limit, "spread": self.spread, **files}}
            text = _text(self.kept[0][1] if self.kept else {}) | made
            _output.write_file(self.output, png.encode(self._sheet(), text=text), no_clobber=self.no_clobber)

    def _single(self, one: dict[str, Any], meta: Mapping[str, Any]) -> None:
        raw = picture(one, meta)
        if self.output == "-":
            _output.write_stdout(raw)
            return
        with blame(Output, OSError):
            target = Path(self.output) / f"{file_stem(one, self.seen - 1)}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
        _output.write_file(str(target), raw, no_clobber=self.no_clobber)

    def _sheet(self) -> np.ndarray:
        """Streams side by side, rows paired by id."""
        streams: list[dict[int, tuple[dict[str, Any], dict[str, Any]]]] = []
        position = 0
        for count in self.streams:
            part = self.kept[position : position + count]
            streams.append({int(one.get("id", i)): (one, meta) for i, (one, meta) in enumerate(part)})
            position += count
        common = [i for i in streams[0] if all(i in s for s in streams)] if streams else []
        if len(streams) > 1 and not common:  # nothing to pair: one below the other
            streams, common = [dict(enumerate(self.kept))], list(range(len(self.kept)))
        shared = [number > 0 and _same_starts(stream, streams[0], common) for number, stream in enumerate(streams)]
        rows: list[sheet.Row] = []
        heads: list[str] = []
        sources: dict[int, str] = {}
        for identity in common:
            cells: list[np.ndarray] = []
            captions: list[str] = []
            heads = []
            for number, stream in enumerate(streams):
                one, meta = stream[identity]
                more, caption, head = cells_of(one, meta, image=number == 0, start=not shared[number])
                if len(streams) > 1:  # beyond what belongs to all of them
                    sources[len(heads) + (1 + any(shared) if number == 0 else 0)] = self.names[number]
                cells, captions, heads = cells + more, captions + caption, heads + head
            rows.append(sheet.Row(cells, captions))
        meta = self.kept[0][1] if self.kept else {}
        shown = f"{len(rows)} of {self.seen // max(len(streams), 1)} rows"
        return sheet.contact_sheet(
            rows, heads=heads, title=title_of(meta, model=len(streams) == 1), foot=f"{shown}; {_legend(meta)}", columns=2 if len(rows) > 12 else 1,
            sources=sources if any(sources.values()) else None,
        )  # fmt: skip


Drawn = Mapping[int, tuple[dict[str, Any], dict[str, Any]]]  # (row, metadata) by id


def _same_starts(stream: Drawn, first: Drawn, common: list[int]) -> bool:
    """Whether inversions begin where those of the first stream do, which are then drawn once."""
    pairs = [(stream[i][0].get("start"), first[i][0].get("start")) for i in common]
    return all(one is not None and other is not None and one.tobytes() == other.tobytes() for one, other in pairs)


def names_of(paths: Sequence[str]) -> list[str]:
    """What files are called on a sheet: their names without folder and the endings in letters that all of them share."""
    parts = [Path(path).name.split(".") for path in paths]
    while all(len(part) > 1 and part[-1].isalpha() and part[-1] == parts[0][-1] for part in parts):
        parts = [part[:-1] for part in parts]
    return [".".join(part) for part in parts]


def _legend(meta: Mapping[str, Any]) -> str:
    if meta.get("kind") == "attributions":
        return "maps: channel sums, blue - / red + up to the scale below each"
    if meta.get("kind") == "adversarial":
        return "difference: grey is 0, full contrast at the scale below each"
    return "pixels in [0, 1]"


def title_of(meta: Mapping[str, Any], *, model: bool = True) -> str:
    """What a sheet shows, in a line; with the `model` where there is but one."""
    parts = [str(meta.get("kind", ""))]
    for key, names in (
        ("attack", ("name", "norm", "eps")),
        ("saliency", ("method", "output", "target")),
        ("inversion", ("mode", "start")),
    ):
        if key in meta:
            parts.append(" ".join(str(meta[key].get(name)) for name in names))
            parts += [f"model {str(meta[key].get('model'))[:8]}"] if model else []
    return ", ".join(p for p in parts if p)


def _text(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance for a text chunk."""
    return {key: meta[key] for key in ("kind", "attack", "saliency", "inversion", "history") if key in meta}


def _class(value: Any, meta: Mapping[str, Any]) -> str:
    names = meta.get("classes")
    return names[int(value)] if names and 0 <= int(value) < len(names) else str(int(value))


def _caption(one: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    name = decode_names(one["name"][None])[0] if "name" in one else f"#{int(one['id'])}" if "id" in one else ""
    label = _class(one["label"], meta) if "label" in one else ""
    return f"{Path(name).name} {label}".strip()


def cells_of(
    one: Mapping[str, Any], meta: Mapping[str, Any], *, image: bool, start: bool
) -> tuple[list[np.ndarray], list[str], list[str]]:
    """(cells, captions, heads) of one example, with the image itself and an inversion's start where asked for."""
    cells = [sheet.to_rgb(one["image"])] if image else []
    captions, heads = ([_caption(one, meta)], ["image"]) if image else ([], [])
    if meta["kind"] == "attributions":
        values = one["attribution"].sum(0)
        scale = sheet.scale_of(values)
        base = one["adversarial"] if (meta.get("saliency") or {}).get("of") == "adversarial" else one["image"]
        cells += [sheet.colour_map(values, scale=scale), sheet.overlay(base, values, scale=scale)]
        captions += [f"±{scale:.2g}", f"for {_class(one['target'], meta)}" if "target" in one else ""]
        heads += [str((meta.get("saliency") or {}).get("method", "map")), "overlay"]
    elif meta["kind"] == "adversarial":
        clean = one["image"].astype("float32") / 255 if one["image"].dtype == "uint8" else one["image"]
        scale = float(abs(one["adversarial"] - clean).max())
        cells += [sheet.to_rgb(one["adversarial"]), sheet.difference(clean, one["adversarial"], scale=scale)]
        captions += ["broken" if one.get("success", 0) else "holds", f"±{scale:.2g}"]
        heads += [f"eps {(meta.get('attack') or {}).get('eps', '')}", "difference"]
    elif meta["kind"] == "inversions":
        mid = [("start", "start")] if start and "start" in one else []
        for name, head in [*mid, ("inverted", str((meta.get("inversion") or {}).get("mode", "inverted")))]:
            cells.append(sheet.to_rgb(one[name]))
            heads.append(head)
            captions.append("" if name == "start" else _loss(one))
    return cells, captions, heads


def _loss(one: Mapping[str, Any]) -> str:
    return next((f"{name} {float(one[name]) + 0.0:.3g}" for name in ("loss", "activation") if name in one), "")


def file_stem(one: Mapping[str, Any], number: int) -> str:
    """File name of an example's picture: its own name without suffix, else its id; never a way out of the folder."""
    if "name" in one:
        path = Path(decode_names(one["name"][None])[0]).with_suffix("")
        parts = [part for part in path.parts if part not in ("/", "..", ".")]
        if parts:
            return "/".join(parts)
    return f"{int(one['id']):06d}" if "id" in one else f"{number:06d}"


def picture(one: Mapping[str, Any], meta: Mapping[str, Any]) -> bytes:
    """The PNG of one example: a heat map that keeps its values, an adversarial image inside the ball, or an image."""
    text = _text(meta)
    if meta["kind"] == "attributions":
        values = one["attribution"].sum(0)
        scale = sheet.scale_of(values)
        return png.encode_map(values, vmin=-scale, vmax=scale, palette=sheet.diverging(), text=text)
    if meta["kind"] == "adversarial" and meta.get("attack"):
        return png.encode(eight_bits(one, meta["attack"]), text=text)
    chosen = one["inverted"] if meta["kind"] == "inversions" else one.get("adversarial", one["image"])
    rgb = sheet.to_rgb(chosen)
    return png.encode(rgb.transpose(2, 0, 1)[:1] if len(chosen) == 1 else rgb.transpose(2, 0, 1).copy(), text=text)


def eight_bits(one: Mapping[str, Any], attack: Mapping[str, Any]) -> np.ndarray:
    """An adversarial image as uint8 that stays inside its ball."""
    import torch

    from rbkit.tools.examples import as_float
    from rbkit.tools.quantise import round_inside

    clean = as_float(torch.from_numpy(one["image"].copy())[None])
    rounded = round_inside(
        torch.from_numpy(one["adversarial"].copy())[None], clean, norm=attack["norm"], eps=attack["eps"]
    )
    return (rounded[0] * 255).round().to(torch.uint8).numpy()
