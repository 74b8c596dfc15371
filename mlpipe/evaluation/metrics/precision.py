"""Share of right answers among those of a class; mean over the classes that have test images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_score

from mlpipe.evaluation.metrics.metric import Margins, Metric, Predictions


def _compute(predictions: Predictions) -> float:
    labels = predictions.labels
    # zero_division=0: a class that is never predicted has found none of its images; a note says so.
    return float(
        precision_score(labels, predictions.predicted, labels=np.unique(labels), average="macro", zero_division=0)
    )


def _resample(margins: Margins) -> NDArray[np.float64]:
    return margins.macro(margins.hits, margins.predicted)


METRIC = Metric(name="precision_macro", title="Precision", compute=_compute, resample=_resample)
