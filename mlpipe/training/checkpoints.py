"""Where a training stands, kept in object storage, so that any machine can go on with it."""

from __future__ import annotations

import logging
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

from mlpipe.data.storage.store import ObjectStore
from mlpipe.models.weights import UNREADABLE

logger = logging.getLogger(__name__)


class CheckpointStore:
    """The last completed epoch of one run. One object holds everything, so it is replaced as a whole or not at all."""

    def __init__(self, store: ObjectStore, run_id: str) -> None:
        self._store = store
        self._key = f"checkpoints/{run_id}/last.pt"

    def save(self, state: dict[str, Any]) -> None:
        """Publish the state (tensors and plain values) in place of the one before.

        Raises:
            OSError: this machine's disk is full.
        """
        with tempfile.TemporaryDirectory(prefix="mlpipe-checkpoint-") as folder:
            path = Path(folder) / "last.pt"
            _write(state, path)
            self._store.put_file(self._key, path)

    def load(self) -> dict[str, Any] | None:
        """The last saved state, on the CPU; `None` where there is none that can be read."""
        if not self._store.exists(self._key):
            return None
        with tempfile.TemporaryDirectory(prefix="mlpipe-checkpoint-") as folder:
            path = Path(folder) / "last.pt"
            self._store.get_file(self._key, path)
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, *UNREADABLE) as error:
                logger.warning("the checkpoint %s cannot be read, training starts anew: %s", self._key, error)
                return None

    def delete(self) -> None:
        """Remove the checkpoint, once the model itself is published."""
        self._store.delete(self._key)


def _write(state: dict[str, Any], path: Path) -> None:
    """As `torch.save`, but of a write that fails it raises the reason, an `OSError` with its number.

    Given a path, torch's writer loses the reason; given a file, it fails a second time while it ends the archive.
    """
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise OSError(reason.errno, reason.strerror, str(path)) from error
