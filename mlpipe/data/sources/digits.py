"""The handwritten digits that scikit-learn ships: 1,797 grey images of 8×8 pixels."""

from __future__ import annotations

import gzip
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlpipe.config import DataConfig
from mlpipe.data.imageset import ArrayImages, ImageSet
from mlpipe.data.sources.fetch import SourceRef
from mlpipe.data.storage.store import ObjectStore


def fetch(data: DataConfig, store: ObjectStore, *, max_bytes: int) -> SourceRef:  # noqa: ARG001 - as all sources
    """Copy scikit-learn's file into the store."""
    content = digits_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    source = SourceRef(key=f"sources/{sha256}", sha256=sha256, kind="digits")
    store.put_bytes(source.key, content, if_absent=True)
    return source


@contextmanager
def open_images(path: Path, data: DataConfig, kind: str) -> Iterator[ImageSet]:  # noqa: ARG001 - as all sources
    """The images of the file."""
    yield ArrayImages(tuple(map(str, range(10))), *read_digits(path.read_bytes()))


def digits_bytes() -> bytes:
    """The file in the installed scikit-learn."""
    return resources.files("sklearn.datasets.data").joinpath("digits.csv.gz").read_bytes()


def read_digits(content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 8, 8) with 0..255 for the file's 0..16, and labels (N,).

    https://archive.ics.uci.edu/dataset/80
    """
    table = np.loadtxt(io.BytesIO(gzip.decompress(content)), delimiter=",")
    images_u8 = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return images_u8, table[:, -1].astype(np.int64)
