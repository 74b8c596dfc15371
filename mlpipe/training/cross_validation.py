"""Cross-validation: the accuracy of a training on images held out in turn."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mlpipe.data.dataset import Dataset, Split

if TYPE_CHECKING:
    from mlpipe.training.protocol import TrainedModel, TrainingLogger

logger = logging.getLogger(__name__)

ACCURACY = "folds/accuracy"
"""Metric whose step is the number of the part, from 1."""
MEAN, ERROR = "folds/mean_accuracy", "folds/standard_error"


class _Unlogged:
    """Takes what the training on a part logs; only its accuracy is kept."""

    def __init__(self, tracking: TrainingLogger) -> None:
        self._tracking = tracking

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing is written."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nothing is written."""

    def ensure_current(self) -> None:
        self._tracking.ensure_current()

    def last_logged_step(self, metric: str) -> int:  # noqa: ARG002 - of the protocol
        return 0


def cross_validate(
    dataset: Dataset,
    num_folds: int,
    seed: int,
    known: Mapping[int, float],
    tracking: TrainingLogger,
    train: Callable[[Dataset, TrainingLogger, int], TrainedModel],
) -> dict[str, float]:
    """Train on all parts but one, and measure on that one, for each part; the mean and its standard error.

    Args:
        known: accuracies of the parts that an earlier attempt measured, by number from 1.
        tracking: is given the accuracy of each part.
        train: trains on a data set, for the part of that number.

    Raises:
        UserError: a class has fewer images than there are parts.
    """
    accuracies = dict(known)
    for number, (part, held_out) in enumerate(dataset.folds(num_folds, seed), start=1):
        if number in accuracies:
            continue
        logger.info("cross-validation: part %d of %d is held out", number, num_folds)
        accuracies[number] = _accuracy(train(part, _Unlogged(tracking), number), held_out)
        tracking.ensure_current()
        tracking.log_metrics({ACCURACY: accuracies[number]}, step=number)
    values = np.array([accuracies[number] for number in range(1, num_folds + 1)])
    return {MEAN: float(values.mean()), ERROR: float(values.std(ddof=1) / math.sqrt(num_folds))}


def _accuracy(model: TrainedModel, images: Split) -> float:
    return float((model.probabilities_of(images).argmax(axis=1) == images.labels).mean())
