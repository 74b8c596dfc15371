"""Why a network answers as it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mlpipe.data.dataset import Split
from mlpipe.evaluation.explain import Explainer
from mlpipe.models.portable import ImageClassifier, ModelDescription


class Brightness(nn.Module):
    """Its only feature map is the image itself; the more light, the more of class 1."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(3, 1, 1, bias=False)
        nn.init.constant_(self.look.weight, 1 / 3)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.head = nn.Linear(16, 2, bias=False)
        self.head.weight.data = torch.stack([-torch.ones(16), torch.ones(16)])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.look(images)).flatten(1))


@pytest.fixture
def explainer() -> Explainer:
    classifier = ImageClassifier()
    classifier.description = ModelDescription(
        kind="network",
        architecture="brightness",
        classes=("dark", "bright"),
        image_size=16,
        channel_mean=(0.0, 0.0, 0.0),
        channel_std=(1.0, 1.0, 1.0),
    )
    classifier.device = torch.device("cpu")
    classifier.mean, classifier.std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    classifier.predictor = Brightness().eval().requires_grad_(False)
    return Explainer.of(classifier)


def test_it_looks_where_the_evidence_is(explainer: Explainer) -> None:
    images = np.zeros((1, 16, 16, 3), np.uint8)
    images[0, :4, :4] = 255
    heat = explainer.attention(images, np.array([1]))
    assert heat.shape == (1, 16, 16)
    assert heat[0, 1, 1] == 1
    assert heat[0, 10:, 10:].max() < 0.01


def test_an_image_of_the_training_is_its_own_look_alike(explainer: Explainer) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (50, 16, 16, 3), np.uint8)
    training = Split.of(images, np.arange(50) % 2)
    assert explainer.look_alikes(images[[7, 31]], training, 3)[:, 0].tolist() == [7, 31]


def test_estimators_are_not_explained() -> None:
    assert Explainer.of(object()) is None
