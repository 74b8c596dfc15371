"""Folders for large temporary files. What a killed process has left, the next one removes."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "mlpipe-scratch-"
NEW_SECONDS = 60.0
"""Age below which a folder may be one that its process is about to lock."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder on the temporary disk, until the context ends.

    The process holds a lock on it, which ends with the process, however that ends.
    """
    _remove_left_folders()
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        lock = os.open(name, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(lock)


def _remove_left_folders() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # it is in use, another user's, or another process was faster
            if time.time() - folder.stat().st_mtime < NEW_SECONDS:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)
