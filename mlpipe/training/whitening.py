"""A first convolution that whitens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAX_IMAGES = 5_000
"""Enough for the covariance of a few numbers."""

REGULARIZATION = 5e-4
"""Added to the eigenvalues, so that directions without variance are not blown up."""


@torch.no_grad()
def whiten(convolution: nn.Conv2d, images: Tensor) -> None:
    """Set its filters to the whitened principal components of the images' patches, and their negatives.

    After "How to train your ResNet", part 8 (D. Page, 2019); the negatives keep what a ReLU behind it would cut off.

    Args:
        convolution: of D = 3·k·k inputs and at most 2·D outputs.
        images: (B, 3, H, W) float32, normalised.
    """
    size = convolution.kernel_size[0]
    patches = images.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * size * size)
    covariance = patches.T.double() @ patches.double() / len(patches)
    values, vectors = torch.linalg.eigh(covariance)
    filters = (vectors / (values + REGULARIZATION).sqrt()).T.flip(0).reshape(-1, 3, size, size)
    filters = torch.cat([filters, -filters])[: convolution.out_channels]
    convolution.weight[: len(filters)] = filters.to(convolution.weight.dtype)
    if convolution.bias is not None:
        convolution.bias.zero_()
