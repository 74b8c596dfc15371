"""How good one model's predictions are, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.metrics import precision_recall_fscore_support
from statsmodels.stats.proportion import proportion_confint

from mlpipe.errors import UserError
from mlpipe.evaluation import metrics as registry
from mlpipe.evaluation.calibration import Calibration, calibrate
from mlpipe.evaluation.metrics import Margins, Predictions

CONFIDENCE_LEVEL = 0.95  # texts and figures say "95 %"
NUM_RESAMPLES = 2000
_CELLS_AT_ONCE = 4_000_000  # numbers held while resampling: 32 MB


class Interval(NamedTuple):
    """Limits of a confidence interval at `CONFIDENCE_LEVEL`."""

    low: float
    high: float


class ClassScores(NamedTuple):
    """Scores of one class; NaN where the test images have none of it, so that nothing was measured."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    """Test images of the class."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation:
    """One model's predictions on the test images, and its scores."""

    classes: tuple[str, ...]
    predictions: Predictions
    scores: Mapping[str, float]
    """By name of the metric. Macro averages run over the classes that have test images."""
    intervals: Mapping[str, Interval]
    """Bootstrap intervals of the metrics that have one, by name."""
    per_class: tuple[ClassScores, ...]
    calibration: Calibration
    notes: tuple[str, ...]
    """What a reader of the numbers has to know about them, in sentences."""

    @property
    def num_images(self) -> int:
        """Test images."""
        return len(self.predictions.labels)

    @property
    def accuracy(self) -> float:
        """Share of them that is right, by which models are ranked."""
        return self.scores["accuracy"]

    @property
    def confusion(self) -> NDArray[np.int64]:
        """(K, K) images; rows are the true classes, columns the predicted ones, both in the order of `classes`."""
        return self.predictions.confusion

    def as_metrics(self) -> dict[str, float]:
        """Scores and limits of intervals under the names that every model shares."""
        metrics = {f"test/{name}": value for name, value in self.scores.items()}
        for name, interval in self.intervals.items():
            metrics[f"test/{name}_ci_low"] = interval.low
            metrics[f"test/{name}_ci_high"] = interval.high
        return metrics

    @property
    def accuracy_text(self) -> str:
        """Accuracy with its interval, for people: 97.5 % (95.8 to 98.9)."""
        low, high = self.intervals["accuracy"]
        return f"{100 * self.accuracy:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def evaluate_predictions(
    labels: NDArray[np.integer],
    probabilities: NDArray[np.floating],
    classes: Sequence[str],
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> Evaluation:
    """Score predictions against the truth.

    Args:
        labels: (N,) true classes, 0 to K - 1.
        probabilities: (N, K), rows adding up to 1; the predicted class is the (first) largest.
        classes: K names, at least two.
        seed: of the bootstrap.
        num_resamples: of the bootstrap.

    Raises:
        UserError: a probability is not finite.
        ValueError: shapes, labels or rows are not as described.
    """
    labels = np.asarray(labels)
    given = np.asarray(probabilities, dtype=np.float64)
    _check(labels, given, len(classes))
    predictions = Predictions(
        labels.astype(np.int64), given / given.sum(axis=1, keepdims=True)
    )  # float32 rows are off by 1e-7
    return Evaluation(
        classes=tuple(classes),
        predictions=predictions,
        scores={metric.name: metric.compute(predictions) for metric in registry.METRICS},
        intervals=bootstrap_intervals(predictions.confusion, seed=seed, num_resamples=num_resamples),
        per_class=_per_class(predictions, classes),
        calibration=calibrate(predictions.probabilities.max(axis=1), predictions.correct),
        notes=_notes(predictions.confusion, classes),
    )


def bootstrap_intervals(
    confusion: NDArray[np.int64], *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> dict[str, Interval]:
    """Percentile bootstrap intervals (Efron 1979) of the metrics that can be resampled, by name.

    Drawing N images with replacement and counting them by cell of the confusion matrix is one multinomial draw with the
    cells' shares as probabilities, so this is the bootstrap over images itself, without touching any image.
    A draw that misses a class averages over the others, as the metrics themselves do.

    Where all or no images are right every draw is the same; accuracy's interval is then the exact one
    (Clopper and Pearson).
    """
    rng = np.random.default_rng(seed)
    truths, predictions = np.nonzero(confusion)
    counts = confusion[truths, predictions]
    num_cells, num_classes, total = len(counts), len(confusion), int(counts.sum())
    by_truth, by_prediction, hits = (
        sparse.csr_array((keep, (np.arange(num_cells), column)), shape=(num_cells, num_classes))
        for keep, column in (
            (np.ones(num_cells, dtype=np.int64), truths),
            (np.ones(num_cells, dtype=np.int64), predictions),
            ((truths == predictions).astype(np.int64), truths),
        )
    )
    resampled = {metric.name: metric.resample for metric in registry.METRICS if metric.resample}
    parts = []
    rows_at_once = max(1, _CELLS_AT_ONCE // max(num_cells, num_classes))
    for start in range(0, num_resamples, rows_at_once):
        draws = rng.multinomial(total, counts / total, size=min(rows_at_once, num_resamples - start))  # (R, cells)
        margins = Margins(draws @ hits, draws @ by_truth, draws @ by_prediction)
        parts.append(np.stack([resample(margins) for resample in resampled.values()], axis=1))
    alpha = 1 - CONFIDENCE_LEVEL
    lows, highs = np.quantile(np.concatenate(parts), [alpha / 2, 1 - alpha / 2], axis=0)
    intervals = {
        name: Interval(float(low), float(high)) for name, low, high in zip(resampled, lows, highs, strict=True)
    }
    num_right = int(np.trace(confusion))
    if num_right in {0, total}:
        low, high = proportion_confint(num_right, total, alpha=alpha, method="beta")
        intervals["accuracy"] = Interval(float(low), float(high))
    return intervals


def _check(labels: NDArray[Any], probabilities: NDArray[Any], num_classes: int) -> None:
    if num_classes < 2 or labels.ndim != 1 or not len(labels) or probabilities.shape != (len(labels), num_classes):
        raise ValueError(
            f"labels (N,) and probabilities (N, K) of K >= 2 classes and N >= 1 images are needed; got labels "
            f"{labels.shape}, probabilities {probabilities.shape} and {num_classes} classes"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels must be integers from 0 to {num_classes - 1}")
    bad = int((~np.isfinite(probabilities)).any(axis=1).sum())
    if bad:
        raise UserError(
            f"probabilities: the model gives no finite numbers for {bad} of {len(labels)} test images, as after a "
            "training that diverged; lower learning_rate"
        )
    if probabilities.min() < 0 or np.abs(probabilities.sum(axis=1) - 1).max() > 1e-3:
        raise ValueError("probabilities must be at least 0 and add up to 1 in each row, to within 0.001")


def _per_class(predictions: Predictions, classes: Sequence[str]) -> tuple[ClassScores, ...]:
    columns = precision_recall_fscore_support(
        predictions.labels, predictions.predicted, labels=np.arange(len(classes)), average=None, zero_division=0
    )
    return tuple(
        ClassScores(name, float(precision), float(recall), float(f1), int(support))
        if support
        else ClassScores(name, np.nan, np.nan, np.nan, 0)
        for name, precision, recall, f1, support in zip(classes, *columns, strict=True)
    )


def _notes(confusion: NDArray[np.int64], classes: Sequence[str]) -> tuple[str, ...]:
    supports, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    total = int(supports.sum())
    notes = []
    never = [name for name, support, count in zip(classes, supports, predicted, strict=True) if support and not count]
    if never:
        notes.append(f"Never predicted, so that precision and F1 count as 0: {listed(never)}.")
    absent = [name for name, support in zip(classes, supports, strict=True) if not support]
    if absent:
        notes.append(f"Without test images and left out of the macro averages: {listed(absent)}.")
    if np.trace(confusion) in {0, total}:
        share = "all" if np.trace(confusion) else "none"
        notes.append(
            f"Of the {total} test images {share} are right: a bootstrap interval would have no width, "
            "so accuracy's is the exact binomial one (Clopper and Pearson)."
        )
    return tuple(notes)


def listed(names: Sequence[str], limit: int = 10) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
