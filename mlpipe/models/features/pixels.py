"""Pixels as features of a linear model.

This file travels with every logged model that sees them, so it imports nothing of mlpipe.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def features(images_u8: Tensor) -> NDArray[np.float32]:
    """(B, H, W, 3) uint8 to (B, 3·H·W) float32 in 0..1."""
    return images_u8.reshape(len(images_u8), -1).numpy().astype(np.float32) / np.float32(255)
