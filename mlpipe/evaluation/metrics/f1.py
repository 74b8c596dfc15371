"""Harmonic mean of precision and recall; mean over the classes that have test images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score

from mlpipe.evaluation.metrics.metric import Margins, Metric, Predictions


def _compute(predictions: Predictions) -> float:
    labels = predictions.labels
    # zero_division=0: a class that is never predicted has found none of its images; a note says so.
    return float(f1_score(labels, predictions.predicted, labels=np.unique(labels), average="macro", zero_division=0))


def _resample(margins: Margins) -> NDArray[np.float64]:
    return margins.macro(2 * margins.hits, margins.truths + margins.predicted)


METRIC = Metric(name="f1_macro", title="F1", compute=_compute, resample=_resample)
