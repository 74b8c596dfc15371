"""Which images a registered model was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from mlpipe.data.dataset import open_dataset
from mlpipe.data.storage.store import ObjectStore
from mlpipe.tracking import registry
from mlpipe.tracking.runs import is_unreachable

ANCESTORS = "ancestor_data"
"""Tag of a version: digests of the data sets on which what it started or learned from was trained."""


def seen_by(uri: str, store: ObjectStore, cache_dir: Path) -> NDArray[np.uint64] | None:
    """(N,) hashes of the files of its training and validation images; `None`: they are not known.

    Those of the models that it started or learned from are among them.

    Args:
        uri: `models:/<name>/<version>`, `models:/<name>@<alias>` or `models:/m-<id>`.
    """
    try:
        digests = data_of([uri])
        return images_of(digests, store, cache_dir) if digests else None
    except (FileNotFoundError, KeyError, TypeError):
        return None
    except MlflowException as error:
        if is_unreachable(error):
            raise
        return None


def data_of(addresses: Iterable[str]) -> set[str]:
    """Digests of the data sets on which these models, and those that they started or learned from, were trained.

    Addresses of other kinds than `models:/…` have none that is known.
    """
    found: set[str] = set()
    for address in addresses:
        if address.startswith("models:/"):
            found |= _digests(address, "data_digest", ANCESTORS)
    return found


def ancestors_of(uri: str) -> set[str]:
    """Digests of the data sets on which those were trained from which a registered model started or learned."""
    return _digests(uri, ANCESTORS)


def images_of(digests: Iterable[str], store: ObjectStore, cache_dir: Path) -> NDArray[np.uint64]:
    """(N,) hashes of the training and validation images of data sets.

    Raises:
        FileNotFoundError: one of them is not published any more.
    """
    hashes = [open_dataset(digest, store, cache_dir).trained_on_hashes() for digest in sorted(digests)]
    return np.unique(np.concatenate([*hashes, np.empty(0, np.uint64)]))


def _digests(uri: str, *names: str) -> set[str]:
    """In these tags of a registered model."""
    _, tags = registry.model_at(uri)
    return {digest for name in names for digest in tags.get(name, "").split(",") if digest}
