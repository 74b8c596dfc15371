"""A first convolution that whitens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MAX_IMAGES = 5_000
"""About as many are enough for the covariance of a few numbers."""

REGULARIZATION = 5e-4
"""Added to the eigenvalues, so that directions of little variance are not blown up."""


LEAST_VARIANCE = 1e-6
"""Of a direction; below it is rounding, as where a channel is constant or images are grey."""


@torch.no_grad()
def whiten(convolution: nn.Conv2d, batches: Iterable[Tensor]) -> None:
    """Set its filters to the whitened principal components of the images' patches, and their negatives.

    After "How to train your ResNet", part 8 (D. Page, 2019); the negatives keep what a ReLU behind it would cut off.
    Filters that are left over, as where there are directions without variance, keep their values: an output that is
    always the same would be normalized by next to nothing, and the gradients behind it would be infinite.

    Args:
        convolution: of D = 3·k·k inputs and at most 2·D outputs.
        batches: of images (B, 3, H, W), float32, normalised; one is in memory at a time.
    """
    size = convolution.kernel_size[0]
    products, number = torch.zeros(3 * size * size, 3 * size * size, dtype=torch.float64), 0
    for images in batches:
        windows = images.double().unfold(2, size, 1).unfold(3, size, 1)
        patches = windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * size * size)
        products = products.to(images.device) + patches.T @ patches
        number += len(patches)
    values, vectors = torch.linalg.eigh(products / number)
    live = values > LEAST_VARIANCE
    filters = (vectors[:, live] / (values[live] + REGULARIZATION).sqrt()).T.flip(0).reshape(-1, 3, size, size)
    filters = torch.cat([filters, -filters])[: convolution.out_channels]
    convolution.weight[: len(filters)] = filters.to(convolution.weight.dtype)
    if convolution.bias is not None:
        convolution.bias.zero_()
