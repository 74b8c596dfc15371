"""Data sets as inputs of MLflow runs."""

from __future__ import annotations

import mlflow
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset

from mlpipe.data.manifest import Manifest


def log_input(manifest: Manifest, uri: str, context: str) -> None:
    """Name the data set as an input of the active run. Its digest covers every byte of it.

    `mlflow.data.from_numpy` would hash the first 10,000 numbers, which are three images.
    """
    source = resolve_dataset_source(uri)
    dataset = MetaDataset(source, name=manifest.dataset, digest=manifest.digest)  # type: ignore[abstract]  # MLflow's own
    mlflow.log_input(dataset, context=context)
