"""Share of right answers among those of a class; mean over the classes that have test images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_score

from mlpipe.evaluation.metrics.metric import Margins, Metric, macro_average


def _resample(margins: Margins) -> NDArray[np.float64]:
    return margins.macro(margins.hits, margins.predicted)


METRIC = Metric(name="precision_macro", title="Precision", compute=macro_average(precision_score), resample=_resample)
