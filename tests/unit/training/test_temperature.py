"""Calibrated probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from mlpipe.models.portable import at_temperature
from mlpipe.training.temperature import fit_temperature


def drawn(sharpness: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities as a model gives them that is too sure by a factor, and labels drawn from the true ones."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4000, 5))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([rng.choice(5, p=row) for row in true])
    given = np.exp(sharpness * logits)
    return (given / given.sum(axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_what_the_model_was_too_sure_by(sharpness: float) -> None:
    probabilities, labels = drawn(sharpness)
    temperature = fit_temperature(probabilities, labels)
    assert temperature == pytest.approx(sharpness, rel=0.1)
    calibrated = at_temperature(probabilities, temperature)
    assert calibrated.sum(axis=1) == pytest.approx(1)
    assert (calibrated.argmax(axis=1) == probabilities.argmax(axis=1)).all()
    right = (calibrated.argmax(axis=1) == labels).mean()
    assert calibrated.max(axis=1).mean() == pytest.approx(right, abs=0.02)


def test_no_temperature_changes_nothing() -> None:
    probabilities, _ = drawn(1.0)
    assert at_temperature(probabilities, 1.0) is probabilities


def test_certain_answers_stay_finite() -> None:
    certain = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    assert np.isfinite(at_temperature(certain, 0.1)).all()
    assert np.isfinite(at_temperature(certain, 10.0)).all()
