"""Which images a registered model was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from mlpipe.data.dataset import open_dataset
from mlpipe.data.storage.store import ObjectStore
from mlpipe.tracking import registry
from mlpipe.tracking.runs import is_unreachable


def seen_by(uri: str, store: ObjectStore, cache_dir: Path) -> NDArray[np.uint64] | None:
    """(N,) hashes of the files of its training and validation images; `None`: they are not known.

    Args:
        uri: `models:/<name>/<version>`, `models:/<name>@<alias>` or `models:/m-<id>`.
    """
    try:
        digest = _tags(uri.removeprefix("models:/")).get("data_digest")
        return open_dataset(digest, store, cache_dir).trained_on_hashes() if digest else None
    except (FileNotFoundError, KeyError, TypeError):
        return None
    except MlflowException as error:
        if is_unreachable(error):
            raise
        return None


def _tags(address: str) -> Mapping[str, str]:
    if address.startswith("m-"):
        return dict(mlflow.MlflowClient().get_logged_model(address).tags)
    name, at, alias = address.partition("@")
    if at:
        bearer = registry.by_alias(name, alias)
        return bearer.tags if bearer else {}
    name, _, version = address.rpartition("/")
    return registry.by_version(name, version).tags
