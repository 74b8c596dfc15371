"""Results of models with known numbers of right answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mlpipe.evaluation.result import ModelResult
from mlpipe.evaluation.scoring import evaluate_predictions


@pytest.fixture
def result() -> Callable[..., ModelResult]:
    """Build a model on N images, the classes in turn; where it is wrong it says the next class."""

    def build(name, correct, *, classes=("cat", "dog"), weights="none", train_seconds=2.5, confidence=0.8):
        correct = np.asarray(correct, dtype=bool)
        num_classes = len(classes)
        labels = np.arange(len(correct)) % num_classes
        predictions = np.where(correct, labels, (labels + 1) % num_classes)
        rest = (1 - confidence) / (num_classes - 1)
        probabilities = np.where(np.eye(num_classes, dtype=bool)[predictions], confidence, rest)
        return ModelResult(
            name=name,
            evaluation=evaluate_predictions(labels, probabilities, classes, seed=0),
            weights=weights,
            train_seconds=train_seconds,
            images_per_second=1000.0,
        )

    return build
