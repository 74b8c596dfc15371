"""Whether a model is right as often as its probabilities say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.calibration import calibration_curve

NUM_CALIBRATION_BINS = 15


@dataclass(frozen=True, eq=False)
class Calibration:
    """Confidences (the probability of the predicted class) in equal bins from 0 to 1; only bins that hold images."""

    counts: NDArray[np.int64]
    """Images in the bin, (B,)."""
    confidence: NDArray[np.float64]
    """Their mean confidence, (B,)."""
    accuracy: NDArray[np.float64]
    """The share of them that is right, (B,)."""

    @property
    def expected_error(self) -> float:
        """Mean of |accuracy - confidence| over the images (Guo et al. 2017, eq. 3: ECE)."""
        return float(np.average(np.abs(self.accuracy - self.confidence), weights=self.counts))


def calibrate(confidences: NDArray[np.float64], correct: NDArray[np.bool_]) -> Calibration:
    """Bin the confidences (N,) and compare them with what was right; the bins are scikit-learn's uniform ones."""
    confidences = np.clip(confidences, 0.0, 1.0)
    accuracy, confidence = calibration_curve(
        correct.astype(np.int64), confidences, n_bins=NUM_CALIBRATION_BINS, pos_label=1
    )
    inner_edges = np.linspace(0.0, 1.0, NUM_CALIBRATION_BINS + 1)[1:-1]
    counts = np.bincount(np.searchsorted(inner_edges, confidences), minlength=NUM_CALIBRATION_BINS)
    return Calibration(counts=counts[counts > 0].astype(np.int64), confidence=confidence, accuracy=accuracy)
