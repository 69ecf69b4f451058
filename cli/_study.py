"""What a report is made from: records, models and pictures, and the studies that tags tell apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from rbkit.cli import _link_page
from rbkit.cli._compute import model_chunk, model_sha
from rbkit.cli._errors import Input, blame
from rbkit.formats.errors import FormatError


class Study:
    """All that the page is made from."""

    def __init__(self, sources: list[str]) -> None:
        self.records: list[dict[str, Any]] = []
        self.control: list[dict[str, Any]] = []  # records of images with a planted cue
        self.link: list[dict[str, Any]] = []  # records of rb-link
        self.files: dict[str, list[dict[str, Any]]] = {}  # records by the name of their file
        self.tag: str | None = None  # of the records, where they are those of one of several studies
        self.models: list[tuple[str, dict[str, Any]]] = []
        self.sheets: list[str] = []
        self.drawn: list[str] = []  # figures of rb-link
        for name in sources:
            if name.endswith(".png"):
                self.sheets.append(name)
            elif name.endswith(".svg"):
                self.drawn.append(name)
            elif name.endswith((".jsonl", ".json")):
                self._read(name)
            else:
                self.models.append((name, model_chunk(name).meta))
        if not self.records and not self.link:
            raise Input("no records; give .jsonl files of rb-score, or of rb-link")

    def _read(self, name: str) -> None:
        from rbkit.formats.table import read_records
        from rbkit.tools.control import is_cued

        with blame(Input, FormatError, OSError):
            found = read_records(Path(name))
        plain = [r for r in found if not is_cued(r) and not _link_page.is_link(r)]
        self.control += [r for r in found if is_cued(r)]
        self.link += [r for r in found if _link_page.is_link(r)]
        self.records += plain
        if plain:
            self.files[name] = plain

    def parts(self) -> list[Study]:
        """The studies that are told apart by the tag of their records: each with its own models and sheets."""
        tags = list(dict.fromkeys(r.get("tag") for r in self.records))
        return [self] if tags == [None] else [self._of(tag) for tag in tags]

    def _of(self, tag: str | None) -> Study:
        part = copy.copy(self)
        part.tag = tag
        part.files = {name: found for name, found in self.files.items() if any(r.get("tag") == tag for r in found)}
        part.records = [r for r in self.records if r.get("tag") == tag]
        shas = {r.get("model_sha") for r in part.records}
        part.models = [(name, meta) for name, meta in self.models if model_sha(meta) in shas]
        folders = {Path(name).parent for name, _ in part.models}
        part.sheets = [name for name in self.sheets if Path(name).parent in folders]
        return part

    def titled(self, text: str) -> str:
        """A title that says which of several studies it is about."""
        return text if self.tag is None else f"{text}: {self.tag}"

    @property
    def eps(self) -> float:
        """The radius at which the answer is given: that of the robust model's training, or the middle one attacked."""
        attacked = [r for r in self.records if r.get("metric") == "robust_accuracy" and r.get("eps") is not None]
        radii = sorted({float(r["eps"]) for r in attacked})
        trained = [float(r["train_eps"]) for r in self.records if r.get("train_eps")]
        if trained and trained[0] in radii:
            return trained[0]
        return radii[len(radii) // 2] if radii else 0.0

    def failings(self, bounds: dict[str, Any]) -> list[str]:
        """Why the population or the two models are worthless, if they are."""
        pairs = [reason for part in self.parts() for reason in part.pair_failings(bounds)]
        return self.population_failings(bounds) + pairs

    def population_failings(self, bounds: dict[str, Any]) -> list[str]:
        """Why the population is worthless, if it is."""
        from rbkit.tools.compare import population_failings

        return population_failings(self.link, clean=bounds["clean"])

    def pair_failings(self, bounds: dict[str, Any]) -> list[str]:
        """Why the comparison of two models is worthless, if it is."""
        from rbkit.tools.compare import failings

        return failings(self.records, eps=self.eps, **bounds) if self.records else []
