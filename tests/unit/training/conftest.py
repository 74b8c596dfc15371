"""A data set of a hundred tiny images, and stand-ins for what is outside of training."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpipe.config import LinearSettings, ModelConfig, NetworkSettings
from mlpipe.data.dataset import Dataset
from mlpipe.models import registry
from mlpipe.models.architectures import find
from mlpipe.models.weights import InitialNetwork
from mlpipe.training.network import train_network
from mlpipe.training.protocol import TrainedModel

CLASSES = ("bars", "columns", "dots")


def draw(num_images: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy stripes and dots, `(N, size, size, 3)` uint8, with their labels."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(num_images) % len(CLASSES)).astype(np.int64)
    rows, columns = np.mgrid[:size, :size]
    patterns = np.stack([rows % 4 < 2, columns % 4 < 2, (rows + columns) % 2 == 0])
    noise = rng.integers(0, 60, (num_images, size, size, 3))
    return (patterns[labels][..., None] * 180 + noise).astype(np.uint8), labels


def tiny_dataset(num_train: int = 96, num_val: int = 30, size: int = 16) -> Dataset:
    """It has no test split: training must not read that."""
    return Dataset.in_memory(CLASSES, draw(num_train, size, seed=1), draw(num_val, size, seed=2))


class RecordingLogger:
    """Keeps what is logged, across tries; can fail in place of writing the metrics of one epoch."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.metrics: list[dict[str, float]] = []
        self.params: dict[str, Any] = {}
        self.fail_at: int | None = None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if step == self.fail_at and "val/accuracy" in metrics:
            raise ConnectionError("MLflow is away")
        self.steps.append(step)
        self.metrics.append(dict(metrics))

    def log_params(self, params: Mapping[str, Any]) -> None:
        self.params |= params

    def ensure_current(self) -> None:
        pass

    def last_logged_step(self, metric: str) -> int:
        return max((step for step, row in zip(self.steps, self.metrics, strict=True) if metric in row), default=0)


class FolderStore:
    """As `mlpipe.data.storage.store.ObjectStore`, in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> Path:
        return self.root / key

    def exists(self, key: str) -> bool:
        return self.path(key).exists()

    def put_file(self, key: str, path: Path, sha256: str | None = None) -> None:  # noqa: ARG002
        self.path(key).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, self.path(key))

    def get_file(self, key: str, path: Path) -> None:
        shutil.copy(self.path(key), path)

    def put_bytes(self, key: str, content: bytes) -> None:
        self.path(key).parent.mkdir(parents=True, exist_ok=True)
        self.path(key).write_bytes(content)

    def get_bytes(self, key: str) -> bytes:
        return self.path(key).read_bytes()

    def delete(self, key: str) -> None:
        self.path(key).unlink()


def make_config(architecture: str = "custom_cnn", **train: Any) -> ModelConfig:
    """Two quick epochs, unless told otherwise."""
    defaults = {
        "network": NetworkSettings(num_epochs=2, batch_size=32, seed=0),
        "estimator": LinearSettings(seed=0),
    }
    settings = replace(defaults[find(architecture).kind], **train)
    return ModelConfig(architecture=architecture, weights="random", name=architecture, train=settings)


def run_training(model: ModelConfig, dataset: Dataset, tracking: RecordingLogger, **options: Any) -> TrainedModel:
    """Train from random weights."""
    network = options.pop("network", None) or registry.build_network(
        model.architecture,
        num_classes=len(CLASSES),
        image_size=dataset.manifest.image_size,
        seed=model.train.seed,
        variant=model.variant,
    )
    start = InitialNetwork(network=network, description=registry.describe(model, dataset.manifest))
    return train_network(model, dataset, tracking, start=start, **options)


@pytest.fixture
def new_dataset() -> Callable[..., Dataset]:
    return tiny_dataset


@pytest.fixture
def dataset() -> Dataset:
    return tiny_dataset()


@pytest.fixture
def tracking() -> RecordingLogger:
    return RecordingLogger()


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def config() -> Callable[..., ModelConfig]:
    return make_config


@pytest.fixture
def train() -> Callable[..., TrainedModel]:
    return run_training
