"""Share of the images that are right."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score

from mlpipe.evaluation.metrics.metric import Margins, Metric, Predictions


def _compute(predictions: Predictions) -> float:
    return float(accuracy_score(predictions.labels, predictions.predicted))


def _resample(margins: Margins) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = margins.hits.sum(axis=1) / margins.truths.sum(axis=1)
    return shares


METRIC = Metric(name="accuracy", title="Accuracy", compute=_compute, resample=_resample)
