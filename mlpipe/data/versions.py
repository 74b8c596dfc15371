"""Versions of a named data set: the digests that were published under its name, in order, and what each one changed."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlpipe.data.dataset import Dataset, open_dataset
from mlpipe.data.store import ObjectStore


@dataclass(frozen=True, kw_only=True)
class DatasetVersion:
    """One version of a named data set."""

    name: str
    number: int
    """From 1."""
    change: str | None
    """How it differs from the version before, in a sentence; `None`: there is none, or its images are gone."""


def record_version(dataset: Dataset, store: ObjectStore, cache_dir: Path) -> DatasetVersion:
    """Add a data set to the versions of its name, unless it is one of them; compare it with the version before."""
    manifest = dataset.manifest
    digests = _digests(manifest.dataset, store)
    if manifest.digest not in digests:
        digests.append(manifest.digest)
        store.put_bytes(_key(manifest.dataset), json.dumps(digests).encode())
    number = digests.index(manifest.digest) + 1
    change = None
    if number > 1:
        with contextlib.suppress(FileNotFoundError):
            change = _change(open_dataset(digests[number - 2], store, cache_dir), dataset, number)
    return DatasetVersion(name=manifest.dataset, number=number, change=change)


def _change(before: Dataset, after: Dataset, number: int) -> str:
    old, new = (np.concatenate([each.trained_on_hashes(), each.test_hashes()]) for each in (before, after))
    added, removed = len(np.setdiff1d(new, old)), len(np.setdiff1d(old, new))
    moved = len(np.intersect1d(before.trained_on_hashes(), after.test_hashes()))
    text = f"Version {number}: {added:,} images added, {removed:,} removed since version {number - 1}"
    return f"{text}; {moved:,} training or validation images became test images" if moved else text


def _digests(name: str, store: ObjectStore) -> list[str]:
    try:
        return list(json.loads(store.get_bytes(_key(name))))
    except FileNotFoundError:
        return []


def _key(name: str) -> str:
    return f"names/{name}.json"
