"""Harmonic mean of precision and recall; mean over the classes that have test images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score

from mlpipe.evaluation.metrics.metric import Margins, Metric, macro_average


def _resample(margins: Margins) -> NDArray[np.float64]:
    return margins.macro(2 * margins.hits, margins.truths + margins.predicted)


METRIC = Metric(name="f1_macro", title="F1", compute=macro_average(f1_score), resample=_resample)
