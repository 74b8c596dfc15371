"""The registry of metrics on the test images.

To add one, write a file with a `METRIC` and add it to `METRICS`. MLflow, the table and the CSV show it from then on.
"""

from mlpipe.evaluation.metrics import accuracy, balanced_accuracy, calibration_error, f1, log_loss, precision, recall
from mlpipe.evaluation.metrics.metric import Margins, Metric, Predictions

__all__ = ["METRICS", "Margins", "Metric", "Predictions"]

METRICS: tuple[Metric, ...] = (
    accuracy.METRIC,
    balanced_accuracy.METRIC,
    precision.METRIC,
    recall.METRIC,
    f1.METRIC,
    log_loss.METRIC,
    calibration_error.METRIC,
)
"""In the order of the table's columns; accuracy first, by which models are ranked."""
