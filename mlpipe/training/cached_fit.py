"""A fitted estimator, kept in the object store until its model is registered, as the epochs of a network are.

It is fitted in one piece; were MLflow away just then, a retry would fit it again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from mlpipe.config import ModelConfig
from mlpipe.data.dataset import Dataset
from mlpipe.models.portable import ModelDescription, import_skops
from mlpipe.training.checkpoints import CheckpointStore
from mlpipe.training.estimator import train_estimator
from mlpipe.training.protocol import TrainedModel, TrainingLogger

logger = logging.getLogger(__name__)


class _HeldBack:
    """Takes what a training logs, to be written when its result is safe."""

    def __init__(self) -> None:
        self.metrics: list[tuple[dict[str, float], int]] = []
        self.params: dict[str, Any] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.metrics.append((dict(metrics), step))

    def log_params(self, params: Mapping[str, Any]) -> None:
        self.params.update(params)

    def ensure_current(self) -> None:
        """Nothing is written yet."""

    def last_logged_step(self, metric: str) -> int:  # noqa: ARG002 - of the protocol
        return 0


def fit_once(
    model: ModelConfig,
    description: ModelDescription,
    dataset: Dataset,
    tracking: TrainingLogger,
    checkpoints: CheckpointStore,
) -> TrainedModel:
    """`train_estimator`, or its result of the attempt before; then write its metrics."""
    fingerprint = json.dumps([asdict(model), dataset.manifest.digest], sort_keys=True)
    kept = checkpoints.load()
    if kept is None or kept["fingerprint"] != fingerprint:
        held = _HeldBack()
        trained = train_estimator(model, description, dataset, held)
        tracking.ensure_current()
        kept = _packed(trained, held) | {"fingerprint": fingerprint}
        checkpoints.save(kept)
    else:
        logger.info("the fit of the attempt before is used")
        trained = _unpacked(kept, description)
    tracking.log_params(kept["params"])
    for metrics, step in kept["logged"]:
        tracking.log_metrics(metrics, step=step)
    return trained


def _packed(trained: TrainedModel, held: _HeldBack) -> dict[str, Any]:
    """Tensors and plain values, which are read back without unpickling code."""
    rest = {name: value for name, value in vars(trained).items() if name not in ("description", "predictor", "metrics")}
    return {
        "predictor": torch.from_numpy(np.frombuffer(import_skops().dumps(trained.predictor), np.uint8).copy()),
        "trained": {**rest, "metrics": dict(trained.metrics)},
        "logged": held.metrics,
        "params": held.params,
    }


def _unpacked(kept: Mapping[str, Any], description: ModelDescription) -> TrainedModel:
    return TrainedModel(
        description=description,
        predictor=import_skops().loads(kept["predictor"].numpy().tobytes()),
        **kept["trained"],
    )
