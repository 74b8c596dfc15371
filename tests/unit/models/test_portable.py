"""The file that travels with every model."""

from __future__ import annotations

import ast
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import mlflow.models.model
import numpy as np
import pytest
import torch
from torch import nn

from mlpipe.config import LinearSettings
from mlpipe.models import architectures, package, portable, registry
from mlpipe.models.estimators import logistic_regression
from mlpipe.models.features import pixels
from mlpipe.models.portable import ImageClassifier, ModelDescription


@pytest.fixture
def classifier(description: ModelDescription, network: nn.Module, tmp_path: Path) -> ImageClassifier:
    loaded = ImageClassifier()
    loaded.load(*package.write_files(description, network, tmp_path))
    return loaded


@pytest.mark.parametrize(
    "module",
    [
        "mlpipe.models.portable",
        "mlpipe.data.archives.decode",
        *sorted({each.code.partition(":")[0] for each in architectures.KNOWN}),
    ],
)
def test_what_travels_imports_nothing_of_this_project(module: str) -> None:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    tree = ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8"))
    modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    roots = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names
    roots = {"pillow" if root == "PIL" else root for root in roots} - {"simplejpeg", "pillow_heif"}  # it does without
    assert roots <= {"mlflow", "numpy", "pandas", "pillow", "safetensors", "skops", "torch", "torchvision"}
    assert roots <= set(package.REQUIREMENTS)


def test_it_announces_a_model_only_when_mlflow_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[object] = []
    monkeypatch.setattr(mlflow.models, "set_model", announced.append)
    for name, expected in (("mlpipe.models.portable", 0), ("code_model_123", 1)):
        spec = importlib.util.spec_from_file_location(name, portable.__file__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        assert len(announced) == expected


def test_normalising_is_the_formula_with_channels_last_in_memory() -> None:
    images_u8 = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8)
    mean, std = torch.rand(3, 1, 1), torch.rand(3, 1, 1) + 0.1
    normalised = portable.normalise(images_u8, mean, std)
    expected = (images_u8.permute(0, 3, 1, 2).float() / 255 - mean) / std
    torch.testing.assert_close(normalised, expected, rtol=1e-4, atol=1e-5)
    assert normalised.is_contiguous(memory_format=torch.channels_last)


def test_resizing_a_flat_image_keeps_its_color_and_shrinking_averages() -> None:
    assert (portable.resize(torch.full((1, 50, 20, 3), 77, dtype=torch.uint8), 32) == 77).all()
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255
    shrunk = portable.resize(board.to(torch.uint8)[None, :, :, None].expand(1, 64, 64, 3), 8)
    assert ((shrunk[:, 1:-1, 1:-1].int() - 127).abs() <= 2).all(), "without antialiasing this would be black or white"


@pytest.mark.parametrize("num_images", [1, 7, 600])
def test_a_row_per_image_and_a_probability_per_class(classifier: ImageClassifier, num_images: int) -> None:
    images = np.random.default_rng(1).integers(0, 256, (num_images, 32, 32, 3)).astype(np.uint8)
    table = classifier.predict(None, images)
    assert list(table.columns) == ["label", "confidence", "probability_cat", "probability_dog", "probability_größe 3"]
    assert len(table) == num_images
    probabilities = table.iloc[:, 2:].to_numpy()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(table["confidence"], probabilities.max(axis=1))
    assert table["label"].tolist() == [classifier.description.classes[i] for i in probabilities.argmax(axis=1)]


def test_probabilities_are_those_of_the_network(
    classifier: ImageClassifier, network: nn.Module, images_u8: np.ndarray
) -> None:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)))
    with torch.no_grad():
        expected = network(portable.normalise(torch.from_numpy(images_u8), mean, std)).softmax(dim=1)
    np.testing.assert_allclose(classifier.probabilities(images_u8), expected.numpy(), rtol=1e-4, atol=1e-6)


def test_how_images_are_batched_makes_no_difference(
    classifier: ImageClassifier, images_u8: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = classifier.probabilities(images_u8)
    alone = np.concatenate([classifier.probabilities(image[None]) for image in images_u8])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(portable, "PIXELS_PER_BATCH", 3 * 32 * 32)
    np.testing.assert_allclose(together, classifier.probabilities(images_u8), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("device", "gibibytes", "images"), [("cpu", 0, 5), ("cuda", 8, 41), ("cuda", 80, 167)])
def test_a_gpu_takes_more_images_at_once(device: str, gibibytes: int, images: int, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Mock(total_memory=gibibytes << 30))
    assert portable.images_per_pass(224 * 224, torch.device(device)) == images


@pytest.mark.parametrize("shape", [(3, 28, 28, 1), (2, 100, 40, 3), (1, 1, 1, 3)])
def test_other_sizes_and_grey_images_are_brought_into_shape(classifier: ImageClassifier, shape) -> None:
    images = np.random.default_rng(2).integers(0, 256, shape).astype(np.uint8)
    assert len(classifier.predict(None, images)) == shape[0]


def test_images_are_resized_on_the_cpu(
    classifier: ImageClassifier, images_u8: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize, devices = portable.resize, []

    def resized(images: torch.Tensor, image_size: int) -> torch.Tensor:
        devices.append(images.device.type)
        return resize(images, image_size)

    def answers(network: object, description: object, images: torch.Tensor, *_: object) -> np.ndarray:  # noqa: ARG001
        devices.append(images.device.type)
        return np.full((len(images), 3), 1 / 3, np.float32)

    monkeypatch.setattr(portable, "resize", resized)
    monkeypatch.setattr(portable, "network_probabilities", answers)
    classifier.device = torch.device("meta")  # in place of a GPU
    classifier.probabilities(images_u8)
    assert devices == ["cpu", "meta"]


def test_images_of_different_sizes_in_one_call(classifier: ImageClassifier, images_u8: np.ndarray) -> None:
    mixed = [images_u8[0], np.zeros((50, 20, 3), np.uint8), np.zeros((9, 9, 1), np.uint8)]
    table = classifier.predict(None, mixed)
    assert len(table) == 3
    np.testing.assert_allclose(table["confidence"][0], classifier.probabilities(images_u8[:1]).max(), rtol=1e-5)


def test_grey_is_equal_red_green_and_blue(classifier: ImageClassifier, images_u8: np.ndarray) -> None:
    grey = images_u8[..., :1]
    np.testing.assert_array_equal(classifier.probabilities(grey), classifier.probabilities(np.repeat(grey, 3, axis=3)))


def test_lists_and_other_whole_numbers_are_images_too(classifier: ImageClassifier, images_u8: np.ndarray) -> None:
    expected = classifier.probabilities(images_u8)
    for other in (images_u8.tolist(), images_u8.astype(np.int64), images_u8.astype(np.float32)):
        np.testing.assert_array_equal(classifier.probabilities(other), expected)


def test_no_images_give_no_rows(classifier: ImageClassifier) -> None:
    table = classifier.predict(None, np.empty((0, 32, 32, 3), np.uint8))
    assert table.shape == (0, 5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((32, 32, 3), np.uint8), r"shape \(32, 32, 3\) is not .* first axis of length 1"),
        (np.zeros((2, 3, 32, 32), np.uint8), "channels come last"),
        (np.zeros((2, 32, 32, 4), np.uint8), "with 1 or 3 channels"),
        (np.zeros((2, 0, 32, 3), np.uint8), "has no pixels"),
        (np.full((1, 8, 8, 3), 0.5), "from 0.5 to 0.5 of type float64 are not all whole numbers from 0 to 255"),
        (np.full((1, 8, 8, 3), 256), "from 256 to 256"),
        (np.full((1, 8, 8, 3), -1), "from -1 to -1"),
        (np.full((1, 8, 8, 3), np.nan), "from nan to nan"),
        (np.full((1, 8, 8, 3), "a"), "are not pixels"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(classifier: ImageClassifier, images, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        classifier.predict(None, images)
    assert "\n" not in str(caught.value)


def test_pixels_that_may_have_been_divided_by_255_get_a_note(classifier: ImageClassifier) -> None:
    dark, bright = np.ones((1, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 2, np.uint8)
    notes = classifier.predict(None, np.concatenate([dark, bright]))["note"].tolist()
    assert "no pixel is above 1 of 255" in notes[0]
    assert notes[1] == ""
    assert "note" not in classifier.predict(None, bright)


@pytest.mark.parametrize("images", [[[[[1, 2, 3]]]], np.full((1, 2, 2, 3), 7, object), [np.full((2, 2, 3), 7)]])
def test_json_and_arrays_of_objects_are_images_too(classifier: ImageClassifier, images) -> None:
    assert len(classifier.predict(None, images)) == 1


@pytest.mark.parametrize(
    "architecture", ["resnet18", "googlenet", "mnasnet0_5", "vit_b_32", "regnet_y_400mf", "swin_t", "densenet121"]
)
def test_any_network_survives_being_written_and_read(architecture, description, images_u8, tmp_path) -> None:
    network = registry.build_network(architecture, num_classes=3, image_size=32, seed=0).eval()
    entry = architectures.find(architecture)
    described = replace(description, architecture=architecture, code=entry.code, outline=entry.outline)
    classifier = ImageClassifier()
    classifier.load(*package.write_files(described, network, tmp_path))
    with torch.no_grad():
        images = portable.normalise(torch.from_numpy(images_u8), classifier.mean, classifier.std)
        expected = network.to(memory_format=torch.channels_last)(images).softmax(dim=1)
    np.testing.assert_allclose(classifier.probabilities(images_u8), expected.numpy(), rtol=1e-3, atol=1e-5)


def test_an_estimator_survives_being_written_and_read(description, images_u8, tmp_path) -> None:
    features = pixels.features(torch.from_numpy(images_u8))
    estimator = logistic_regression.build(LinearSettings(), num_images=7, num_features=3072)
    estimator.fit(features, np.array([0, 1, 2, 0, 1, 2, 0]))
    code = "mlpipe.models.features.pixels:features"
    described = replace(description, kind="estimator", architecture="logistic_regression", code=code)
    classifier = ImageClassifier()
    classifier.load(*package.write_files(described, estimator, tmp_path))
    np.testing.assert_allclose(classifier.probabilities(images_u8), estimator.predict_proba(features), rtol=1e-5)


def test_a_description_of_a_later_format_is_refused(description: ModelDescription, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    description.write(path)
    assert ModelDescription.read(path) == description
    path.write_text(path.read_text(encoding="utf-8").replace('"format": 2', '"format": 3'), encoding="utf-8")
    with pytest.raises(ValueError, match="format 3 is unknown"):
        ModelDescription.read(path)


def test_a_description_of_the_first_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        '{"format": 1, "kind": "network", "architecture": "custom_cnn", "classes": ["cat", "dog"], "image_size": 32, '
        '"channel_mean": [0.5, 0.4, 0.3], "channel_std": [0.2, 0.3, 0.25], "variant": "small_images", '
        '"input_size": null, "test_time_averaging": "flip"}'
    )
    read = ModelDescription.read(path)
    assert (read.architecture, read.classes, read.variant, read.code) == (
        "custom_cnn",
        ("cat", "dog"),
        "small_images",
        "",
    )
