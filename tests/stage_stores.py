"""Stores of their own for tests that call the workflow's stages one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest

from mlpipe.data.storage.store import ObjectStore


@contextmanager
def stage_stores(folder: Path, bucket: str) -> Iterator[ObjectStore]:
    """Point the stages at a bucket of the running object store and at an MLflow store in `folder`."""
    store = ObjectStore(bucket)
    store.create_bucket()
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # MLflow's default artifact folder is relative
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("MLPIPE_S3_BUCKET", bucket)
        patch.setenv("MLPIPE_CACHE_DIR", str(folder / "cache"))
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri("")
        yield store
    mlflow.set_tracking_uri(before)
    mlflow.set_registry_uri("")
