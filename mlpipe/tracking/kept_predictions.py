"""What logged models answered to a data set's test images, in object storage, so that it is asked only once."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlpipe.data.storage.store import ObjectStore
from mlpipe.models.libraries import installed_libraries
from mlpipe.tracking.runs import key_of

logger = logging.getLogger(__name__)

MAX_BYTES = 64 << 20
"""Larger answers are not kept."""


@dataclass(frozen=True)
class KeptPredictions:
    """Probabilities of logged models on one data set's test images.

    Those of other versions of the libraries do not count: with these, a model might answer otherwise.
    """

    store: ObjectStore
    digest: str
    """Of the data set."""

    def get(self, model_id: str, classes: Sequence[str], num_images: int) -> NDArray[np.floating] | None:
        """(N, K) probabilities in the order of `classes`, or `None`: they are not kept."""
        try:
            content = self.store.get_bytes(self._key(model_id))
        except FileNotFoundError:
            return None
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as kept:
                names, probabilities = kept["classes"].tolist(), kept["probabilities"]
        except Exception as error:  # noqa: BLE001 - zipfile and numpy raise many kinds for damaged files
            logger.warning("kept predictions of %s cannot be read (%r): it is asked again", model_id, error)
            return None
        fits = set(names) == set(classes) and probabilities.shape == (num_images, len(names))
        return probabilities[:, [names.index(name) for name in classes]] if fits else None

    def put(self, model_id: str, classes: Sequence[str], probabilities: NDArray[np.floating]) -> None:
        """Keep (N, K) probabilities."""
        if probabilities.nbytes <= MAX_BYTES:
            file = io.BytesIO()
            np.savez_compressed(file, classes=np.array(classes), probabilities=probabilities)
            self.store.put_bytes(self._key(model_id), file.getvalue())

    def _key(self, model_id: str) -> str:
        return f"predictions/{self.digest}/{model_id}-{key_of(*installed_libraries('mlflow'))}.npz"
