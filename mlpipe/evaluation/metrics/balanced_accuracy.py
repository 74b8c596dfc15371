"""Mean recall of the classes; under its own name, for it may be what the gate compares."""

from __future__ import annotations

from mlpipe.evaluation.metrics import recall
from mlpipe.evaluation.metrics.metric import Metric

METRIC = Metric(name="balanced_accuracy", title=None, compute=recall.METRIC.compute)
