"""Fitting a scikit-learn estimator."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.pipeline import Pipeline
from torch import Tensor

from mlpipe.config import LinearSettings, ModelConfig
from mlpipe.data.dataset import Dataset, Split
from mlpipe.errors import UserError
from mlpipe.models import architectures
from mlpipe.models.portable import ModelDescription, load_function, resize
from mlpipe.training.cpu.processor import cpu_name
from mlpipe.training.protocol import TrainedModel, TrainingLogger

logger = logging.getLogger(__name__)

MAX_FITTED = 100_000
"""Training images, mirror images counted, that an estimator is fitted to: with 3,072 features 1.2 GB, and as much again
while it is fitted."""

BYTES_PER_READ = 3 << 20


def train_estimator(
    model: ModelConfig, description: ModelDescription, dataset: Dataset, tracking: TrainingLogger
) -> TrainedModel:
    """Fit on the training split and measure on the validation split; the test split is not touched.

    Args:
        description: as `mlpipe.models.registry.describe` gives it.

    Raises:
        UserError: the architecture is no estimator.
    """
    entry, settings = architectures.find(model.architecture), model.train
    if entry.kind != "estimator" or not isinstance(settings, LinearSettings):
        raise UserError(f"models: {model.architecture!r} is not an estimator; it is trained as a network")
    make_features = load_function(entry.features)
    image_size = description.image_size
    mirrored = settings.augmentation == "flip"
    training = _sample(dataset.train_split(), MAX_FITTED // (2 if mirrored else 1), settings.seed)
    features, labels = _features(training, make_features, image_size, mirrored=mirrored)
    build = load_function(entry.builder)
    estimator: Pipeline = build(settings, num_images=len(features), num_features=features.shape[1])
    tracking.log_params({"device": cpu_name(), "threads": torch.get_num_threads()})
    logger.info("fitting %s to %d images of %d features", model.architecture, *features.shape)
    started = time.monotonic()
    converged = _fit(estimator, features, labels)
    seconds = time.monotonic() - started
    metrics = {
        **measure("train", estimator, features, labels),
        **measure("val", estimator, *_features(dataset.val_split(), make_features, image_size)),
    }
    iterations = int(np.max(getattr(estimator[-1], "n_iter_", 0)))
    if not converged:
        logger.info("the solver stopped at its limit of %d iterations, before it converged", iterations)
    rate = len(features) / seconds
    tracking.log_metrics(
        {**metrics, "images_per_second": rate, "iterations": iterations, "converged": float(converged)}, step=1
    )
    logger.info(
        "fitted in %.1f s: train/accuracy %.4f, val/loss %.4f, val/accuracy %.4f, %.0f images/s",
        seconds, metrics["train/accuracy"], metrics["val/loss"], metrics["val/accuracy"], rate,
    )  # fmt: skip
    return TrainedModel(
        description=description,
        predictor=estimator,
        metrics={name: metrics[name] for name in ("val/accuracy", "val/loss")},
        train_seconds=seconds,
        images_per_second=rate,
        epochs_run=1,
        best_epoch=1,
    )


def _sample(split: Split, count: int, seed: int) -> Split:
    """About `count` images, of each class the same share and at least one; the very same split if it has no more."""
    if len(split) <= count:
        return split
    shuffled = np.random.default_rng(seed).permutation(len(split))
    by_class = [shuffled[split.labels[shuffled] == label] for label in np.unique(split.labels)]
    rows = np.concatenate([each[: max(1, len(each) * count // len(split))] for each in by_class])
    logger.info("fitting to %d of %d training images, of each class the same share", len(rows), len(split))
    return split.select(np.sort(rows))


def _features(
    split: Split, make_features: Callable[[Tensor], NDArray[np.float32]], image_size: int, *, mirrored: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(N, D) float32 features and (N,) labels; made piece by piece, the images may not fit in memory.

    Args:
        mirrored: followed by those of the mirror images, (2·N, D) and (2·N,).
    """
    num_images, sides = len(split.labels), (1, 2)[mirrored]
    features = np.empty((0, 0), np.float32)
    for part in split.images_u8.slices(BYTES_PER_READ):
        images = torch.from_numpy(split.images_u8[part])
        images = resize(images, image_size)
        for side in range(sides):
            piece = make_features(images.flip(2) if side else images)
            if not len(features):
                features = np.empty((sides * num_images, piece.shape[1]), np.float32)
            first = side * num_images + part.start
            features[first : first + len(piece)] = piece
    return features, np.tile(np.asarray(split.labels), sides)


def _fit(estimator: Pipeline, features: NDArray[np.float32], labels: NDArray[np.int64]) -> bool:
    """Fit; whether the solver converged."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimator.fit(features, labels)
    for warning in caught:
        if not issubclass(warning.category, ConvergenceWarning):
            logger.warning("%s", warning.message)
    return not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def measure(
    part: str, estimator: Pipeline | LogisticRegression, features: NDArray[np.float32], labels: NDArray[np.int64]
) -> dict[str, float]:
    """Loss and accuracy of a fitted classifier, named by the part of the data set."""
    probabilities = estimator.predict_proba(features)
    return {
        f"{part}/loss": float(log_loss(labels, probabilities, labels=estimator.classes_)),
        f"{part}/accuracy": float(accuracy_score(labels, estimator.classes_[probabilities.argmax(axis=1)])),
    }
