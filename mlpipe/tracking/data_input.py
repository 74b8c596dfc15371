"""Data sets as inputs of MLflow runs and models."""

from __future__ import annotations

import json

import mlflow
import numpy as np
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.types import Schema, TensorSpec

from mlpipe.data.manifest import Manifest


class ImageDataset(MetaDataset):
    """A data set as MLflow shows it, with the shape of its arrays and its numbers of images."""

    def __init__(self, manifest: Manifest, uri: str) -> None:
        """
        Args:
            uri: where its arrays are.
        """
        size = manifest.image_size
        schema = Schema(
            [
                TensorSpec(np.dtype(np.uint8), (-1, size, size, 3), "images"),
                TensorSpec(np.dtype(np.int64), (-1,), "labels"),
            ]
        )
        super().__init__(resolve_dataset_source(uri), name=manifest.dataset, digest=manifest.digest)
        self._tensors = schema
        self._profile = {
            "num_train": manifest.num_train,
            "num_val": manifest.num_val,
            "num_test": manifest.num_test,
            "num_classes": len(manifest.classes),
        }

    @property
    def profile(self) -> dict[str, int]:
        """Numbers of images and classes."""
        return self._profile

    def to_dict(self) -> dict[str, str]:
        """As MLflow stores it."""
        schema = json.dumps({"mlflow_tensorspec": {"features": self._tensors.to_json()}})
        return super().to_dict() | {"schema": schema, "profile": json.dumps(self._profile)}


def log_input(manifest: Manifest, uri: str, context: str) -> None:
    """Name the data set as an input of the active run. Its digest covers every byte of it.

    `mlflow.data.from_numpy` would hash the first 10,000 numbers, which are three images.
    """
    mlflow.log_input(ImageDataset(manifest, uri), context=context)
