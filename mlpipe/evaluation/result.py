"""A model and how it did on the test images: what is compared, drawn and judged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlpipe.evaluation.scoring import Evaluation


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelResult:
    """One model of a comparison."""

    name: str
    """For the reader: custom_cnn."""
    evaluation: Evaluation
    architecture: str = ""
    version: str = ""
    """Of the registered model."""
    weights: str = "none"
    """What it started from: random, imagenet, a URI; none for estimators."""
    train_seconds: float | None = None
    """Duration of the training."""
    images_per_second: float | None = None
    """Throughput of the training."""
    known: NDArray[np.bool_] | None = None
    """(N,) the test images that what it started or learned from was trained on; `None`: none of them."""
    cross_validated: tuple[float, float] | None = None
    """Mean accuracy, 0 to 1, and its standard error over the parts of a cross-validation."""

    @property
    def unseen(self) -> NDArray[np.bool_]:
        """(N,) the test images that the gate may judge it by."""
        return np.ones(self.evaluation.num_images, bool) if self.known is None else ~self.known

    @property
    def cross_validation_text(self) -> str:
        """Percent and standard error: 96.1 ± 0.4."""
        if self.cross_validated is None:
            return "–"
        mean, error = self.cross_validated
        return f"{100 * mean:.1f} ± {100 * error:.1f}"

    @property
    def random_weights(self) -> bool:
        """Whether it is a network that started from random weights."""
        return self.weights == "random"

    @property
    def display_name(self) -> str:
        """The name, marked where the model started from random weights."""
        return f"{self.name} (random weights)" if self.random_weights else self.name

    def __str__(self) -> str:
        return f"{self.name} (version {self.version})"


@dataclass(frozen=True, kw_only=True)
class Unmeasured:
    """A registered model version that could not be measured on the test images."""

    name: str
    version: str
    problem: str
    """The end of a sentence about it: could not be loaded."""

    def __str__(self) -> str:
        return f"{self.name} (version {self.version})"
