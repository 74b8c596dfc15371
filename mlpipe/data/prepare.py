"""From a source to published arrays: decode, check, split, publish."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpipe.addresses import redact_uri
from mlpipe.config import DataConfig
from mlpipe.data import cifar10
from mlpipe.data.archive import open_archive
from mlpipe.data.imageset import ArchivedImages, ArrayImages, Decoded, ImageSet, Run
from mlpipe.data.layout import resolve_layout
from mlpipe.data.manifest import (
    TEST_FILES,
    TRAIN_FILES,
    Manifest,
    StoredFile,
    array_key,
    dataset_digest,
    load_manifest,
    manifest_key,
)
from mlpipe.data.npy import NpyWriter, file_bytes
from mlpipe.data.sources import SourceRef, check_classes, named_source, read_digits
from mlpipe.data.splits import Splits, plan_splits
from mlpipe.data.store import ObjectStore, Upload
from mlpipe.errors import UserError

logger = logging.getLogger(__name__)

MAX_BAD_IMAGES = 100
"""Unusable images after which decoding stops."""
PROGRESS_SECONDS = 10.0
"""Least time between two progress lines."""


def prepare_dataset(data: DataConfig, source: SourceRef, store: ObjectStore) -> Manifest:
    """Publish the source's images as uint8 arrays; nothing is done where they are published already.

    Images are decoded by as many threads as there are processors and sent to the store as they come: of all pixels a
    few runs are in memory, beside some hundred bytes for each image. The order of images is the source's. The manifest
    is written last.

    Raises:
        UserError: the source cannot be used; nothing is published then.
    """
    digest = dataset_digest(data, source.kind, source.sha256)
    known = _published(digest, store)
    if known is not None:
        logger.info("data set %s is published already", digest)
        return known
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mlpipe-") as name:
        folder = Path(name)
        store.get_file(source.key, folder / "source", source.sha256)
        with _opened(folder / "source", data, source) as images:
            manifest = _publish(_write(images, data, digest, source, store), store)
    for note in manifest.notes:
        logger.warning("%s", note)
    num_images = manifest.num_train + manifest.num_val + manifest.num_test
    logger.info("published %s images as data set %s in %.1f s", f"{num_images:,}", digest, time.monotonic() - started)
    return manifest


def _published(digest: str, store: ObjectStore) -> Manifest | None:
    """The manifest, if all of its files are there as it says; else it is withdrawn."""
    try:
        manifest = load_manifest(digest, store)
    except FileNotFoundError:
        return None
    for name, file in manifest.files.items():
        head = store.head(manifest.key(name))
        if head is None or (head["bytes"], head["etag"]) != (file.bytes, file.etag):
            logger.warning("%s of data set %s is missing or another one; it is prepared again", name, digest)
            store.delete(manifest_key(digest))
            return None
    return manifest


@contextmanager
def _opened(path: Path, data: DataConfig, source: SourceRef) -> Iterator[ImageSet]:
    if source.kind == "digits":
        images_u8, labels = read_digits(path.read_bytes())
        yield ArrayImages(tuple(map(str, range(10))), images_u8, labels)
    elif source.kind == "cifar10":
        official = cifar10.read_python_archive(path)
        yield ArrayImages(official.classes, official.images_u8, official.labels, official.is_test)
    else:
        with named_source(redact_uri(str(data.uri))), open_archive(path) as archive:
            layout = resolve_layout(archive)
            check_classes(layout, data)
            yield ArchivedImages(archive, layout)


def _write(images: ImageSet, data: DataConfig, digest: str, source: SourceRef, store: ObjectStore) -> Manifest:
    """Send all arrays to the store."""
    splits = plan_splits(images.labels, images.is_test, images.classes, data)
    findings, files = _write_images(images, splits, data.image_size, digest, store)
    training_labels, test_labels = images.labels[~splits.is_test], images.labels[splits.is_test]
    small = {
        "train_labels.npy": training_labels,
        "train_indices.npy": splits.train_indices,
        "val_indices.npy": splits.val_indices,
        "test_labels.npy": test_labels,
    }
    for name, values in small.items():
        with _array(store, array_key(digest, name), values.shape, values.dtype) as array:
            array.write(values)
            files[name] = array.close()
    parts = {
        "train": training_labels[splits.train_indices],
        "val": training_labels[splits.val_indices],
        "test": test_labels,
    }
    counts = {part: np.bincount(labels, minlength=len(images.classes)) for part, labels in parts.items()}
    mean, std = findings.statistics(len(splits.train_indices) * data.image_size**2)
    return Manifest(
        dataset=data.dataset,
        digest=digest,
        image_size=data.image_size,
        classes=images.classes,
        num_train=len(parts["train"]),
        num_val=len(parts["val"]),
        num_test=len(parts["test"]),
        class_counts={part: tuple(map(int, numbers)) for part, numbers in counts.items()},
        channel_mean=mean,
        channel_std=std,
        files={name: files[name] for name in (*TRAIN_FILES, *TEST_FILES)},
        source_sha256=source.sha256,
        notes=(*images.notes, *findings.notes(), *_duplicates(findings.hashes, images, splits)),
    )


class _Array:
    """An array on its way to the store."""

    def __init__(self, upload: Upload, shape: tuple[int, ...], dtype: Any) -> None:
        self._upload = upload
        self._writer = NpyWriter(upload, shape, dtype)
        self._num_bytes = file_bytes(shape, dtype)
        self.write = self._writer.write

    def close(self) -> StoredFile:
        """Make the object appear."""
        return StoredFile(self._writer.sha256(), self._num_bytes, self._upload.close())


@contextmanager
def _array(store: ObjectStore, key: str, shape: tuple[int, ...], dtype: Any) -> Iterator[_Array]:
    """An array to be written row by row and closed; else nothing of it is left in the store."""
    with store.upload(key, file_bytes(shape, dtype)) as upload:
        yield _Array(upload, shape, dtype)


@dataclass
class _Findings:
    """What is learnt of the images in passing."""

    hashes: NDArray[np.int64]
    """(N,) of each image's pixels."""
    sums: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(3, np.uint64))
    """Over the pixels of the images trained on, by channel."""
    squares: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(3, np.uint64))
    remarks: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[int, str]] = field(default_factory=list)

    def statistics(self, num_pixels: int) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation by channel, 0 to 1; from exact sums of whole numbers."""
        mean = self.sums / num_pixels
        std = np.sqrt(np.maximum(self.squares / num_pixels - mean**2, 0))
        (r, g, b), (sr, sg, sb) = (mean / 255).tolist(), (std / 255).tolist()
        return (r, g, b), (sr, sg, sb)

    def notes(self) -> list[str]:
        """Sentences for the manifest."""
        return [f"{count:,} images {remark}" for remark, count in sorted(self.remarks.items())]


@dataclass
class _Measured:
    """A decoded run and what is learnt of it."""

    run: Run
    decoded: Decoded
    hashes: NDArray[np.int64]
    sums: NDArray[np.uint64]
    squares: NDArray[np.uint64]


def _write_images(
    images: ImageSet, splits: Splits, size: int, digest: str, store: ObjectStore
) -> tuple[_Findings, dict[str, StoredFile]]:
    """Decode into `train_images.npy` and `test_images.npy`; the findings, and the two files by name.

    Raises:
        UserError: some images cannot be used; names the first few.
    """
    num_test = int(splits.is_test.sum())
    num_training = len(splits.is_test) - num_test
    findings = _Findings(np.empty(len(splits.is_test), np.int64))
    is_trained_on = np.zeros(len(splits.is_test), bool)
    is_trained_on[np.flatnonzero(~splits.is_test)[splits.train_indices]] = True
    shape = (size, size, 3)
    reported = time.monotonic()
    with (
        _array(store, array_key(digest, "train_images.npy"), (num_training, *shape), "u1") as training,
        _array(store, array_key(digest, "test_images.npy"), (num_test, *shape), "u1") as test,
    ):
        for measured in _in_parallel(images.runs(size), lambda run: _measure(run, is_trained_on)):
            part = slice(measured.run.start, measured.run.start + measured.run.count)
            findings.hashes[part] = measured.hashes
            findings.sums += measured.sums
            findings.squares += measured.squares
            findings.remarks += measured.decoded.remarks
            findings.bad += measured.decoded.bad
            if len(findings.bad) > MAX_BAD_IMAGES:
                break
            images_u8, is_test = measured.decoded.images_u8, splits.is_test[part]
            for array, chosen in ((test, is_test), (training, ~is_test)):
                array.write(images_u8 if chosen.all() else images_u8[chosen])
            if time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                logger.info("decoded %s of %s images", f"{part.stop:,}", f"{len(splits.is_test):,}")
        _refuse_bad(findings.bad, images)
        return findings, {"train_images.npy": training.close(), "test_images.npy": test.close()}


def _measure(run: Run, is_trained_on: NDArray[np.bool_]) -> _Measured:
    """Decode, hash and sum up one run; called in a pool's thread."""
    decoded = run.decode()
    images = np.ascontiguousarray(decoded.images_u8)
    content, length = images.data.cast("B"), images[0].size
    # Python's own hash of bytes: 64 bits, another in each process, and three times as fast as SHA-256.
    hashes = np.array([hash(bytes(content[at : at + length])) for at in range(0, len(content), length)], np.int64)
    trained_on = images[is_trained_on[run.start : run.start + run.count]].reshape(-1, length)
    squares = trained_on.astype(np.uint16)
    squares *= squares  # 255² fits
    # Adding rows is what processors do fastest; 2²⁴ squares fit 32 bits, a run has fewer rows.
    totals = [
        rows.sum(axis=0, dtype=np.uint32).reshape(-1, 3).sum(axis=0, dtype=np.uint64) for rows in (trained_on, squares)
    ]
    return _Measured(run, Decoded(images, decoded.bad, decoded.remarks), hashes, totals[0], totals[1])


def _in_parallel(runs: Iterator[Run], work: Callable[[Run], _Measured]) -> Iterator[_Measured]:
    """Results in order; only a few runs are in memory at any time."""
    num_threads = _num_processors()
    waiting: deque[Future[_Measured]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        try:
            for run in runs:
                waiting.append(pool.submit(work, run))
                if len(waiting) > num_threads + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _num_processors() -> int:
    """Processors that this process may run on; macOS does not say, and has all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _refuse_bad(bad: list[tuple[int, str]], images: ImageSet) -> None:
    if not bad:
        return
    some = "; ".join(f"{images.name(index)!r} {why}" for index, why in bad[:3])
    number = f"more than {MAX_BAD_IMAGES}" if len(bad) > MAX_BAD_IMAGES else f"{len(bad)}"
    raise UserError(
        f"{number} of {len(images.labels):,} images cannot be used: {some}{'; …' * (len(bad) > 3)}. "
        "Replace them or leave them out"
    )


def _duplicates(hashes: NDArray[np.int64], images: ImageSet, splits: Splits) -> list[str]:
    """Sentences about images that occur more than once; equal are those whose decoded pixels are."""
    notes = []
    training, test = hashes[~splits.is_test], hashes[splits.is_test]
    leaked = np.flatnonzero(np.isin(test, training))
    if len(leaked):
        origins, positions = np.flatnonzero(~splits.is_test), np.flatnonzero(splits.is_test)
        pairs = [
            f"{images.name(int(positions[i]))} = {images.name(int(origins[np.flatnonzero(training == test[i])[0]]))}"
            for i in leaked[:3]
        ]
        notes.append(
            f"{len(leaked):,} test images are also among the training images: {', '.join(pairs)}"
            f"{', …' * (len(leaked) > 3)}"
        )
    if repeated := len(training) - len(np.unique(training)):
        notes.append(f"{repeated:,} training images are copies of others")
    order = np.lexsort((images.labels, hashes))
    same = hashes[order][1:] == hashes[order][:-1]
    contradictory = int((same & (images.labels[order][1:] != images.labels[order][:-1])).sum())
    if contradictory:
        notes.append(f"{contradictory:,} images occur under more than one class")
    return notes


def _publish(manifest: Manifest, store: ObjectStore) -> Manifest:
    """Write the manifest; its arrays are there.

    Raises:
        RuntimeError: somebody else published other arrays of the same digest meanwhile.
    """
    if store.put_bytes(manifest_key(manifest.digest), manifest.to_json(), if_absent=True):
        return manifest
    other = load_manifest(manifest.digest, store)
    if _checksums(other) != _checksums(manifest):
        raise RuntimeError(
            f"another worker published other arrays as data set {manifest.digest}; "
            "install the same versions of Pillow and torchvision on all workers and run the task again"
        )
    return other


def _checksums(manifest: Manifest) -> dict[str, str]:
    return {name: file.sha256 for name, file in manifest.files.items()}
