"""Images of a source as runs that can be decoded in any thread."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mlpipe.data.archives.decode import BadImageError, decode_image, resize_pixels
from mlpipe.data.archives.layout import Layout
from mlpipe.data.archives.listing import ImageArchive, Packed

RUN_IMAGES = 1024
RUN_PIXEL_BYTES = 4 << 20
"""Decoded pixels of a run; it fits a core's cache while it is worked on."""
RUN_PACKED_BYTES = 16 << 20


@dataclass
class Decoded:
    """A run of images."""

    images_u8: NDArray[np.uint8]
    """(n, size, size, 3)"""
    hashes: NDArray[np.uint64]
    """(n,) of the image files' bytes; of pixels where the source holds those."""
    bad: list[tuple[int, str]] = field(default_factory=list)
    """Positions in the source of images that cannot be used, and why; their pixels are meaningless."""
    remarks: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive images of a source."""

    start: int
    count: int
    decode: Callable[[], Decoded]
    """To be called once, in any thread."""


class ImageSet(ABC):
    """A source's images with their labels, in the source's order."""

    def __init__(
        self,
        classes: tuple[str, ...],
        labels: NDArray[np.int64],
        is_test: NDArray[np.bool_] | None,
        is_val: NDArray[np.bool_] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        """
        Args:
            labels: (N,) positions in `classes`; -1: the image is left aside.
            is_test: (N,) the source's own test images; `None`: it has none.
            is_val: (N,) its own validation images; `None`: it has none.
        """
        self.classes = classes
        self.labels = labels
        self.is_test = is_test
        self.is_val = is_val
        self.notes = notes

    @abstractmethod
    def runs(self, size: int) -> Iterator[Run]:
        """All images in order, at `size` × `size`."""

    @abstractmethod
    def name(self, index: int) -> str:
        """How to tell the user which image it is."""


class ArchivedImages(ImageSet):
    """Image files in an archive."""

    def __init__(self, archive: ImageArchive, layout: Layout) -> None:
        super().__init__(layout.classes, layout.labels, layout.is_test, layout.is_val, notes=layout.notes)
        self._archive = archive

    def name(self, index: int) -> str:
        return self._archive.name(index)

    def runs(self, size: int) -> Iterator[Run]:
        for packed in self._archive.stream(_run_length(size), RUN_PACKED_BYTES):
            yield Run(packed.start, packed.count, lambda packed=packed: self._decode(packed, size))  # type: ignore[misc]

    def _decode(self, packed: Packed, size: int) -> Decoded:
        decoded = Decoded(np.zeros((packed.count, size, size, 3), np.uint8), np.zeros(packed.count, np.uint64))
        wanted = self.labels[packed.start : packed.start + packed.count] >= 0
        for offset, data in enumerate(packed.read()):
            if not wanted[offset]:
                continue
            decoded.hashes[offset] = content_hash(data)
            try:
                decode_image(data, decoded.images_u8[offset], decoded.remarks)
            except BadImageError as error:
                decoded.images_u8[offset] = 0
                decoded.bad.append((packed.start + offset, str(error)))
        return decoded


class ArrayImages(ImageSet):
    """Images that a source holds as pixels, (N, H, W) grey or (N, H, W, 3)."""

    def __init__(
        self,
        classes: tuple[str, ...],
        images_u8: NDArray[np.uint8],
        labels: NDArray[np.int64],
        is_test: NDArray[np.bool_] | None = None,
    ) -> None:
        super().__init__(classes, labels, is_test)
        self.images_u8 = images_u8

    def name(self, index: int) -> str:
        return f"image {index}"

    def runs(self, size: int) -> Iterator[Run]:
        length = _run_length(size)
        for start in range(0, len(self.images_u8), length):
            part = self.images_u8[start : start + length]
            yield Run(start, len(part), lambda part=part: _resize_run(part, size))  # type: ignore[misc]


def content_hash(content: bytes | memoryview) -> int:
    """64 bits of BLAKE2b (RFC 7693)."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _run_length(size: int) -> int:
    return max(1, min(RUN_IMAGES, RUN_PIXEL_BYTES // (size * size * 3)))


def _resize_run(images_u8: NDArray[np.uint8], size: int) -> Decoded:
    contiguous = np.ascontiguousarray(images_u8)
    hashes = np.array([content_hash(image.data.cast("B")) for image in contiguous], np.uint64)
    if images_u8.shape[1:] == (size, size, 3):
        return Decoded(contiguous, hashes)
    return Decoded(np.stack([resize_pixels(image, size) for image in contiguous]), hashes)
