"""A small trained-looking model, an MLflow store, and an object store in a folder."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from mlpipe.models import registry
from mlpipe.models.portable import ModelDescription
from tests.unit.training.conftest import FolderStore

CLASSES = ("cat", "dog", "größe 3")


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def description() -> ModelDescription:
    return ModelDescription(
        kind="network",
        architecture="custom_cnn",
        classes=CLASSES,
        image_size=32,
        channel_mean=(0.5, 0.4, 0.3),
        channel_std=(0.2, 0.3, 0.25),
        code="mlpipe.models.networks.custom_cnn:build",
        outline="meta",
    )


@pytest.fixture
def network() -> torch.nn.Module:
    return registry.build_network("custom_cnn", num_classes=3, image_size=32, seed=0).eval()


@pytest.fixture
def images_u8() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An experiment in a store of its own."""
    folder = tmp_path_factory.mktemp("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_registry_uri(f"sqlite:///{folder}/mlflow.db")
    with contextlib.chdir(folder):  # MLflow makes a folder ./mlruns, whether it is used or not
        yield mlflow.create_experiment("models", artifact_location=(folder / "artifacts").as_uri())
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri("")  # follows the tracking URI again; what was read before would pin it


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
