"""Share of a class that is found; mean over the classes that have test images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import recall_score

from mlpipe.evaluation.metrics.metric import Margins, Metric, macro_average


def _resample(margins: Margins) -> NDArray[np.float64]:
    return margins.macro(margins.hits, margins.truths)


METRIC = Metric(
    name="recall_macro", title="Recall (balanced accuracy)", compute=macro_average(recall_score), resample=_resample
)
