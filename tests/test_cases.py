"""Golden shell cases: cases/NAME/cmd is run by bash in an empty folder, with $IMAGES an NPZ file; stdout, stderr and status must be as kept.

RB_REWRITE=1 writes what comes out instead; `git diff` is then the review.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import shell

CASES = sorted(p.parent for p in (Path(__file__).parent / "cases").glob("*/cmd"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 small images whose every byte is known, for cases that start without torch."""
    path = tmp_path_factory.mktemp("cases") / "images.npz"
    pixels = (np.arange(1000 * 3 * 6 * 7) % 251).astype(np.uint8).reshape(1000, 3, 6, 7)
    np.savez(path, image=pixels, label=np.arange(1000) % 5)
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_case(case: Path, tmp_path: Path, images: Path) -> None:
    result = shell((case / "cmd").read_text(), cwd=tmp_path, LC_ALL="C.UTF-8", COLUMNS="100", IMAGES=str(images))
    found = {"stdout": result.out, "stderr": result.err.encode(), "status": f"{result.status}\n".encode()}
    for name, content in found.items():
        path = case / name
        if os.environ.get("RB_REWRITE"):
            path.write_bytes(content)
        assert path.read_bytes() == content, f"{case.name}: {name} differs"
