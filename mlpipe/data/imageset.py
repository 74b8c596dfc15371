"""Images of a source as runs that can be decoded in any thread."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mlpipe.data.archive import ImageArchive, Packed
from mlpipe.data.decode import BadImageError, decode_image, resize_pixels
from mlpipe.data.layout import Layout

RUN_IMAGES = 1024
RUN_PIXEL_BYTES = 4 << 20
"""Decoded pixels of a run; it fits a core's cache while it is worked on."""
RUN_PACKED_BYTES = 16 << 20


@dataclass
class Decoded:
    """A run of images."""

    images_u8: NDArray[np.uint8]
    """(n, size, size, 3)"""
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
        notes: tuple[str, ...] = (),
    ) -> None:
        self.classes = classes
        self.labels = labels
        self.is_test = is_test
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
        super().__init__(layout.classes, layout.labels, layout.is_test, layout.notes)
        self._archive = archive

    def name(self, index: int) -> str:
        return self._archive.name(index)

    def runs(self, size: int) -> Iterator[Run]:
        for packed in self._archive.stream(_run_length(size), RUN_PACKED_BYTES):
            yield Run(packed.start, packed.count, lambda packed=packed: _decode_run(packed, size))  # type: ignore[misc]


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
        self._images_u8 = images_u8

    def name(self, index: int) -> str:
        return f"image {index}"

    def runs(self, size: int) -> Iterator[Run]:
        length = _run_length(size)
        for start in range(0, len(self._images_u8), length):
            part = self._images_u8[start : start + length]
            yield Run(start, len(part), lambda part=part: _resize_run(part, size))  # type: ignore[misc]


def _run_length(size: int) -> int:
    return max(1, min(RUN_IMAGES, RUN_PIXEL_BYTES // (size * size * 3)))


def _decode_run(packed: Packed, size: int) -> Decoded:
    decoded = Decoded(np.empty((packed.count, size, size, 3), np.uint8))
    for offset, data in enumerate(packed.read()):
        try:
            decode_image(data, decoded.images_u8[offset], decoded.remarks)
        except BadImageError as error:
            decoded.images_u8[offset] = 0
            decoded.bad.append((packed.start + offset, str(error)))
    return decoded


def _resize_run(images_u8: NDArray[np.uint8], size: int) -> Decoded:
    if images_u8.shape[1:] == (size, size, 3):
        return Decoded(images_u8)
    return Decoded(np.stack([resize_pixels(np.ascontiguousarray(image), size) for image in images_u8]))
