"""Calibrated probabilities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from mlpipe.data.dataset import Split
from mlpipe.models.portable import ModelDescription, calibrated
from mlpipe.training.calibration import fit_calibration
from mlpipe.training.protocol import TrainedModel


def description(temperature: float = 1.0, uniform_share: float = 0.0) -> ModelDescription:
    return ModelDescription(
        kind="estimator",
        architecture="logistic_regression",
        classes=("a", "b"),
        image_size=8,
        channel_mean=(0, 0, 0),
        channel_std=(1, 1, 1),
        temperature=temperature,
        uniform_share=uniform_share,
    )


def drawn(sharpness: float, random_labels: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities as a model gives them that is too sure by a factor, and labels drawn from the true ones.

    Args:
        random_labels: share of labels that are drawn without a look at the images.
    """
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (6000, 5))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([rng.choice(5, p=row) for row in true])
    replaced = rng.random(len(labels)) < random_labels
    labels[replaced] = rng.integers(0, 5, replaced.sum())
    given = np.exp(sharpness * logits)
    return (given / given.sum(axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("random_labels", [0.0, 0.2])
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_it_undoes_what_the_model_was_too_sure_by(sharpness: float, random_labels: float) -> None:
    probabilities, labels = drawn(sharpness, random_labels)
    temperature, share = fit_calibration(probabilities, labels)
    assert temperature == pytest.approx(sharpness, rel=0.15)
    assert share == pytest.approx(random_labels, abs=0.03)
    answers = calibrated(probabilities, description(temperature, share))
    assert answers.sum(axis=1) == pytest.approx(1)
    assert (answers.argmax(axis=1) == probabilities.argmax(axis=1)).all()
    right = (answers.argmax(axis=1) == labels).mean()
    assert answers.max(axis=1).mean() == pytest.approx(right, abs=0.02)


def test_images_that_are_enlarged_are_given_in_smaller_parts() -> None:
    shapes = []
    network = nn.Linear(3, 2)
    network.register_forward_pre_hook(lambda _, inputs: shapes.append(len(inputs[0])))
    predictor = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), network).eval()
    enlarging = replace(description(), kind="network", image_size=32, input_size=128)
    trained = TrainedModel(
        description=enlarging,
        predictor=predictor,
        metrics={},
        train_seconds=1.0,
        images_per_second=1.0,
        epochs_run=1,
        best_epoch=1,
    )
    split = Split.of(np.zeros((200, 32, 32, 3), np.uint8), np.zeros(200, np.int64))
    assert trained.probabilities_of(split).shape == (200, 2)
    assert shapes == [128, 72]


def test_no_calibration_changes_nothing() -> None:
    probabilities, _ = drawn(1.0)
    assert calibrated(probabilities, description()) is probabilities


def test_certain_answers_stay_finite() -> None:
    certain = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    for temperature in (0.1, 10.0):
        assert np.isfinite(calibrated(certain, description(temperature))).all()
    wrong_now_and_then = np.array([0] * 29 + [1], np.int64)
    temperature, share = fit_calibration(np.repeat(certain[:1], 30, axis=0), wrong_now_and_then)
    assert np.isfinite(temperature)
    assert 0 < share < 0.2
