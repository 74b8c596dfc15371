"""Networks of the library timm (https://github.com/huggingface/pytorch-image-models).

This file travels with every logged model of them, so it imports nothing of mlpipe.
"""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

PREFIX = "timm_"


def build(architecture: str, num_classes: int, image_size: int) -> nn.Module:
    """The network with random weights, for images of `image_size` × `image_size` pixels.

    Args:
        architecture: timm's name behind `timm_`.
    """
    name = architecture.removeprefix(PREFIX)
    options: dict[str, Any] = {"pretrained": False, "num_classes": num_classes}
    try:
        return timm.create_model(name, **options, img_size=image_size)
    except TypeError:  # most networks take any size, and no such argument
        return timm.create_model(name, **options)
