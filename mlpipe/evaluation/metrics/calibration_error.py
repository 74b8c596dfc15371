"""Expected calibration error (Guo et al. 2017, eq. 3: ECE), 0 to 1."""

from __future__ import annotations

from mlpipe.evaluation.calibration import calibrate
from mlpipe.evaluation.metrics.metric import Metric, Predictions


def _compute(predictions: Predictions) -> float:
    return calibrate(predictions.probabilities.max(axis=1), predictions.correct).expected_error


METRIC = Metric(name="calibration_error", title="Calibration error", compute=_compute, is_share=False)
