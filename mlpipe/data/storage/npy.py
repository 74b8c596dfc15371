"""Arrays in numpy's own format, written from front to back."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from mlpipe.data.storage.store import ObjectStore, Upload


@dataclass(frozen=True)
class StoredFile:
    """One array of a data set."""

    sha256: str
    """Hexadecimal."""
    bytes: int
    etag: str
    """The object store's entity tag, by which another object under the same key is noticed."""


class ArrayUpload:
    """An array of a known shape on its way to the store, in runs of rows that are hashed as they go."""

    def __init__(self, upload: Upload, shape: tuple[int, ...], dtype: Any) -> None:
        """
        Args:
            upload: of `file_bytes`; it refuses more rows, and fewer.
        """
        self._upload = upload
        self._num_bytes = file_bytes(shape, dtype)
        self._row_shape = shape[1:]
        self._dtype = np.dtype(dtype)
        self._hasher = hashlib.sha256()
        self._put(header(shape, dtype))

    def write(self, rows: NDArray[Any]) -> None:
        """Append rows."""
        if rows.dtype != self._dtype or rows.shape[1:] != self._row_shape:
            raise ValueError(f"{rows.dtype} {rows.shape} does not fit")
        if rows.size:
            self._put(np.ascontiguousarray(rows).data.cast("B"))

    def _put(self, content: bytes | memoryview) -> None:
        self._hasher.update(content)
        self._upload.write(content)

    def close(self) -> StoredFile:
        """Make the object appear."""
        return StoredFile(self._hasher.hexdigest(), self._num_bytes, self._upload.close())


@contextmanager
def upload_array(store: ObjectStore, key: str, shape: tuple[int, ...], dtype: Any) -> Iterator[ArrayUpload]:
    """An array to be written row by row and closed; else nothing of it is left in the store."""
    with store.upload(key, file_bytes(shape, dtype)) as upload:
        yield ArrayUpload(upload, shape, dtype)


def header(shape: tuple[int, ...], dtype: Any) -> bytes:
    """What stands before the values of an array in C order."""
    buffer = io.BytesIO()
    descr = npy_format.dtype_to_descr(np.dtype(dtype))
    npy_format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def file_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Length of the whole file."""
    return len(header(shape, dtype)) + math.prod(shape) * np.dtype(dtype).itemsize
