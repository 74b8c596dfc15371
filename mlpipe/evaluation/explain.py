"""Why a network answers as it does: training images that look alike to it, and where it looked.

Source: R. Selvaraju et al., "Grad-CAM", ICCV 2017, by the library Captum.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from captum.attr import LayerAttribution, LayerGradCam
from numpy.typing import NDArray
from torch import Tensor, nn

from mlpipe.data.dataset import Split
from mlpipe.models.features.last_layer import inputs_of
from mlpipe.models.portable import ImageClassifier, enlarge, images_per_pass, normalise

MAX_TRAINING_IMAGES = 4_000
"""Training images that are searched for look-alikes, evenly spread over the split."""

MIN_MAP = 4
"""Least height and width of the map that places are read from, pixels."""


class Explainer:
    """Looks into a logged network."""

    def __init__(self, classifier: ImageClassifier, head: nn.Linear, last_convolution: nn.Conv2d) -> None:
        """Use `of`."""
        self._classifier = classifier
        self._head = head
        self._cam = LayerGradCam(classifier.predictor, last_convolution)

    @classmethod
    def of(cls, classifier: object) -> Self | None:
        """An explainer; `None` for other models than networks that end in a linear layer behind convolutions."""
        if not isinstance(getattr(classifier, "predictor", None), nn.Module):
            return None
        modules = list(classifier.predictor.modules())  # type: ignore[attr-defined]
        heads = [each for each in modules if isinstance(each, nn.Linear)]
        convolutions = _with_a_map(classifier)  # type: ignore[arg-type]
        return cls(classifier, heads[-1], convolutions[-1]) if heads and convolutions else None  # type: ignore[arg-type]

    def look_alikes(self, images_u8: NDArray[np.uint8], training: Split, k: int) -> NDArray[np.int64]:
        """(N, k) rows of the training images whose features are the nearest by cosine, the nearest first.

        Features are what the network's last linear layer gets.

        Args:
            images_u8: (N, H, W, 3).
        """
        rows = np.unique(np.linspace(0, len(training) - 1, MAX_TRAINING_IMAGES).astype(np.int64))
        known = self._features(training.images_u8.take(rows))
        closeness = self._features(images_u8) @ known.T
        return rows[closeness.topk(min(k, len(rows)), dim=1).indices.numpy()]

    def attention(self, images_u8: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.float32]:
        """(N, H, W) how much each place speaks for the label, 0 to 1.

        Args:
            images_u8: (N, H, W, 3).
            labels: (N,) classes whose evidence is asked for.
        """
        inputs = self._inputs(torch.from_numpy(images_u8)).requires_grad_()
        targets = torch.from_numpy(labels).to(inputs.device)
        maps = self._cam.attribute(inputs, target=targets, relu_attributions=True)
        maps = LayerAttribution.interpolate(maps, images_u8.shape[1:3], "bilinear")[:, 0].detach().cpu()
        maps /= maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        return maps.numpy()

    @torch.inference_mode()
    def _features(self, images_u8: NDArray[np.uint8]) -> Tensor:
        """(N, D) of length 1."""
        size = self._classifier.description.input_size or images_u8.shape[1]
        length = images_per_pass(size**2, self._classifier.device)
        with inputs_of(self._head) as seen:
            for start in range(0, len(images_u8), length):
                self._classifier.predictor(self._inputs(torch.from_numpy(images_u8[start : start + length])))
        return nn.functional.normalize(torch.cat(seen), dim=1)

    def _inputs(self, images_u8: Tensor) -> Tensor:
        classifier = self._classifier
        images = normalise(images_u8.to(classifier.device), classifier.mean, classifier.std)
        return enlarge(images, classifier.description.input_size)


@torch.inference_mode()
def _with_a_map(classifier: ImageClassifier) -> list[nn.Conv2d]:
    """The convolutions whose outputs have places to tell apart, in the order in which they are called."""
    network, found = classifier.predictor, []

    def note(module: nn.Conv2d, _: object, output: Tensor) -> None:
        if min(output.shape[2:]) >= MIN_MAP:
            found.append(module)

    hooks = [each.register_forward_hook(note) for each in network.modules() if isinstance(each, nn.Conv2d)]
    size = classifier.description.input_size or classifier.description.image_size
    try:
        network(torch.zeros(2, 3, size, size, device=classifier.device))
    finally:
        for hook in hooks:
            hook.remove()
    return found
