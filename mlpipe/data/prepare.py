"""From a source to published arrays: decode, check, split, publish."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpipe.config import DataConfig
from mlpipe.data.dataset import ImageRows
from mlpipe.data.imageset import Decoded, ImageSet, Run
from mlpipe.data.manifest import (
    TEST_FILES,
    TRAIN_FILES,
    Manifest,
    array_key,
    dataset_digest,
    load_manifest,
    manifest_key,
)
from mlpipe.data.near_duplicates import SIDE, cell_sums, group_numbers, near_duplicates, thumbnails
from mlpipe.data.sources.fetch import SourceRef, open_source
from mlpipe.data.splits import DecodedImages, Labelled, Splits, listed, plan_splits, without_small_classes
from mlpipe.data.storage.npy import StoredFile, upload_array
from mlpipe.data.storage.scratch import scratch_folder
from mlpipe.data.storage.store import ObjectStore
from mlpipe.errors import UserError

logger = logging.getLogger(__name__)

MAX_BAD_IMAGES = 100
"""Unusable images, beyond those that are allowed, after which decoding stops."""
MAX_LISTED = 1000
"""Pairs of near-duplicates that the manifest names, and unusable images that the log names."""
BYTES_PER_COPY = 16 << 20
PROGRESS_SECONDS = 10.0
"""Least time between two progress lines."""


MAX_NAME_BYTES = 120
"""Of an image's name that is kept."""


class DamagedImagesError(UserError):
    """More images than allowed cannot be used."""

    def __init__(self, message: str, images: tuple[tuple[str, str], ...]) -> None:
        """
        Args:
            images: name and reason of each that was found.
        """
        super().__init__(message)
        self.images = images


def prepare_dataset(data: DataConfig, source: SourceRef, store: ObjectStore) -> Manifest:
    """Publish the source's images as uint8 arrays; nothing is done where they are published already.

    Images are decoded by as many threads as there are processors. Where the source says which are test images, they are
    sent to the store as they come; else they are spooled on disk until the splits are known. Of all pixels a few runs
    are in memory, beside some hundred bytes for each image. The order of images is the source's. The manifest is
    written last.

    Raises:
        UserError: the source cannot be used; nothing is published then.
        DamagedImagesError: too many of its images cannot be used.
    """
    digest = dataset_digest(data, source.kind, source.sha256)
    known = _published(digest, store)
    if known is not None:
        logger.info("data set %s is published already", digest)
        return known
    started = time.monotonic()
    with scratch_folder() as folder:
        store.get_file(source.key, folder / "source", source.sha256)
        with open_source(folder / "source", data, source.kind) as images:
            manifest = _publish(_write(images, data, digest, source, store, folder), store)
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


def _write(
    images: ImageSet, data: DataConfig, digest: str, source: SourceRef, store: ObjectStore, folder: Path
) -> Manifest:
    """Send all arrays to the store."""
    size, used = data.image_size, images.labels >= 0
    known = Labelled(classes=images.classes, labels=images.labels, is_test=images.is_test, is_val=images.is_val)
    without_small_classes(known, data)  # refused before anything is decoded
    scan = _Scan(images, size, data.max_damaged)
    if images.is_test is None:
        # Which images are test images is known when all have been seen.
        spool = _spool(folder / "pixels", (len(used), size, size, 3))
        for part, images_u8 in scan:
            spool[part] = images_u8
        splits, pairs, groups = _split(images, scan.findings, data)
        parts = ((part, spool[part]) for part in ImageRows(spool).slices(BYTES_PER_COPY))
        sides = {"train": used & ~splits.is_test, "test": splits.is_test}
        files = _write_images(parts, sides, size, digest, store)
    else:
        sides = {"train": used & ~images.is_test, "test": used & images.is_test}
        files = _write_images(iter(scan), sides, size, digest, store)
        splits, pairs, groups = _split(images, scan.findings, data)
    findings = scan.findings
    rows = {side: np.flatnonzero(is_on) for side, is_on in sides.items()}
    small: dict[str, NDArray[Any]] = {f"{side}_labels.npy": splits.labels[rows[side]] for side in rows}
    small |= {f"{side}_hashes.npy": findings.hashes[rows[side]] for side in rows}
    small["train_groups.npy"] = groups[rows["train"]]
    small["test_names.npy"] = _names(images, rows["test"])
    chosen = {"train": splits.is_train, "val": splits.is_val, "test": splits.is_test}
    for name, is_chosen in chosen.items():
        small[f"{name}_indices.npy"] = np.flatnonzero(is_chosen[rows["test" if name == "test" else "train"]])
    for name, values in small.items():
        with upload_array(store, array_key(digest, name), values.shape, values.dtype) as array:
            array.write(values)
            files[name] = array.close()
    counts = {name: np.bincount(splits.labels[is_chosen]) for name, is_chosen in chosen.items()}
    mean, std = findings.statistics(splits.is_train, size**2)
    seen = splits.is_train | splits.is_val
    known_test = _across(groups, splits.is_test, seen, images) if images.is_test is not None else ()
    known_val = _across(groups, splits.is_val, splits.is_train, images) if images.is_val is not None else ()
    return Manifest(
        dataset=data.name,
        digest=digest,
        image_size=size,
        classes=splits.classes,
        num_train=int(splits.is_train.sum()),
        num_val=int(splits.is_val.sum()),
        num_test=int(splits.is_test.sum()),
        class_counts={name: tuple(map(int, numbers)) for name, numbers in counts.items()},
        channel_mean=mean,
        channel_std=std,
        files={name: files[name] for name in (*TRAIN_FILES, *TEST_FILES)},
        source_sha256=source.sha256,
        notes=(
            *images.notes,
            *scan.notes(),
            *splits.notes,
            *_notes_of_duplicates(findings.hashes, pairs, known_test, known_val, splits),
        ),
        left_out=scan.left_out(),
        near_duplicates=(*known_test, *known_val)[:MAX_LISTED],
        num_known_test=len(known_test),
    )


def _spool(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An array on disk. Its space is reserved: writing to a map on a disk that is full ends the process (SIGBUS)."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(file.fileno(), 0, math.prod(shape))
        else:
            file.truncate(math.prod(shape))
    return np.memmap(path, np.uint8, "r+", shape=shape)


def _names(images: ImageSet, rows: NDArray[np.int64]) -> NDArray[np.bytes_]:
    """(N,) UTF-8; the ends of longer ones."""
    return np.array([images.name(int(row)).encode()[-MAX_NAME_BYTES:] for row in rows], np.bytes_)


def _split(
    images: ImageSet, findings: _Findings, data: DataConfig
) -> tuple[Splits, NDArray[np.int64], NDArray[np.int64]]:
    """Plan the splits of the images that can be used; also the pairs of near-duplicates among them, and their groups:
    (N,) the same number for images that show the same."""
    labels = images.labels.copy()
    labels[[index for index, _ in findings.bad]] = -1
    used = np.flatnonzero(labels >= 0)
    pairs = used[near_duplicates(findings.thumbnails_u8[used], findings.hashes[used])]
    groups = group_numbers(pairs, len(labels))
    known = DecodedImages(
        classes=images.classes,
        labels=labels,
        is_test=images.is_test,
        is_val=images.is_val,
        hashes=findings.hashes,
        groups=groups,
    )
    return plan_splits(known, data), pairs, groups


@dataclass
class _Findings:
    """What is learnt of N images in passing."""

    hashes: NDArray[np.uint64]
    """(N,) of the image files' bytes."""
    thumbnails_u8: NDArray[np.uint8]
    """(N, 64)"""
    sums: NDArray[np.uint64]
    """(N, 3) over an image's pixels, by channel."""
    squares: NDArray[np.uint64]
    """(N, 3)"""
    remarks: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def of(cls, count: int) -> _Findings:
        """Nothing is known yet."""
        sums, squares = np.zeros((2, count, 3), np.uint64)
        return cls(np.zeros(count, np.uint64), np.zeros((count, SIDE * SIDE), np.uint8), sums, squares)

    def statistics(
        self, chosen: NDArray[np.bool_], pixels_of_each: int
    ) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation by channel of the chosen images, 0 to 1; from exact sums of whole numbers.

        The deviation is at least 1/255: networks divide by it, and a channel may be constant.
        """
        num_pixels = int(chosen.sum()) * pixels_of_each
        mean = self.sums[chosen].sum(axis=0) / num_pixels
        std = np.sqrt(np.maximum(self.squares[chosen].sum(axis=0) / num_pixels - mean**2, 1))
        (r, g, b), (sr, sg, sb) = (mean / 255).tolist(), (std / 255).tolist()
        return (r, g, b), (sr, sg, sb)


@dataclass
class _Measured:
    """A decoded run and what is learnt of it."""

    run: Run
    decoded: Decoded
    thumbnails_u8: NDArray[np.uint8]
    sums: NDArray[np.uint64]
    squares: NDArray[np.uint64]


class _Scan:
    """All images of a source, decoded once, in order; `findings` is complete when the iteration has ended."""

    def __init__(self, images: ImageSet, size: int, max_damaged: float) -> None:
        """
        Args:
            max_damaged: share of the images that may be unusable.
        """
        self._images = images
        self._size = size
        self._num_used = int((images.labels >= 0).sum())
        self._max_bad = int(max_damaged * self._num_used)
        self._max_damaged = max_damaged
        self.findings = _Findings.of(len(images.labels))

    def __iter__(self) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
        """Consecutive images: their positions, and pixels (n, size, size, 3).

        Raises:
            UserError: more images than allowed cannot be used; names the first few.
        """
        findings, reported = self.findings, time.monotonic()
        for measured in _in_parallel(self._images.runs(self._size), _measure):
            part = slice(measured.run.start, measured.run.start + measured.run.count)
            findings.hashes[part] = measured.decoded.hashes
            findings.thumbnails_u8[part] = measured.thumbnails_u8
            findings.sums[part] = measured.sums
            findings.squares[part] = measured.squares
            findings.remarks += measured.decoded.remarks
            findings.bad += measured.decoded.bad
            if len(findings.bad) > self._max_bad + MAX_BAD_IMAGES:
                break
            yield part, measured.decoded.images_u8
            if time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                logger.info("decoded %s of %s images", f"{part.stop:,}", f"{len(findings.hashes):,}")
        for name, why in self.left_out()[:MAX_LISTED]:
            logger.warning("cannot be used: %r %s", name, why)
        if len(findings.bad) > self._max_bad:
            raise DamagedImagesError(
                f"{self._bad()}. At most {self._max_bad} may be left out (max_damaged {self._max_damaged:g}); "
                "replace them, remove them, or raise max_damaged",
                self.left_out(),
            )

    def left_out(self) -> tuple[tuple[str, str], ...]:
        """Images that cannot be used: name and reason."""
        return tuple((self._images.name(index), why) for index, why in self.findings.bad)

    def notes(self) -> list[str]:
        """Sentences about single images."""
        remarks = sorted(self.findings.remarks.items())
        notes = [f"{count:,} image{'s' * (count > 1)} {remark}" for remark, count in remarks]
        return [*notes, f"{self._bad()}; left out"] if self.findings.bad else notes

    def _bad(self) -> str:
        bad = self.findings.bad
        some = "; ".join(f"{self._images.name(index)!r} {why}" for index, why in bad[:3]) + "; …" * (len(bad) > 3)
        stopped = len(bad) > self._max_bad + MAX_BAD_IMAGES
        number = f"more than {self._max_bad + MAX_BAD_IMAGES}" if stopped else f"{len(bad)}"
        return f"{number} of {self._num_used:,} images cannot be used: {some}"


def _write_images(
    parts: Iterator[tuple[slice, NDArray[np.uint8]]],
    sides: Mapping[str, NDArray[np.bool_]],
    size: int,
    digest: str,
    store: ObjectStore,
) -> dict[str, StoredFile]:
    """Write an array for each side: `train_images.npy` and `test_images.npy`; the two files by name."""
    sides = {f"{side}_images.npy": is_on for side, is_on in sides.items()}
    with contextlib.ExitStack() as stack:
        arrays = {
            name: stack.enter_context(
                upload_array(store, array_key(digest, name), (int(is_on.sum()), size, size, 3), "u1")
            )
            for name, is_on in sides.items()
        }
        for part, images_u8 in parts:
            for name, is_on in sides.items():
                chosen = is_on[part]
                arrays[name].write(images_u8 if chosen.all() else images_u8[chosen])
        return {name: array.close() for name, array in arrays.items()}


def _measure(run: Run) -> _Measured:
    """Decode and sum up one run; called in a pool's thread."""
    decoded = run.decode()
    images_u8 = decoded.images_u8
    n, size = images_u8.shape[:2]
    squares = images_u8.reshape(n, size, size * 3).astype(np.uint16)
    squares *= squares  # 255² fits
    # Adding rows is what processors do fastest.
    sums_of_squares = squares.sum(axis=1, dtype=np.uint32).reshape(n, size, 3).sum(axis=1, dtype=np.uint64)
    cells = cell_sums(images_u8)
    return _Measured(run, decoded, thumbnails(cells, size), cells.sum(axis=(1, 2), dtype=np.uint64), sums_of_squares)


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


def _across(
    groups: NDArray[np.int64], is_held_out: NDArray[np.bool_], is_seen: NDArray[np.bool_], images: ImageSet
) -> tuple[tuple[str, str], ...]:
    """Names of each held-out image that one of the others shows, too, and of the first such image."""
    seen, held_out = np.flatnonzero(is_seen), np.flatnonzero(is_held_out)
    known, first = np.unique(groups[seen], return_index=True)
    held_out = held_out[np.isin(groups[held_out], known)]
    partners = seen[first[np.searchsorted(known, groups[held_out])]]
    return tuple((images.name(int(one)), images.name(int(two))) for one, two in zip(held_out, partners, strict=True))


def _notes_of_duplicates(
    hashes: NDArray[np.uint64],
    pairs: NDArray[np.int64],
    known_test: Sequence[tuple[str, str]],
    known_val: Sequence[tuple[str, str]],
    splits: Splits,
) -> list[str]:
    """Sentences about images that show the same as others."""
    notes = []
    for known, kind, others in (
        (known_test, "test ", "training or validation images"),
        (known_val, "validation ", "training images"),
    ):
        if known:
            some = listed([f"{one} = {other}" for one, other in known])
            notes.append(f"{_images(len({one for one, _ in known}), kind)} also among the {others}: {some}")
    seen = splits.is_train | splits.is_val
    if repeated := int(seen.sum()) - len(np.unique(hashes[seen])):
        notes.append(f"{_images(repeated, 'training ')} copies of others")
    used = pairs[(splits.labels[pairs] >= 0).all(axis=1)]
    if contradictory := len(np.unique(used[splits.labels[used[:, 0]] != splits.labels[used[:, 1]], 1])):
        notes.append(f"{_images(contradictory)} also in another class")
    if not known_test and not known_val and len(used):
        notes.append(f"{len(np.unique(used)):,} images are near-duplicates of each other; each such group has one side")
    return notes


def _images(count: int, kind: str = "") -> str:
    return f"1 {kind}image is" if count == 1 else f"{count:,} {kind}images are"


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
