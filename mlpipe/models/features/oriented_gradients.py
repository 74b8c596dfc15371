"""Histograms of oriented gradients, and coarse colors, as features of a linear model.

This file travels with every logged model that sees them, so it imports nothing of mlpipe.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

HOG_CELL = 4
"""Height and width of a cell of oriented gradients, pixels."""
HOG_ORIENTATIONS = 9


def features(images_u8: Tensor) -> NDArray[np.float32]:
    """(B, H, W, 3) uint8 to (B, D) float32: oriented gradients, then the mean color of each cell."""
    images = images_u8.permute(0, 3, 1, 2).to(torch.float32) / 255
    colors = F.avg_pool2d(images, HOG_CELL).flatten(1) / 2
    return torch.cat([oriented_gradients(images), colors], dim=1).numpy()


def oriented_gradients(images: Tensor) -> Tensor:
    """Histograms of oriented gradients: (B, 3, H, W) in 0..1 to (B, D).

    After Dalal and Triggs, "Histograms of Oriented Gradients for Human Detection" (CVPR 2005): square root of the
    intensities, at each pixel the channel of largest gradient, 9 unsigned orientations shared between the two nearest,
    cells of 4×4 pixels, blocks of 2×2 cells normalised by L2 with clipping at 0.2.
    """
    padded = F.pad(images.sqrt(), (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    strongest = (across.square() + down.square()).argmax(dim=1, keepdim=True)
    across, down = across.gather(1, strongest), down.gather(1, strongest)  # (B, 1, H, W)
    magnitude = torch.hypot(across, down)
    position = torch.atan2(down, across) * (HOG_ORIENTATIONS / torch.pi)
    below = position.floor()
    share = position - below
    votes = torch.zeros(len(images), HOG_ORIENTATIONS, *images.shape[2:])
    votes.scatter_(1, below.long() % HOG_ORIENTATIONS, magnitude * (1 - share))
    votes.scatter_add_(1, (below.long() + 1) % HOG_ORIENTATIONS, magnitude * share)
    blocks = F.unfold(F.avg_pool2d(votes, HOG_CELL), kernel_size=2)  # (B, 4·orientations, number of blocks)
    for _ in range(2):
        blocks = blocks / (blocks.square().sum(dim=1, keepdim=True) + 1e-4).sqrt()
        blocks = blocks.clamp(max=0.2)
    return blocks.flatten(1)
