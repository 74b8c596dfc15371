"""Probabilities that mean what they say: a temperature, fitted on the validation images.

Source: C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from mlpipe.data.dataset import Split
from mlpipe.models.portable import SMALLEST
from mlpipe.training.protocol import TrainedModel

logger = logging.getLogger(__name__)

LOWEST, HIGHEST = 0.1, 10.0
MIN_MISTAKES = 20
"""Wrong validation images from which on a temperature is fitted; fewer say too little of how sure a model may be."""
BYTES_PER_CALL = 6 << 20


def with_temperature(trained: TrainedModel, validation: Split) -> TrainedModel:
    """The model with the temperature that gives its validation images the lowest log loss.

    It stays as it is where too few of them are wrong.
    """
    parts = validation.images_u8.slices(BYTES_PER_CALL)
    probabilities = np.concatenate([trained.probabilities(validation.images_u8[part]) for part in parts])
    mistakes = int((probabilities.argmax(axis=1) != validation.labels).sum())
    if mistakes < MIN_MISTAKES:
        logger.info("%d wrong validation images are too few to calibrate the probabilities", mistakes)
        return trained
    temperature = fit_temperature(probabilities, validation.labels)
    logger.info("the probabilities are calibrated by a temperature of %.3f", temperature)
    return replace(trained, description=replace(trained.description, temperature=temperature))


def fit_temperature(probabilities: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """What logarithms of probabilities (N, K) are to be divided by for the lowest log loss, from 0.1 to 10."""
    logs = np.log(np.maximum(probabilities, SMALLEST, dtype=np.float64))

    def log_loss(log_temperature: float) -> float:
        scaled = logs / np.exp(log_temperature)
        return float(np.mean(logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels]))

    found = minimize_scalar(log_loss, bounds=(np.log(LOWEST), np.log(HIGHEST)), method="bounded")
    return round(float(np.exp(found.x)), 4)
