"""Distillation."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from mlpipe.data.batches import BatchLoader
from mlpipe.data.dataset import Split
from mlpipe.models.portable import ImageClassifier, ModelDescription
from mlpipe.training.teacher import Teacher, distillation_loss


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
    return Teacher(classifier=classifier, order=torch.tensor(order))


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
