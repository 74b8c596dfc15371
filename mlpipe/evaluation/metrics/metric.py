"""What a metric is, and what it is computed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix


@dataclass(frozen=True, eq=False)
class Predictions:
    """One model's answers on N test images of K classes."""

    labels: NDArray[np.int64]
    """(N,) true classes, 0 to K - 1."""
    probabilities: NDArray[np.float64]
    """(N, K), rows adding up to 1."""

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """(N,) the class of (first) largest probability."""
        return self.probabilities.argmax(axis=1)

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """(N,) whether that is the true one."""
        return self.predicted == self.labels

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """(K, K) images; rows are the true classes, columns the predicted ones."""
        indices = np.arange(self.probabilities.shape[1])
        return confusion_matrix(self.labels, self.predicted, labels=indices).astype(np.int64)

    @cached_property
    def mistakes(self) -> NDArray[np.int64]:
        """(M,) rows of the images that are wrong, the most confident answers first."""
        wrong = np.flatnonzero(~self.correct)
        return wrong[np.argsort(-self.probabilities[wrong, self.predicted[wrong]], kind="stable")]


class Margins(NamedTuple):
    """R confusion matrices, resampled, by their diagonals and sums."""

    hits: NDArray[np.int64]
    """(R, K) images of a class that were predicted as it."""
    truths: NDArray[np.int64]
    """(R, K) images of a class."""
    predicted: NDArray[np.int64]
    """(R, K) images that were predicted as a class."""

    def macro(self, numerator: NDArray[np.int64], denominator: NDArray[np.int64]) -> NDArray[np.float64]:
        """(R,) mean of a quotient over the classes that have images; 0 where its denominator is 0."""
        scores = np.divide(numerator, denominator, out=np.zeros(self.hits.shape), where=denominator > 0)
        present = self.truths > 0
        means: NDArray[np.float64] = np.where(present, scores, 0.0).sum(axis=1) / present.sum(axis=1)
        return means


def macro_average(score: Callable[..., float]) -> Callable[[Predictions], float]:
    """The mean of one of scikit-learn's scores over the classes that have test images."""

    def compute(predictions: Predictions) -> float:
        labels = predictions.labels
        # zero_division=0: a class that is never predicted has found none of its images; a note says so.
        return float(score(labels, predictions.predicted, labels=np.unique(labels), average="macro", zero_division=0))

    return compute


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric of the registry."""

    name: str
    """MLflow's is `test/<name>`; the CSV's column is called by it."""
    title: str | None
    """Heading of its column in the table; `None`: it has none."""
    compute: Callable[[Predictions], float]
    is_share: bool = True
    """Whether it is from 0 to 1 and shown in per cent."""
    resample: Callable[[Margins], NDArray[np.float64]] | None = None
    """(R,) the metric of R resampled confusion matrices: it gets a bootstrap interval by it. `None`: it has none."""
