"""Arrays in numpy's own format, written from front to back."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray


class NpyWriter:
    """Writes an array whose shape is known in runs of rows, hashing as it goes. A context manager.

    A memory map would do, but its pages count as the process's memory until the kernel has written them.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any) -> None:
        self.path = path
        self._rows_left = shape[0]
        self._row_shape = shape[1:]
        self._dtype = np.dtype(dtype)
        self._hasher = hashlib.sha256()
        self._file = path.open("w+b", buffering=0)
        npy_format.write_array_header_1_0(
            self._file, {"descr": npy_format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        )
        self._file.seek(0)
        self._hasher.update(self._file.read())

    def write(self, rows: NDArray[Any]) -> None:
        """Append rows."""
        if rows.dtype != self._dtype or rows.shape[1:] != self._row_shape or len(rows) > self._rows_left:
            raise ValueError(f"{rows.dtype} {rows.shape} does not fit {self.path.name}")
        self._rows_left -= len(rows)
        content = np.ascontiguousarray(rows).data.cast("B") if rows.size else memoryview(b"")
        self._hasher.update(content)
        while len(content):  # an unbuffered write may take less than all
            content = content[self._file.write(content) :]

    def close(self) -> str:
        """Hexadecimal SHA-256 of the file; all rows must be there."""
        self._file.close()
        if self._rows_left:
            raise ValueError(f"{self._rows_left} rows of {self.path.name} are missing")
        return self._hasher.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def write_array(path: Path, array: NDArray[Any]) -> str:
    """Write a whole array; hexadecimal SHA-256 of the file."""
    with NpyWriter(path, array.shape, array.dtype) as writer:
        writer.write(array)
        return writer.close()
