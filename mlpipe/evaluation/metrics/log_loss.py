"""Mean negative log-likelihood of the true class, nats."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import log_loss

from mlpipe.evaluation.metrics.metric import Metric, Predictions


def _compute(predictions: Predictions) -> float:
    indices = np.arange(predictions.probabilities.shape[1])
    return float(log_loss(predictions.labels, predictions.probabilities, labels=indices))


METRIC = Metric(name="log_loss", title="Log loss", compute=_compute, is_share=False)
