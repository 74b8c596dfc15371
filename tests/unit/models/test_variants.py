"""Forms of networks, and what a model does beside its network: dropout, gradients' histograms, mirror images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from mlpipe.config import ModelConfig, NetworkSettings
from mlpipe.errors import UserError
from mlpipe.models import package, registry, weights
from mlpipe.models.architectures import KNOWN
from mlpipe.models.features.oriented_gradients import oriented_gradients
from mlpipe.models.networks.custom_cnn import ByteDropout, adaptive_average
from mlpipe.models.portable import ImageClassifier, ModelDescription


@pytest.mark.parametrize("architecture", [each.name for each in KNOWN if "small_images" in each.variants])
def test_each_architecture_said_to_have_a_form_for_small_images_has_one(architecture: str) -> None:
    standard = registry.outline_network(architecture, 3, 32)
    small = registry.outline_network(architecture, 3, 32, "small_images")
    assert small(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 3)
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (standard, small)]
    assert shapes[0] != shapes[1]


@pytest.mark.parametrize(("architecture", "expansion"), [("resnet18", 1), ("resnet50", 4)])
def test_a_resnet_for_small_images_skips_no_pixels_and_halves_its_maps_by_pooling(
    architecture: str, expansion: int
) -> None:
    network = registry.outline_network(architecture, 3, 32, "small_images")
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert {convolution.stride for convolution in convolutions} == {(1, 1)}
    seen = []
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        stage.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape[1:])))
    network(torch.zeros(2, 3, 32, 32, device="meta"))
    assert seen == [(width * expansion, size, size) for width, size in ((64, 16), (128, 16), (256, 8), (512, 4))]


def test_a_resnet_for_small_images_begins_with_pytorchs_own_weights() -> None:
    network = registry.build_network("resnet18", num_classes=3, image_size=32, seed=0, variant="small_images")
    convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == 20
    for convolution in convolutions:
        bound = convolution.weight[0].numel() ** -0.5
        assert 0.9 * bound < float(convolution.weight.detach().abs().max()) <= bound


@pytest.mark.parametrize("size", [(4, 4), (5, 20), (56, 56)])
def test_the_average_by_matrices_is_pytorchs(size: tuple[int, int]) -> None:
    features = torch.rand(2, 3, *size)
    expected = torch.nn.functional.adaptive_avg_pool2d(features, 8)
    torch.testing.assert_close(adaptive_average(features, 8), expected)


@pytest.mark.parametrize("probability", [0.25, 0.5])
def test_byte_dropout_drops_that_share_and_keeps_the_mean(probability: float) -> None:
    torch.manual_seed(0)
    dropout, ones = ByteDropout(probability).train(), torch.ones(1_000_003)
    first, second = dropout(ones), dropout(ones)
    assert first.unique().tolist() == pytest.approx([0, 1 / (1 - probability)])
    assert float((first == 0).float().mean()) == pytest.approx(probability, abs=2e-3)
    both = float(((first == 0) & (second == 0)).float().mean())
    assert both == pytest.approx(probability**2, abs=2e-3), "draws are independent"
    assert float(((first[1:] == 0) & (first[:-1] == 0)).float().mean()) == pytest.approx(probability**2, abs=2e-3)
    torch.manual_seed(0)
    assert torch.equal(dropout(ones), first)
    assert torch.equal(dropout.eval()(ones), ones)


def test_byte_dropout_passes_gradients_where_it_kept() -> None:
    values = torch.ones(64, requires_grad=True)
    kept = ByteDropout(0.5).train()(values)
    kept.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, kept.detach())


def test_oriented_gradients_see_edges_and_their_direction_alone() -> None:
    stripes = (torch.arange(32) % 8 < 4).float()
    upright, lying = stripes.expand(1, 3, 32, 32), stripes[:, None].expand(1, 3, 32, 32)
    first, second = oriented_gradients(upright), oriented_gradients(lying)
    assert first.shape == (1, 7 * 7 * 4 * 9)
    by_orientation = first.view(9, -1).sum(dim=1), second.view(9, -1).sum(dim=1)
    assert by_orientation[0].argmax() == 0, "upright edges have gradients across"
    assert int(by_orientation[1].argmax()) in (4, 5), "90° lies between the bins at 80° and 100°"
    flat = oriented_gradients(torch.full((1, 3, 32, 32), 0.7))
    assert flat.abs().max() < 1e-6
    torch.testing.assert_close(oriented_gradients(upright / 2), first, atol=0.02, rtol=0)


def test_a_model_averages_over_mirror_images_where_its_description_says_so(
    description: ModelDescription, network: nn.Module, tmp_path: Path
) -> None:
    images_u8 = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    described = replace(description, image_size=32, test_time_averaging="flip")

    def probabilities(kind: str) -> np.ndarray:
        loaded = ImageClassifier()
        loaded.load(*package.write_files(replace(described, test_time_averaging=kind), network, tmp_path))
        return loaded.probabilities(images_u8)

    averaged = probabilities("flip")
    plain = probabilities("none")
    loaded = ImageClassifier()
    loaded.load(*package.write_files(replace(described, test_time_averaging="none"), network, tmp_path))
    mirrored = loaded.probabilities(images_u8[:, :, ::-1])
    np.testing.assert_allclose(averaged, (plain + mirrored) / 2, rtol=1e-5, atol=1e-6)
    assert not np.allclose(averaged, plain)


def test_a_network_for_small_images_is_found_again_by_its_description(
    description: ModelDescription, tmp_path: Path
) -> None:
    network = registry.build_network("resnet18", num_classes=3, image_size=32, seed=0, variant="small_images").eval()
    code = "mlpipe.models.networks.torchvision_networks:build"
    described = replace(description, architecture="resnet18", variant="small_images", input_size=40, code=code)
    loaded = ImageClassifier()
    loaded.load(*package.write_files(described, network, tmp_path))
    images_u8 = np.zeros((2, 32, 32, 3), np.uint8)
    assert loaded.probabilities(images_u8).shape == (2, 3)
    seen: list[torch.Size] = []
    loaded.predictor.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    loaded.probabilities(images_u8)
    assert seen == [torch.Size([2, 3, 40, 40])]


def found_again(description: ModelDescription, folder: Path, **form: Any) -> nn.Module:
    """A custom_cnn of that form, which loads by its description and answers."""
    network = registry.build_network("custom_cnn", num_classes=3, image_size=32, seed=0, **form).eval()
    described = replace(description, image_size=32, **form)
    loaded = ImageClassifier()
    loaded.load(*package.write_files(described, network, folder))
    assert loaded.probabilities(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 3)
    return network


@pytest.mark.parametrize("variant", ["standard", "small_images"])
def test_a_wider_network_is_found_again_by_its_description(
    description: ModelDescription, tmp_path: Path, variant: Literal["standard", "small_images"]
) -> None:
    sizes = {}
    for width in (0.5, 1.0, 2.0):
        network = found_again(description, tmp_path, variant=variant, width=width)
        sizes[width] = sum(each.numel() for each in network.parameters())
    assert 3 * sizes[0.5] < 1.2 * sizes[1.0] < 0.5 * sizes[2.0]


@pytest.mark.parametrize(("variant", "per_depth"), [("standard", 2), ("small_images", 6)])
def test_a_deeper_network_is_found_again_by_its_description(
    description: ModelDescription, tmp_path: Path, variant: str, per_depth: int
) -> None:
    kernels = {}
    for depth in (1, 2, 3):
        network = found_again(description, tmp_path, variant=variant, depth=depth)
        kernels[depth] = sum(each.dim() == 4 for each in network.parameters())
    assert kernels[2] - kernels[1] == kernels[3] - kernels[2] == per_depth


def test_a_network_of_one_width_says_so(tmp_path: Path) -> None:
    own = tmp_path / "mynets.py"
    own.write_text(
        "from torch import nn\n"
        "def wide(num_classes, width=1.0):\n"
        "    return nn.Sequential(nn.Conv2d(3, int(8 * width), 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(int(8 * width), num_classes))\n"
        "def narrow(num_classes):\n"
        "    return wide(num_classes)\n"
    )
    network = registry.build_network(f"{own}:wide", num_classes=3, image_size=32, seed=0, width=2.0)
    assert len(network[0].weight) == 16  # type: ignore[index]
    with pytest.raises(UserError, match="width: narrow has a fixed width"):
        registry.build_network(f"{own}:narrow", num_classes=3, image_size=32, seed=0, width=2.0)
    with pytest.raises(UserError, match="depth: wide has a fixed depth"):
        registry.build_network(f"{own}:wide", num_classes=3, image_size=32, seed=0, depth=2)


def test_registered_weights_bring_their_form(
    description: ModelDescription, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = registry.build_network(
        "custom_cnn", num_classes=3, image_size=32, seed=1, variant="small_images", width=0.5
    )
    described = replace(description, variant="small_images", width=0.5, image_size=32, input_size=48)
    _, parameters, *_ = package.write_files(described, source, tmp_path)
    # The download is tested in test_package.py, against a real server.
    monkeypatch.setattr(package, "download_packaged_model", lambda uri, folder: (described, parameters))  # noqa: ARG005
    model = ModelConfig(architecture="custom_cnn", weights="models:/x/1", name="custom_cnn", train=NetworkSettings())
    start = weights.initial_network(model, description, store=None)  # type: ignore[arg-type]
    assert (start.description.variant, start.description.input_size) == ("small_images", 48)
    assert torch.equal(start.network.classifier.weight, source.classifier.weight)  # type: ignore[arg-type, union-attr]
