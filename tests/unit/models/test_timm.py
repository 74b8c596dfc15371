"""Networks of the library timm."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from mlpipe.config import RunParams
from mlpipe.data.dataset import Dataset
from mlpipe.errors import UserError
from mlpipe.models import package
from mlpipe.models.registry import build_network, check_architecture, describe
from mlpipe.models.weights import InitialNetwork, initial_network
from mlpipe.recipes import resolve
from tests.unit.training.conftest import CLASSES, draw

NAME = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As timm publishes them, for ImageNet's thousand classes; the numbers are random."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    safetensors.torch.save_file(timm.create_model(NAME, pretrained=False).state_dict(), path)
    return path


def test_weights_from_a_file_fit_and_bring_their_normalisation(weights: Path) -> None:
    model = resolve(RunParams.from_mapping({"models": f"timm/{NAME}={weights.as_uri()}"})).models[0]
    data = Dataset.in_memory(CLASSES, draw(6, 32, 0), draw(6, 32, 1))
    start = initial_network(model, describe(model, data.manifest), store=None)  # type: ignore[arg-type]
    assert model.name == f"timm_{NAME}"
    assert "; head (" in start.source
    config = timm.get_pretrained_cfg(NAME)
    assert config is not None
    assert start.description.channel_mean == tuple(config.mean)
    assert start.network(torch.zeros(2, 3, 32, 32)).shape == (2, len(CLASSES))
    stem = safetensors.torch.load_file(weights)["conv_stem.weight"]
    assert torch.equal(start.network.get_parameter("conv_stem.weight"), stem)
    assert any(each.startswith("timm==") for each in package.requirements(start.description))


def test_a_network_whose_size_is_fixed_is_built_for_the_images() -> None:
    network = build_network("timm/vit_tiny_patch16_224", num_classes=3, image_size=64, seed=0)
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_an_unknown_name_is_refused_with_some_that_are_near() -> None:
    with pytest.raises(UserError, match=r"^models: timm has no network 'resnet19'; did you mean resnet"):
        check_architecture("timm/resnet19", 32)


def start_at_64(name: str, tmp_path: Path) -> InitialNetwork:
    """From weights as timm publishes them, of its own size."""
    path = tmp_path / "own.safetensors"
    safetensors.torch.save_file(timm.create_model(name, pretrained=False).state_dict(), path)
    model = resolve(RunParams.from_mapping({"models": f"timm/{name}={path.as_uri()}", "image_size": 64})).models[0]
    data = Dataset.in_memory(CLASSES, draw(6, 64, 0), draw(6, 64, 1))
    return initial_network(model, describe(model, data.manifest), store=None)  # type: ignore[arg-type]


def test_weights_of_attention_are_fitted_to_another_size(tmp_path: Path) -> None:
    start = start_at_64("test_vit", tmp_path)
    assert "; head (" in start.source
    assert start.network(torch.zeros(2, 3, 64, 64)).shape == (2, len(CLASSES))


def test_where_they_cannot_be_fitted_the_size_of_the_weights_is_advised(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"attention_biases.*; where they are of it, choose image_size 224"):
        start_at_64("levit_128s", tmp_path)
