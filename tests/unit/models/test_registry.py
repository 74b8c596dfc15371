"""From names to models."""

from __future__ import annotations

import pytest
import torch
import torchvision

from mlpipe.config import MODEL_NAME, LinearSettings
from mlpipe.errors import UserError
from mlpipe.models import registry
from mlpipe.models.architectures import KNOWN, TORCHVISION
from mlpipe.models.estimators import logistic_regression


def test_every_classification_network_of_torchvision_is_known_by_a_name_the_form_allows() -> None:
    assert list(TORCHVISION) == torchvision.models.list_models(module=torchvision.models)
    assert all(MODEL_NAME.fullmatch(each.name) for each in KNOWN)


@pytest.mark.parametrize(
    ("wrong", "near"), [("resnet81", "resnet18"), ("custom_cn", "custom_cnn"), ("logistic", "logistic_regression")]
)
def test_an_unknown_name_gets_near_matches(wrong: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"models: '{wrong}' is unknown; did you mean .*\b{near}\b") as caught:
        registry.check_architecture(wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "image_size", "advice"),
    [("vgg11", 8, 32), ("inception_v3", 32, 80), ("alexnet", 32, 64), ("vit_b_16", 24, 32), ("maxvit_t", 32, 224)],
)
def test_images_too_small_for_a_network_are_refused_with_a_size_that_works(architecture, image_size, advice) -> None:
    with pytest.raises(UserError, match=rf"image_size: {architecture} .* choose image_size {advice}$"):
        registry.check_architecture(architecture, image_size)
    registry.check_architecture(architecture, advice)


@pytest.mark.parametrize(
    "architecture",
    ["custom_cnn", "resnet18", "vgg11", "efficientnet_b0", "squeezenet1_1", "googlenet", "mnasnet0_5", "regnet_y_400mf",
     "vit_b_32", "mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121"],
)  # fmt: skip
def test_networks_have_as_many_outputs_as_there_are_classes(architecture: str) -> None:
    network = registry.build_network(architecture, num_classes=7, image_size=32, seed=0)
    for training in (True, False):
        assert network.train(training)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_the_report_s_network_has_two_convolutions_and_two_linear_layers_and_takes_any_size() -> None:
    network = registry.build_network("custom_cnn", num_classes=10, image_size=32, seed=0)
    layers = [type(layer).__name__ for layer in network.modules()]
    assert layers.count("Conv2d") == layers.count("Linear") == 2
    convolutions = [layer.out_channels for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert convolutions == [32, 64]
    for size in (8, 33, 100):
        assert network(torch.zeros(1, 3, size, size)).shape == (1, 10)


def test_the_seed_decides_the_initial_weights() -> None:
    first, second, other = (
        registry.build_network("custom_cnn", num_classes=3, image_size=32, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["features.0.weight"], other["features.0.weight"])


def test_whitening_uses_no_more_dimensions_than_the_images_can_tell_from_noise() -> None:
    few = logistic_regression.build(LinearSettings(), num_images=1000, num_features=3072)
    many = logistic_regression.build(LinearSettings(), num_images=50000, num_features=3072)
    assert (few[0].n_components, many[0].n_components) == (50, 256)
