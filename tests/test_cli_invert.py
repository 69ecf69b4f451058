"""rb-invert: what it says of a layer is what the network's own layer gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import execute
from safetensors.torch import load_file

from rbkit.formats.reader import whole
from rbkit.tools import architectures
from rbkit.tools.examples import as_float
from rbkit.tools.models import Classifier


def outputs(model_file: Path, layer: str, images: torch.Tensor) -> torch.Tensor:
    """What a layer of the network, as it was trained, gives."""
    with model_file.open("rb") as file:
        meta = whole(file, name="model").meta
    net = architectures.build(meta["arch"], num_classes=meta["num_classes"], width=meta["width"])
    net.load_state_dict(load_file(model_file))
    classifier = Classifier(net, mean=meta["mean"], std=meta["std"]).eval()
    seen: list[torch.Tensor] = []
    classifier.net.get_submodule(layer).register_forward_hook(
        lambda _, __, output: seen.append(output.detach().clone())
    )
    classifier(images)
    return seen[-1]


@pytest.mark.parametrize("layer", ["layer2.0.conv1", "layer2.0.bn1", "layer2"])
def test_units_of_any_layer_are_the_networks_own(
    layer: str, tmp_path: Path, stream_file: Path, model_file: Path
) -> None:
    made = tmp_path / "units.safetensors"
    asked = ("--mode", "feature", "--units", "0,3,5", "--layer", layer, "--steps", 2, "-q", "-o", made)
    result = execute("rb-invert", stream_file, "-m", model_file, *asked)
    assert result.status == 0, result.err
    found, given = load_file(made), load_file(stream_file)
    units = torch.tensor([0, 3, 5])
    excited = outputs(model_file, layer, found["inverted"]).mean((2, 3))[torch.arange(3), units]
    torch.testing.assert_close(found["activation"], excited, rtol=1e-4, atol=1e-5)
    most = outputs(model_file, layer, as_float(given["image"])).mean((2, 3))[:, units].argmax(0)
    assert torch.equal(found["top_id"][:, 0], given["id"][most])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mode", "class", "--layer", "layer1"), "--layer goes with --mode representation or feature"),
        (("--layer", "layer9"), "no layer 'layer9'; the network has conv1"),
        (("--layer", "conv1", "--fake-relu"), "no ReLU runs before layer conv1 is done; try without --fake-relu"),
    ],
)
def test_a_layer_that_cannot_be_inverted_so_is_refused_in_a_line(
    options: tuple[str, ...], message: str, tmp_path: Path, stream_file: Path, model_file: Path
) -> None:
    out = tmp_path / "out.safetensors"
    result = execute("rb-invert", stream_file, "-m", model_file, "--steps", 1, "-q", *options, "-o", out)
    assert result.status == 2 and not out.exists()
    assert message in result.err and result.err.count("\n") == 1
