"""Probabilities that mean what they say: fitted on the validation images, without changing any answer.

Sources: a temperature after C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017; a share of the
uniform distribution beside it after J. Zhang, B. Kailkhura and T. Han, "Mix-n-Match", ICML 2020.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp

from mlpipe.data.dataset import Split
from mlpipe.models.portable import SMALLEST
from mlpipe.training.protocol import TrainedModel

logger = logging.getLogger(__name__)

TEMPERATURES = (0.1, 10.0)
SHARES = (0.0, 0.5)
MIN_MISTAKES = 20
"""Wrong validation images from which on it is fitted; fewer say too little of how sure a model may be."""


def with_calibration(trained: TrainedModel, validation: Split) -> TrainedModel:
    """The model, calibrated so that its validation images have the lowest log loss.

    It stays as it is where too few of them are wrong.
    """
    probabilities = trained.probabilities_of(validation)
    mistakes = int((probabilities.argmax(axis=1) != validation.labels).sum())
    if mistakes < MIN_MISTAKES:
        logger.info("%d wrong validation images are too few to calibrate the probabilities", mistakes)
        return trained
    temperature, share = fit_calibration(probabilities, validation.labels)
    logger.info(
        "the probabilities are calibrated by a temperature of %.3f and a share of %.3f of the uniform distribution",
        temperature, share,
    )  # fmt: skip
    return replace(trained, description=replace(trained.description, temperature=temperature, uniform_share=share))


def fit_calibration(probabilities: NDArray[np.floating], labels: NDArray[np.int64]) -> tuple[float, float]:
    """The temperature, 0.1 to 10, and the uniform share, 0 to 0.5, of lowest log loss on (N, K) probabilities."""
    logs = np.log(np.maximum(probabilities, SMALLEST, dtype=np.float64))
    rows, num_classes = np.arange(len(labels)), logs.shape[1]

    def log_loss(values: NDArray[np.float64]) -> float:
        log_temperature, share = values
        scaled = logs / np.exp(log_temperature)
        of_label = np.exp(scaled[rows, labels] - logsumexp(scaled, axis=1))
        return -float(np.mean(np.log(np.maximum((1 - share) * of_label + share / num_classes, SMALLEST))))

    bounds = [tuple(np.log(TEMPERATURES)), SHARES]
    found = minimize(log_loss, x0=(0.0, 0.01), bounds=bounds, method="L-BFGS-B")
    return round(float(np.exp(found.x[0])), 4), round(float(found.x[1]), 4)
