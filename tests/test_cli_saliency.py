"""rb-saliency as a process: methods, refusals, shards, and what rb-score makes of the maps."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import execute
from safetensors.numpy import load_file

from rbkit.cli import saliency as command
from rbkit.cli._errors import Usage, reason

# A command leaves files to the end of its process; here that is told while the module's own filters hold.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


# Method, options that keep it quick, and tensors beside attribution and target.
QUICK: dict[str, tuple[tuple[object, ...], set[str]]] = {
    "gradient": ((), set()),
    "occlusion": (("--window", 16), {"completeness_error", "output_change"}),
    "grad-cam": (("--layer", "layer3.0.conv2", "--signed"), set()),
    "guided-backprop": ((), set()),
    "permutation-shap": (
        ("--players", "2x3", "--samples", 3, "--seed", 4),
        {"completeness_error", "output_change", "block_standard_error"},
    ),
    "exact-shap": (("--players", 2, "--masker", "blur"), {"completeness_error", "output_change"}),
}


def explain(source: Path, model: Path, out: object, *options: object) -> None:
    """The command in this process: a process of its own costs seconds, and tests/test_docs.py starts some."""
    argv = [source, "-m", model, "-q", "--threads", 1, "-o", out, *options]
    command.main.command()(args=[str(a) for a in argv], standalone_mode=False)


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory, stream_file: Path, model_file: Path) -> Callable[[str], Path]:
    """The file of a method's maps, made once."""
    folder = tmp_path_factory.mktemp("maps")

    def make(method: str) -> Path:
        out = folder / f"{method}.safetensors"
        if not out.exists():
            explain(stream_file, model_file, out, "--method", method, *QUICK[method][0])
        return out

    return make


def test_the_command_offers_what_the_tools_have() -> None:
    from rbkit.tools import attribution, integrated_gradients, masking, saliency

    assert tuple(saliency.METHODS) == command.METHODS
    assert (attribution.OUTPUTS, integrated_gradients.BASELINES) == (command.OUTPUTS, command.BASELINES)
    assert masking.MASKERS == command.MASKERS


@pytest.mark.parametrize("method", QUICK)
def test_a_map_and_what_is_known_of_its_error(method: str, maps: Callable[[str], Path], stream_file: Path) -> None:
    given, rows = load_file(stream_file), load_file(maps(method))
    columns = QUICK[method][1]
    assert set(rows) - set(given) == {"attribution", "target"} | columns
    assert rows["attribution"].shape == (40, 3, 32, 32) and rows["attribution"].dtype == np.float32
    assert all(len(rows[name]) == 40 and np.isfinite(rows[name]).all() for name in columns)
    assert rows["attribution"].any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("method", QUICK)
def test_shards_join_to_the_bytes_of_the_whole(
    method: str, maps: Callable[[str], Path], tmp_path: Path, stream_file: Path, model_file: Path
) -> None:
    whole, rows = load_file(maps(method)), []
    for number in (1, 2, 3):
        part = tmp_path / f"{number}.safetensors"
        explain(stream_file, model_file, part, "--method", method, *QUICK[method][0], "--shard", f"{number}/3")
        rows.append(load_file(part))
    for name, array in whole.items():
        assert np.array_equal(np.concatenate([part[name] for part in rows]), array), name


def test_the_judge_makes_the_maps_again(maps: Callable[[str], Path], model_file: Path) -> None:
    wanted = {"max_sensitivity", "randomisation", "infidelity"}
    asked = ("-q", "--json", "--no-bands", "--n", 2, "--metrics", ",".join(wanted))
    result = execute("rb-score", *map(maps, QUICK), "-m", model_file, *asked)
    assert result.status == 0, result.err
    records = [json.loads(line) for line in result.out.splitlines()]
    assert {(r["method"], r["metric"]) for r in records if r["value"] is not None} >= {
        (method, metric) for method in QUICK for metric in wanted
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "occlusion", "--masker", "data"), "--masker black, mean or blur, not with data"),
        (
            ("--method", "occlusion", "--masker", "grey"),
            "--masker: got 'grey', expected one of black, mean, blur, data",
        ),
        (("--method", "occlusion", "--window", 33), "--method occlusion: window 33: expected 1 to 32"),
        (("--method", "occlusion", "--window", 4, "--stride", 5), "--method occlusion: stride 5: expected 1 to 4"),
        (
            ("--method", "grad-cam", "--layer", "fc"),
            "--method grad-cam: layer fc gives [8] per image, expected a feature map",
        ),
        (("--method", "gradient", "--layer", "layer1"), "--layer goes with --method grad-cam, not with gradient"),
        (("--method", "grad-cam", "--layer", "layer9"), "--method grad-cam: no layer 'layer9'; the network has conv1"),
        (
            ("--method", "exact-shap", "--players", 4),
            "--method exact-shap: 16 players have 2**16 coalitions, expected at most 12",
        ),
        (("--method", "exact-shap", "--players", "3by4"), "--players: got '3by4', expected N or RxC such as 8 or 3x4"),
        (("--method", "permutation-shap", "--players", 33), "33 x 33 players: expected at most one per pixel, 32 x 32"),
        (
            ("--method", "permutation-shap", "--masker", "data"),
            "--method permutation-shap --masker data needs --background",
        ),
        (("--method", "lime"), "--method: got 'lime', expected one of gradient"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: tuple[object, ...], message: str, tmp_path: Path, stream_file: Path, model_file: Path
) -> None:
    out = tmp_path / "maps.safetensors"
    with pytest.raises(Usage) as caught:
        explain(stream_file, model_file, out, *options)
    assert message in reason(caught.value) and "\n" not in reason(caught.value)
    assert not out.exists()


def test_the_standard_error_is_of_the_blocks_that_were_asked_for(
    maps: Callable[[str], Path], tmp_path: Path, stream_file: Path, model_file: Path
) -> None:
    assert load_file(maps("permutation-shap"))["block_standard_error"].shape == (40, 2, 3)
    out, asked = tmp_path / "maps.safetensors", ("--method", "permutation-shap", "--players", 3, "--samples", 2)
    explain(stream_file, model_file, out, *asked, "--masker", "data", "--background", stream_file, "--shard", "1/8")
    rows = load_file(out)
    assert rows["block_standard_error"].shape == (5, 3, 3) and (rows["standard_error"] > 0).any()


def test_maps_above_the_tolerance_are_counted_once(
    tmp_path: Path, stream_file: Path, model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [stream_file, "-m", model_file, "--threads", 1, "-o", tmp_path / "maps.safetensors", "--shard", "1/4"]
    strict = ("--method", "ig", "--steps", 2, "--max-steps", 4, "--ig-tolerance", 1e-9)
    command.main.command()(args=[str(a) for a in (*argv, *strict)], standalone_mode=False)
    told = "rb-saliency: 10 maps are above --ig-tolerance 1e-09; try a larger --max-steps\n"
    assert capsys.readouterr().err == told
    command.main.command()(args=[str(a) for a in (*argv, *strict, "-q")], standalone_mode=False)
    command.main.command()(args=[str(a) for a in (*argv, "--method", "ig", "--steps", 2)], standalone_mode=False)
    assert capsys.readouterr().err == ""
