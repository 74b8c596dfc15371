from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from mlpipe.config import DataConfig
from mlpipe.data.dataset import Dataset, ImageRows, map_array, open_dataset
from mlpipe.data.manifest import Manifest
from mlpipe.data.prepare import prepare_dataset
from mlpipe.data.sources.fetch import fetch_source
from mlpipe.data.storage.npy import file_bytes, header
from mlpipe.data.storage.store import ObjectStore

DIGITS = DataConfig(dataset="digits", image_size=8)


@pytest.fixture
def manifest(store: ObjectStore) -> Manifest:
    return prepare_dataset(DIGITS, fetch_source(DIGITS, store), store)


def cached(cache: Path, manifest: Manifest) -> set[str]:
    return {path.name for path in (cache / "datasets" / manifest.digest).glob("*.npy")}


def test_training_fetches_no_test_images(manifest: Manifest, store: ObjectStore, tmp_path: Path) -> None:
    dataset = open_dataset(manifest.digest, store, tmp_path)
    dataset.train_split()
    dataset.val_split()
    assert cached(tmp_path, manifest) == {
        "train_images.npy",
        "train_labels.npy",
        "train_indices.npy",
        "val_indices.npy",
    }
    dataset.test_split()
    assert {"test_images.npy", "test_labels.npy"} < cached(tmp_path, manifest)


def test_second_opening_needs_only_the_manifest(manifest: Manifest, store: ObjectStore, tmp_path: Path) -> None:
    first = open_dataset(manifest.digest, store, tmp_path).train_split()
    for name in manifest.files:
        store.delete(manifest.key(name))
    second = open_dataset(manifest.digest, store, tmp_path).train_split()
    np.testing.assert_array_equal(first.images_u8[:], second.images_u8[:])


def test_cut_off_copy_is_fetched_again(manifest: Manifest, store: ObjectStore, tmp_path: Path) -> None:
    whole = open_dataset(manifest.digest, store, tmp_path).train_split().images_u8[:]
    path = tmp_path / "datasets" / manifest.digest / "train_images.npy"
    path.write_bytes(path.read_bytes()[:1000])
    np.testing.assert_array_equal(open_dataset(manifest.digest, store, tmp_path).train_split().images_u8[:], whole)


def test_images_that_would_not_fit_in_memory(tmp_path: Path) -> None:
    num_images = 4 * psutil.virtual_memory().total // (8 * 8 * 3)
    folder = tmp_path / "datasets" / "large"
    folder.mkdir(parents=True)
    for name, shape, dtype in (
        ("test_images.npy", (num_images, 8, 8, 3), np.uint8),
        ("test_labels.npy", (num_images,), np.int64),
    ):
        with (folder / name).open("wb") as file:  # sparse: it takes no room
            file.write(header(shape, dtype))
            file.truncate(file_bytes(shape, dtype) - 192)
            file.seek(0, 2)
            file.write(bytes(range(192)))
    np.save(folder / "test_indices.npy", np.array([0, 2, num_images - 1]))
    nothing = np.empty((0, 8, 8, 3), np.uint8), np.empty(0, np.int64)
    manifest = Dataset.in_memory(("a", "b"), nothing, nothing).manifest
    images = Dataset(manifest, lambda name: map_array(folder / name)).test_split().images_u8.take(np.array([0, 2]))
    assert images[0].max() == 0
    assert images[1].ravel().tolist() == list(range(192))


def test_damaged_object_is_not_used(manifest: Manifest, store: ObjectStore, tmp_path: Path) -> None:
    store.put_bytes(manifest.key("train_images.npy"), b"x" * manifest.files["train_images.npy"].bytes)
    with pytest.raises(OSError, match="damaged"):
        open_dataset(manifest.digest, store, tmp_path).train_split()
    assert "train_images.npy" not in cached(tmp_path, manifest)


def test_opened_by_several_at_once(manifest: Manifest, store: ObjectStore, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        splits = list(pool.map(lambda _: open_dataset(manifest.digest, store, tmp_path).test_split(), range(4)))
    assert all((split.images_u8[:] == splits[0].images_u8[:]).all() for split in splits)


def test_unknown_digest(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_dataset("0" * 32, store, tmp_path)


def test_arrays_are_mapped_and_not_written_to(manifest: Manifest, store: ObjectStore, tmp_path: Path) -> None:
    split = open_dataset(manifest.digest, store, tmp_path).test_split()
    assert isinstance(split.images_u8._stored_u8, np.memmap)
    before = split.images_u8[0].copy()
    split.images_u8[0][:] = 0  # a copy
    np.testing.assert_array_equal(split.images_u8[0], before)


@pytest.mark.parametrize("indices", [None, np.array([4, 2, 0])])
def test_rows(indices: np.ndarray | None) -> None:
    stored = np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)
    chosen = stored if indices is None else stored[indices]
    rows = ImageRows(stored, indices)
    assert rows.shape == chosen.shape
    assert len(rows) == len(chosen)
    for key in (0, -1, slice(None), slice(1, 3), np.array([2, 0])):
        np.testing.assert_array_equal(rows[key], chosen[key])
        assert not np.shares_memory(rows[key], stored)
    np.testing.assert_array_equal(rows.take(np.array([2, 0])), chosen[[2, 0]])
    np.testing.assert_array_equal(np.asarray(rows), chosen)
    assert np.asarray(rows, np.float32).dtype == np.float32
