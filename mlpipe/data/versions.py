"""Versions of a named data set: the digests that were published under its name, in order, and what each one changed."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlpipe.data.dataset import Dataset, open_dataset
from mlpipe.data.manifest import Manifest, load_manifest
from mlpipe.data.splits import listed
from mlpipe.data.storage.store import ObjectStore
from mlpipe.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DatasetVersion:
    """One version of a named data set."""

    name: str
    number: int
    """From 1."""
    change: str | None
    """How it differs from the version before, in a sentence; `None`: there is none, or its images are gone."""


def record_version(dataset: Dataset, store: ObjectStore, cache_dir: Path) -> DatasetVersion:
    """Add a data set to the versions of its name, unless it is one of them; compare it with the version before.

    Raises:
        UserError: the versions before have other classes.
    """
    manifest = dataset.manifest
    digests = _digests(manifest.dataset, store)
    if manifest.digest not in digests:
        if digests:
            with contextlib.suppress(FileNotFoundError):
                _check_classes(load_manifest(digests[-1], store), manifest)
        digests.append(manifest.digest)
        store.put_bytes(_key(manifest.dataset), json.dumps(digests).encode())
    number = digests.index(manifest.digest) + 1
    change = None
    if number > 1:
        with contextlib.suppress(FileNotFoundError):
            change = _change(open_dataset(digests[number - 2], store, cache_dir), dataset, number)
    return DatasetVersion(name=manifest.dataset, number=number, change=change)


def _check_classes(before: Manifest, after: Manifest) -> None:
    old, new = set(before.classes), set(after.classes)
    if old == new:
        return
    parts = [
        f"{what} {listed([*map(repr, sorted(names))], 5)}"
        for what, names in (("adds", new - old), ("lacks", old - new))
        if names
    ]
    raise UserError(
        f"name: {after.dataset!r} already names images of {len(old)} classes, and this data set {' and '.join(parts)}; "
        "give it another name (--name), so that it has a champion of its own"
    )


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
