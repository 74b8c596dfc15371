"""Distillation."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mlpipe.data.batches import BatchLoader
from mlpipe.data.dataset import Split
from mlpipe.models import package, registry
from mlpipe.models.portable import ImageClassifier, ModelDescription
from mlpipe.training import teacher as teachers
from mlpipe.training.teacher import Teacher, distillation_loss, load_teacher


class ByBrightness(nn.Module):
    """Logits of dark and bright, by the mean of all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        light = images.mean(dim=(1, 2, 3)) * self.scale
        return torch.stack([-light, light], dim=1)


def teacher(order: list[int]) -> Teacher:
    classifier = ImageClassifier()
    classifier.description = ModelDescription(
        kind="network",
        architecture="by_brightness",
        classes=("dark", "bright"),
        image_size=8,
        channel_mean=(0.5, 0.5, 0.5),
        channel_std=(0.5, 0.5, 0.5),
    )
    classifier.device = torch.device("cpu")
    classifier.mean, classifier.std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.5)
    classifier.predictor = ByBrightness().eval()
    return Teacher(classifier=classifier, order=torch.tensor(order), files={})


def split_of(count: int) -> Split:
    images = np.random.default_rng(0).integers(0, 255, (count, 16, 16, 3), np.uint8)
    return Split.of(images, np.arange(count) % 2)


def test_answers_are_in_the_order_of_the_students_classes() -> None:
    split = split_of(6)
    assert torch.equal(teacher([0, 1]).answers(split), teacher([1, 0]).answers(split).flip(1))


def test_answers_follow_their_images_through_the_batches() -> None:
    split = split_of(50)
    known = teacher([0, 1]).answers(split)
    loader = BatchLoader(split, 16, seed=0, shuffle=True).with_answers(known)
    for shard in (0, 1):
        for images, _, answers in loader.shard(shard, 2):
            assert torch.allclose(answers, teacher([0, 1]).logits(images), atol=1e-5)


def test_the_loss_is_least_where_the_student_agrees() -> None:
    taught = torch.tensor([[2.0, -1.0, 0.5]])
    assert float(distillation_loss(taught + 3, taught)) == 0  # the same probabilities
    assert float(distillation_loss(-taught, taught)) > 0.1


def logged(uri: str, folder: Path, field: str) -> tuple[ModelDescription, Path]:  # noqa: ARG001
    """As `download_packaged_model`."""
    description = ModelDescription(
        kind="network",
        architecture="custom_cnn",
        classes=("bars", "columns", "dots"),
        image_size=16,
        channel_mean=(0.5, 0.5, 0.5),
        channel_std=(0.5, 0.5, 0.5),
        code="mlpipe.models.networks.custom_cnn:build",
        outline="meta",
    )
    network = registry.build_network("custom_cnn", num_classes=3, image_size=16, seed=0)
    _, weights, *_ = package.write_files(description, network, folder)
    return ModelDescription.read(folder / "config.json"), weights


def test_a_process_that_has_not_loaded_its_code_can_be_given_a_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "download_packaged_model", logged)
    first = load_teacher("models:/pets/1", ("dots", "bars", "columns"))
    stream = io.BytesIO()
    torch.save(first, stream)
    monkeypatch.delitem(sys.modules, type(first.classifier.predictor).__module__)
    again = torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
    images = split_of(6).images_u8[:]
    assert torch.equal(again.logits(torch.from_numpy(images)), first.logits(torch.from_numpy(images)))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_can_learn_from_a_teacher(dataset, config, train, tracking, monkeypatch) -> None:
    monkeypatch.setattr(teachers, "download_packaged_model", logged)
    known = load_teacher("models:/pets/1", ("bars", "columns", "dots"))
    # Flips, so that the teacher answers each batch anew.
    settings = {"optimizer": "sgd", "learning_rate": 0.05, "precision": "32-true", "augmentation": "flip"}
    for num_devices in (1, 2):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(16 * 16 * 3, 3))
        train(config(**settings, num_devices=num_devices), dataset, tracking, network=network, teacher=known)
    assert tracking.steps == [1, 2, 1, 2]
