"""Arrays in numpy's own format, written from front to back."""

from __future__ import annotations

import hashlib
import io
import math
from typing import Any, Protocol

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray


class Sink(Protocol):
    """Takes bytes in order."""

    def write(self, content: bytes | memoryview, /) -> object:
        """Append them."""


class NpyWriter:
    """Writes an array whose shape is known in runs of rows, hashing as it goes."""

    def __init__(self, sink: Sink, shape: tuple[int, ...], dtype: Any) -> None:
        self._sink = sink
        self._rows_left = shape[0]
        self._row_shape = shape[1:]
        self._dtype = np.dtype(dtype)
        self._hasher = hashlib.sha256()
        self._put(header(shape, dtype))

    def write(self, rows: NDArray[Any]) -> None:
        """Append rows."""
        if rows.dtype != self._dtype or rows.shape[1:] != self._row_shape or len(rows) > self._rows_left:
            raise ValueError(f"{rows.dtype} {rows.shape} does not fit")
        self._rows_left -= len(rows)
        if rows.size:
            self._put(np.ascontiguousarray(rows).data.cast("B"))

    def _put(self, content: bytes | memoryview) -> None:
        self._hasher.update(content)
        self._sink.write(content)

    def sha256(self) -> str:
        """Of the whole file, hexadecimal; all rows must have been written."""
        if self._rows_left:
            raise ValueError(f"{self._rows_left} rows are missing")
        return self._hasher.hexdigest()


def header(shape: tuple[int, ...], dtype: Any) -> bytes:
    """What stands before the values of an array in C order."""
    buffer = io.BytesIO()
    descr = npy_format.dtype_to_descr(np.dtype(dtype))
    npy_format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def file_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Length of the whole file."""
    return len(header(shape, dtype)) + math.prod(shape) * np.dtype(dtype).itemsize
