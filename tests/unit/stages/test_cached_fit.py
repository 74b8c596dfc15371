"""What was fitted is not fitted again, whatever stopped the task afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpipe.config import DataConfig, LinearSettings, ModelConfig
from mlpipe.data.dataset import Dataset, open_dataset
from mlpipe.data.prepare import prepare_dataset
from mlpipe.data.sources.fetch import fetch_source
from mlpipe.data.storage.store import ObjectStore
from mlpipe.models.registry import describe
from mlpipe.training import cached_fit as kept_fit
from mlpipe.training.cached_fit import fit_once
from mlpipe.training.checkpoints import CheckpointStore
from mlpipe.training.protocol import TrainedModel


class Tracking:
    """Where metrics go; away at first, if so asked."""

    def __init__(self, *, away: bool = False) -> None:
        self.away = away
        self.metrics: dict[tuple[str, int], float] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if self.away:
            raise ConnectionError("away")
        self.metrics |= {(name, step): value for name, value in metrics.items()}

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nothing is looked at here."""

    def ensure_current(self) -> None:
        pass

    def last_logged_step(self, metric: str) -> int:  # noqa: ARG002
        return 0


def fit(model: ModelConfig, dataset: Dataset, tracking: Tracking, checkpoints: CheckpointStore) -> TrainedModel:
    return fit_once(model, describe(model, dataset.manifest), dataset, tracking, checkpoints)


@pytest.fixture
def digits(store: ObjectStore, tmp_path: Path) -> Dataset:
    config = DataConfig(dataset="digits", image_size=8)
    return open_dataset(prepare_dataset(config, fetch_source(config, store), store).digest, store, tmp_path)


def test_a_fit_outlives_the_loss_of_mlflow(
    digits: Dataset, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(
        architecture="logistic_regression", weights="none", name="logistic_regression", train=LinearSettings()
    )
    checkpoints = CheckpointStore(store, "run")
    with pytest.raises(ConnectionError):
        fit(model, digits, Tracking(away=True), checkpoints)

    estimator = kept_fit.train_estimator
    monkeypatch.setattr(kept_fit, "train_estimator", None)
    tracking = Tracking()
    again = fit(model, digits, tracking, checkpoints)

    monkeypatch.setattr(kept_fit, "train_estimator", estimator)
    other = replace(model, train=LinearSettings(max_iterations=1))
    fresh = fit(model, digits, direct := Tracking(), CheckpointStore(store, "another run"))
    images = digits.val_split().images_u8[:20]
    np.testing.assert_array_equal(again.probabilities(images), fresh.probabilities(images))
    assert again.description == fresh.description
    assert again.metrics == fresh.metrics
    timing = ("images_per_second", 1)
    assert {**tracking.metrics, timing: 0} == {**direct.metrics, timing: 0}
    assert ("val/accuracy", 1) in tracking.metrics
    # Kept for the same settings alone.
    assert fit(other, digits, Tracking(), checkpoints).metrics != again.metrics
