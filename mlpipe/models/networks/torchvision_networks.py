"""torchvision's classification networks, and a form of its resnets for small images.

This file travels with every logged model of them, so it imports nothing of mlpipe.
"""

from __future__ import annotations

from typing import Any

import torchvision
from torch import nn


def build(architecture: str, num_classes: int, image_size: int, variant: str = "standard") -> nn.Module:
    """The network with random weights, for images of `image_size` × `image_size` pixels.

    Args:
        architecture: torchvision's name.
        variant: `standard`, or `small_images`, which the resnets have.
    """
    if variant == "small_images":
        return _small_images_resnet(torchvision.models.get_model(architecture, weights=None, num_classes=num_classes))
    options: dict[str, Any] = {}
    if architecture in ("googlenet", "inception_v3"):
        # Their auxiliary outputs only helped before batch normalisation. transform_input makes them take the same
        # normalisation as all others, also with ImageNet weights.
        options = {"aux_logits": False, "transform_input": True, "init_weights": True}
    elif architecture.startswith("vit_"):
        options = {"image_size": image_size}
    elif architecture.startswith("maxvit_"):
        options = {"input_size": (image_size, image_size)}
    return torchvision.models.get_model(architecture, weights=None, num_classes=num_classes, **options)


def _small_images_resnet(network: Any) -> nn.Module:
    """Change one of torchvision's resnets, in place, so that its stages give 16, 16, 8 and 4 pixels of 32.

    The first convolution is 3×3 without stride, and no pooling follows it (K. He et al., "Deep Residual Learning",
    section 4.2). Three of the stages halve their maps, and none skips pixels to do so: the maximum behind the
    convolution, as fast CIFAR-10 networks take it, and the mean in the shortcut (T. He et al., "Bag of Tricks", CVPR
    2019). The initial weights are PyTorch's own, which are smaller than torchvision's.
    """
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    for stage in (network.layer1, network.layer3, network.layer4):
        first = stage[0]
        number = 2 if hasattr(first, "conv3") else 1  # of the block's first 3×3 convolution
        setattr(first, f"bn{number}", nn.Sequential(nn.MaxPool2d(2), first.get_submodule(f"bn{number}")))
        first.downsample = nn.Sequential(nn.AvgPool2d(2), *(first.downsample or ()))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            module.reset_parameters()
    return network
