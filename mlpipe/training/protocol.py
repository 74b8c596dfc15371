"""What training needs from outside, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mlpipe.models import portable
from mlpipe.models.portable import ModelDescription, resize

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

    from mlpipe.data.dataset import Split

BYTES_PER_CALL = 6 << 20
"""Pixels that a model in memory is given at once, as many as it enlarges them to: 2048 images of 32×32."""


class TrainingLogger(Protocol):
    """Where metrics go. Trainers know nothing more about tracking."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Write metrics of one epoch; `step` is the epoch, from 1."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Write facts that hold for the whole run; repeating them, as a retry does, is harmless."""

    def ensure_current(self) -> None:
        """See that no later attempt of the task has taken over; called before anything is written.

        Raises:
            SupersededError: one has.
        """

    def last_logged_step(self, metric: str) -> int:
        """The largest step at which an earlier attempt wrote the metric; 0: never.

        A resumed training logs each later epoch, and none of those up to this one again.
        """


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model that has learned, and how it went."""

    description: ModelDescription
    """How raw images become its input, and its outputs class names."""
    predictor: nn.Module | Pipeline
    """The network, on the CPU, with the weights of its best epoch; or the fitted scikit-learn estimator."""
    metrics: Mapping[str, float]
    """val/accuracy and val/loss of these weights."""
    train_seconds: float
    """Duration of all epochs with their validation, over all attempts; of an estimator's fit."""
    images_per_second: float
    """Training images over seconds of training proper."""
    epochs_run: int
    """Epochs until training ended; 1 for estimators."""
    best_epoch: int
    """The epoch, from 1, whose weights these are."""

    def probabilities_of(self, split: Split) -> NDArray[np.floating[Any]]:
        """(N, number of classes) for all images of a split, part by part; on the GPU where there is one."""
        network = self.predictor if isinstance(self.predictor, nn.Module) and torch.cuda.is_available() else None
        if network:
            network.to("cuda")
        side, stored = self.description.input_size or self.description.image_size, split.images_u8.shape[1]
        parts = split.images_u8.slices(BYTES_PER_CALL * stored**2 // max(stored, side) ** 2)
        probabilities = np.concatenate([self.probabilities(split.images_u8[part]) for part in parts])
        if network:
            network.to("cpu")
        return probabilities

    @torch.inference_mode()
    def probabilities(self, images_u8: NDArray[np.uint8]) -> NDArray[np.floating[Any]]:
        """What the model in memory makes of (N, H, W, 3) images: (N, number of classes). Packaging is checked by it."""
        images = resize(torch.from_numpy(images_u8), self.description.image_size)
        if self.description.kind == "estimator":
            features = portable.load_function(self.description.code)
            return portable.estimator_probabilities(self.predictor, self.description, features(images))
        device = next((each.device for each in self.predictor.parameters()), None)
        mean = torch.tensor(self.description.channel_mean, device=device).view(3, 1, 1)
        std = torch.tensor(self.description.channel_std, device=device).view(3, 1, 1)
        return portable.network_probabilities(self.predictor, self.description, images.to(device), mean, std)
