"""A published data set on this machine, memory-mapped."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from mlpipe.data.manifest import Manifest, load_manifest
from mlpipe.data.storage.store import ObjectStore
from mlpipe.errors import UserError

logger = logging.getLogger(__name__)


class ImageRows:
    """Some rows of a memory-mapped array of images, read when they are asked for."""

    dtype = np.dtype(np.uint8)

    def __init__(self, stored_u8: NDArray[np.uint8], indices: NDArray[np.int64] | None = None) -> None:
        """
        Args:
            stored_u8: (M, H, W, 3)
            indices: (N,) rows of `stored_u8`; `None`: all.
        """
        self._stored_u8 = stored_u8
        self._indices = indices
        self.shape: tuple[int, ...] = (len(stored_u8) if indices is None else len(indices), *stored_u8.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> NDArray[np.uint8]:
        """Images of an index, a slice or an array of indices, as a fresh array."""
        if self._indices is None:
            return np.array(self._stored_u8[rows])
        return self.take(rows)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All of them, in memory."""
        return self[:].astype(dtype or self.dtype, copy=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process on this machine opens the file itself; arrays in memory are copied."""
        stored = self._stored_u8
        if isinstance(stored, np.memmap):
            return _map_rows, (str(stored.filename), stored.shape, self._indices)
        return ImageRows, (stored, self._indices)

    def slices(self, max_bytes: int) -> Iterator[slice]:
        """All rows in order, in slices of at most `max_bytes` of pixels, but at least one image."""
        length = max(1, max_bytes // math.prod(self.shape[1:]))
        return (slice(start, start + length) for start in range(0, len(self), length))

    def select(self, rows: NDArray[np.int64]) -> ImageRows:
        """Only these rows; nothing is read."""
        return ImageRows(self._stored_u8, rows if self._indices is None else self._indices[rows])

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(len(rows), H, W, 3): faster than indexing by an array."""
        return np.take(self._stored_u8, rows if self._indices is None else self._indices[rows], axis=0)


def _map_rows(path: str, shape: tuple[int, ...], indices: NDArray[np.int64] | None) -> ImageRows:
    stored_u8 = np.load(path, mmap_mode="r", allow_pickle=False)
    if stored_u8.shape != shape:
        raise ValueError(f"{path} holds {stored_u8.shape}, not {shape}")
    return ImageRows(stored_u8, indices)


@dataclass(frozen=True)
class Split:
    """Images and labels for one purpose."""

    images_u8: ImageRows
    """(N, H, W, 3) RGB"""
    labels: NDArray[np.int64]
    """(N,)"""

    @classmethod
    def of(cls, images_u8: NDArray[np.uint8], labels: NDArray[np.int64]) -> Split:
        """A split of arrays in memory."""
        return cls(ImageRows(images_u8), labels)

    def select(self, rows: NDArray[np.int64]) -> Split:
        """The images of these rows; none is read yet."""
        return Split(self.images_u8.select(rows), self.labels[rows])

    def __len__(self) -> int:
        return len(self.labels)


class Dataset:
    """A data set: its manifest, and its arrays, each opened when a split first needs it."""

    def __init__(self, manifest: Manifest, open_array: Callable[[str], NDArray[Any]]) -> None:
        """
        Args:
            open_array: from the name of a file of the manifest to its array.
        """
        self.manifest = manifest
        self._open = open_array

    @classmethod
    def in_memory(
        cls,
        classes: tuple[str, ...],
        train: tuple[NDArray[np.uint8], NDArray[np.int64]],
        val: tuple[NDArray[np.uint8], NDArray[np.int64]],
        *,
        name: str = "images",
    ) -> Self:
        """A data set without a test split, for what trains on arrays at hand.

        Args:
            train: images (N, S, S, 3) and labels (N,).
            val: likewise.
        """
        images_u8 = np.concatenate([train[0], val[0]])
        labels = np.concatenate([train[1], val[1]])
        is_train = np.arange(len(labels)) < len(train[1])
        pixels = train[0].reshape(-1, 3)
        std = pixels.std(axis=0).clip(min=1)  # networks divide by it, and a channel may be constant
        (r, g, b), (sr, sg, sb) = ((each / 255).tolist() for each in (pixels.mean(axis=0), std))
        digest = hashlib.sha256(images_u8.tobytes() + labels.tobytes()).hexdigest()[:32]
        manifest = Manifest(
            dataset=name,
            digest=digest,
            image_size=images_u8.shape[1],
            classes=classes,
            num_train=len(train[1]),
            num_val=len(val[1]),
            num_test=0,
            class_counts={
                part: tuple(np.bincount(chosen, minlength=len(classes)).tolist())
                for part, chosen in (("train", train[1]), ("val", val[1]), ("test", labels[:0]))
            },
            channel_mean=(r, g, b),
            channel_std=(sr, sg, sb),
            files={},
            source_sha256="",
            notes=(),
        )
        arrays = {
            "train_images.npy": images_u8,
            "train_labels.npy": labels,
            "train_groups.npy": np.arange(len(labels)),
            "train_indices.npy": np.flatnonzero(is_train),
            "val_indices.npy": np.flatnonzero(~is_train),
        }
        return cls(manifest, arrays.__getitem__)

    def train_split(self) -> Split:
        """What models are trained on."""
        return self._part("train", "train_indices.npy")

    def val_split(self) -> Split:
        """What checkpoints and settings are chosen by."""
        return self._part("train", "val_indices.npy")

    def test_split(self) -> Split:
        """For evaluation alone."""
        return self._part("test", "test_indices.npy")

    def folds(self, num_folds: int, seed: int) -> Iterator[tuple[Dataset, Split]]:
        """For cross-validation: each part of the training and validation images once held out.

        Parts have about the same shares of the classes, and images that show the same are in one part. The data set
        that comes with each has the other parts' images, a tenth of them for validation, and no test images.

        Raises:
            UserError: a class has fewer different images than there are parts.
        """
        from sklearn.model_selection import StratifiedGroupKFold, train_test_split

        fewest = self.check_folds(num_folds)
        rows = np.sort(np.concatenate([self._open("train_indices.npy"), self._open("val_indices.npy")]))
        all_labels = self._open("train_labels.npy")
        labels = all_labels[rows]
        images_u8 = self._open("train_images.npy")
        groups = self._open("train_groups.npy")[rows]
        parts = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed).split(rows, labels, groups)
        for number, (others, held_out) in enumerate(parts):
            if fewest >= 2 * 10:
                chosen = train_test_split(others, test_size=0.1, stratify=labels[others], random_state=seed)
            else:  # an image of each class stays, for a class that is not trained on has no probability
                first = np.unique(labels[others], return_index=True)[1]
                rest, val = train_test_split(np.delete(others, first), test_size=0.1, random_state=seed)
                chosen = np.concatenate([others[first], rest]), val
            arrays = {
                "train_images.npy": images_u8,
                "train_labels.npy": all_labels,
                "train_indices.npy": rows[np.sort(chosen[0])],
                "val_indices.npy": rows[np.sort(chosen[1])],
            }
            counts = [np.bincount(labels[each], minlength=len(self.manifest.classes)).tolist() for each in chosen]
            manifest = replace(
                self.manifest,
                digest=f"{self.manifest.digest}-{number}-of-{num_folds}-seed-{seed}",
                num_train=len(chosen[0]),
                num_val=len(chosen[1]),
                class_counts={**self.manifest.class_counts, "train": tuple(counts[0]), "val": tuple(counts[1])},
            )
            yield Dataset(manifest, arrays.__getitem__), Split(ImageRows(images_u8, rows[held_out]), labels[held_out])

    def check_folds(self, num_folds: int) -> int:
        """How many different training and validation images the smallest class has.

        Raises:
            UserError: there are fewer of them than parts.
        """
        rows = np.concatenate([self._open("train_indices.npy"), self._open("val_indices.npy")])
        labels, groups = self._open("train_labels.npy")[rows], self._open("train_groups.npy")[rows]
        different = np.unique(np.stack([labels, groups]), axis=1)[0]
        fewest = int(np.bincount(different, minlength=len(self.manifest.classes)).min())
        if fewest < num_folds:
            raise UserError(
                f"folds: {num_folds} is not allowed; the smallest class has {fewest} different images to train on"
            )
        return fewest

    def test_hashes(self) -> NDArray[np.uint64]:
        """(N,) hashes of the test images' files, by which an image is known in other data sets."""
        return self._open("test_hashes.npy")[self._open("test_indices.npy")]

    def test_names(self) -> list[str]:
        """Of the test images' files, in the order of the test split."""
        names = self._open("test_names.npy")[self._open("test_indices.npy")]
        return [bytes(name).decode(errors="replace") for name in names]

    def trained_on_hashes(self) -> NDArray[np.uint64]:
        """(N,) those of all images that a model of this data set has seen: training and validation images."""
        seen = np.concatenate([self._open("train_indices.npy"), self._open("val_indices.npy")])
        return self._open("train_hashes.npy")[seen]

    def _part(self, array: str, indices_name: str) -> Split:
        indices = np.array(self._open(indices_name))
        return Split(ImageRows(self._open(f"{array}_images.npy"), indices), self._open(f"{array}_labels.npy")[indices])


def open_dataset(digest: str, store: ObjectStore, cache_dir: Path) -> Dataset:
    """Open a published data set; its arrays are copied to `cache_dir` once, checked by their hashes, and mapped.

    Raises:
        FileNotFoundError: it is not published.
    """
    manifest, folder = load_manifest(digest, store), cache_dir / "datasets" / digest

    def open_array(name: str) -> NDArray[Any]:
        path, num_bytes = folder / name, manifest.files[name].bytes
        if not _is_there(path, num_bytes):
            folder.mkdir(parents=True, exist_ok=True)
            # Several trainings on one machine ask for the same file at the same time: one of them downloads it.
            with FileLock(f"{path}.lock"):
                if not _is_there(path, num_bytes):
                    logger.info("downloading %s of data set %s", name, digest)
                    store.get_file(manifest.key(name), path, manifest.files[name].sha256)
        return map_array(path)

    return Dataset(manifest, open_array)


def map_array(path: Path) -> NDArray[Any]:
    """An array on disk, read-only: a writable private mapping is refused where memory could not hold all of it."""
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _is_there(path: Path, num_bytes: int) -> bool:
    """A file gets its name after its hash was checked; the length shows one that was cut off since."""
    try:
        return path.stat().st_size == num_bytes
    except FileNotFoundError:
        return False
