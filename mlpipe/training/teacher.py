"""Distillation: a network learns from a trained network's softened answers beside the labels.

Source: G. Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mlpipe.data.dataset import Split
from mlpipe.errors import UserError
from mlpipe.models.package import download_packaged_model, read_network
from mlpipe.models.portable import ImageClassifier, enlarge, images_per_pass, normalise, resize

logger = logging.getLogger(__name__)

TEMPERATURE = 4.0
"""Divides the logits of both."""
WEIGHT = 0.7
"""Of the teacher's answers in the loss; the labels have the rest."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Teacher:
    """A trained network of the same classes."""

    classifier: ImageClassifier
    order: Tensor
    """(K,) the position of each of the student's classes among the teacher's, on the device of its answers."""
    files: Mapping[str, Tensor]
    """The logged network's, (bytes,) uint8 by name."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process reads the files itself: it lacks the network's class, and has a device of its own."""
        return _unpickled, (self.files, tuple(self.classifier.description.classes[i] for i in self.order.tolist()))

    @torch.no_grad()
    def logits(self, images_u8: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to (B, K) float32, in the order of the student's classes."""
        known, device = self.classifier, self.classifier.device
        images = resize(images_u8.to(device), known.description.image_size)
        images = enlarge(normalise(images, known.mean, known.std), known.description.input_size)
        return known.predictor(images).float()[:, self.order].to(images_u8.device)

    def answers(self, split: Split) -> Tensor:
        """(N, K) logits of all images of a split, in its order."""
        side = self.classifier.description.input_size or self.classifier.description.image_size
        length = images_per_pass(side**2, self.classifier.device)
        starts = range(0, len(split), length)
        return torch.cat([self.logits(torch.from_numpy(split.images_u8[at : at + length])) for at in starts])


def load_teacher(uri: str, classes: tuple[str, ...]) -> Teacher:
    """The network that a `models:/…` address names.

    Args:
        classes: of the student.

    Raises:
        UserError: it cannot be had, is no network of this project, or has other classes.
    """
    with tempfile.TemporaryDirectory(prefix="mlpipe-teacher-") as folder:
        description, weights = download_packaged_model(uri, Path(folder), field="teacher")
        if set(description.classes) != set(classes):
            raise UserError(f"teacher: {uri} has other classes than the data set; give a network of the same classes")
        teacher = _read_teacher(weights.parent, classes)
    logger.info("a %s teaches: %s", description.architecture, uri)
    return teacher


def _read_teacher(folder: Path, classes: tuple[str, ...]) -> Teacher:
    """The network of the files of `write_files`."""
    classifier = read_network(folder)
    known = classifier.description.classes
    return Teacher(
        classifier=classifier,
        order=torch.tensor([known.index(name) for name in classes], device=classifier.device),
        files={path.name: torch.from_numpy(np.fromfile(path, np.uint8)) for path in folder.iterdir() if path.is_file()},
    )


def _unpickled(files: Mapping[str, Tensor], classes: tuple[str, ...]) -> Teacher:
    with tempfile.TemporaryDirectory(prefix="mlpipe-teacher-") as folder:
        for name, content in files.items():
            content.numpy().tofile(Path(folder, name))
        return _read_teacher(Path(folder), classes)


def distillation_loss(logits: Tensor, taught: Tensor) -> Tensor:
    """Mean divergence of the student's softened answers from the teacher's, times the temperature squared.

    So scaled, its gradients stay as large as those of the labels.

    Args:
        logits, taught: (B, K) of the student and of the teacher.
    """
    student = F.log_softmax(logits / TEMPERATURE, dim=1)
    teacher = F.log_softmax(taught / TEMPERATURE, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * TEMPERATURE**2
