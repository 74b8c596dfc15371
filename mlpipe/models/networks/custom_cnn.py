"""custom_cnn: the report's network, and a faster and better one for small images.

This file travels with every logged model of it, so it imports nothing of mlpipe.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F


def build(num_classes: int, variant: str = "standard", width: float = 1.0, depth: int = 1) -> nn.Module:
    """The network of that variant (`standard` or `small_images`), with random weights.

    Args:
        width: multiple of its channels.
        depth: multiple of its convolutions of each size of features.
    """
    return (SmallImageCNN if variant == "small_images" else CustomCNN)(num_classes, width, depth)


def _times(channels: int, width: float) -> int:
    """Channels of a wider or narrower network: a multiple of 8, which processors compute fastest with."""
    return max(8, 8 * round(channels * width / 8))


class ByteDropout(nn.Dropout):
    """Dropout whose probability is a multiple of 1/256.

    On a CPU it draws one random byte for an element, eight from each number of the generator; `nn.Dropout` draws a
    floating-point number each, serially, which was a fifth of the report's network's whole step.
    """

    def forward(self, values: Tensor) -> Tensor:
        """As `nn.Dropout`."""
        if not self.training or values.device.type != "cpu":
            return super().forward(values)
        numbers = torch.empty((values.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        random_bytes = numbers.view(torch.uint8)[: values.numel()].view(values.shape)
        kept = (random_bytes >= round(self.p * 256)).to(values.dtype)
        return values * kept.mul_(1 / (1 - self.p))


def adaptive_average(features: Tensor, size: int) -> Tensor:
    """(B, C, H, W) to (B, C, size, size), like PyTorch's own, whose gradients are not repeatable on a GPU."""
    for _ in range(2):
        length = features.shape[-1]
        weights = F.adaptive_avg_pool1d(torch.eye(length, device=features.device), size).T
        features = F.linear(features, weights).transpose(-1, -2)
    return features


class CustomCNN(nn.Module):
    """The report's network: two convolutions with pooling, then two linear layers.

    Images of any size are pooled to 8×8 features, which for 32×32 images they already are.
    """

    def __init__(self, num_classes: int, width: float = 1.0, depth: int = 1) -> None:
        super().__init__()
        first, second, hidden = (_times(channels, width) for channels in (32, 64, 256))
        layers: list[nn.Module] = []
        for num_inputs, num_outputs in ((3, first), (first, second)):
            # ReLU after pooling, with which it commutes: a quarter of the work
            layers += [nn.Conv2d(num_inputs, num_outputs, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(inplace=True)]
            for _ in range(depth - 1):
                layers += [nn.Conv2d(num_outputs, num_outputs, 3, padding=1), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            ByteDropout(0.5),
            nn.Linear(second * 8 * 8, hidden),
            nn.ReLU(inplace=True),
            ByteDropout(0.25),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32, normalised, to (B, num_classes) logits."""
        features = self.features(images)
        if features.shape[-2:] != (8, 8):
            features = adaptive_average(features, 8)
        return self.classifier(features.flatten(1))


MOMENTUM = 0.4
"""Share of a batch in the running mean and variance: few batches are seen."""


class Total(torch.autograd.Function):
    """The sum over all processes that train together."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        """In each process."""
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        """What each process has added counts in all of them."""
        return Total.forward(_, gradient)


class Shift(nn.BatchNorm2d):
    """Batch normalization without a scale; its shift learns fast.

    The shift is a parameter times `SPEED`, so that its gradient and its steps are each so much larger. Processes that
    train together normalize by the statistics of all their images; PyTorch's `SyncBatchNorm` would have no shift.
    """

    SPEED = 15.0

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, eps=1e-6, momentum=MOMENTUM, affine=False)
        self.shift = nn.Parameter(torch.zeros(num_channels))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        shift = self.shift * self.SPEED
        if self.training and distributed.is_available() and distributed.is_initialized():
            return self._over_all_processes(images, shift)
        how = self.training, self._share, self.eps
        return F.batch_norm(images, self.running_mean, self.running_var, torch.ones_like(shift), shift, *how)

    @property
    def _share(self) -> float:
        """Of a batch in the running mean and variance; without a momentum, all batches have the same, as in PyTorch."""
        if self.momentum is None and self.num_batches_tracked is not None:
            return 1 / float(self.num_batches_tracked)
        return MOMENTUM

    def _over_all_processes(self, images: Tensor, shift: Tensor) -> Tensor:
        values = images.float()
        sums = [each.sum(dim=(0, 2, 3)) for each in (torch.ones_like(values), values, values.square())]
        number, total, squares = Total.apply(torch.stack(sums))
        mean = total / number
        variance = squares / number - mean.square()
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self._share)
                self.running_var.lerp_(variance * number / (number - 1), self._share)
        scale = (variance.clamp(min=0) + self.eps).rsqrt()
        return (values * scale[:, None, None] + (shift - mean * scale)[:, None, None]).to(images.dtype)


class Block(nn.Module):
    """Convolution, pooling to half the size, and a second convolution (with `depth` d: 2·d - 1), each normalized."""

    def __init__(self, num_inputs: int, num_outputs: int, depth: int = 1) -> None:
        super().__init__()
        self.first = _convolution(num_inputs, num_outputs)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = Shift(num_outputs)
        self.second = _convolution(num_outputs, num_outputs)
        self.norm2 = Shift(num_outputs)
        layers: list[nn.Module] = []
        for _ in range(2 * (depth - 1)):
            layers += [_convolution(num_outputs, num_outputs), Shift(num_outputs), nn.GELU()]
        self.more = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """(B, num_inputs, H, W) to (B, num_outputs, H // 2, W // 2)."""
        features = F.gelu(self.norm1(self.pool(self.first(images))))
        return self.more(F.gelu(self.norm2(self.second(features))))


def _convolution(num_inputs: int, num_outputs: int) -> nn.Conv2d:
    """Begins by passing on its inputs, as far as it has outputs for them."""
    convolution = nn.Conv2d(num_inputs, num_outputs, kernel_size=3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight[:num_inputs])
    return convolution


class SmallImageCNN(nn.Module):
    """The `small_images` form of `custom_cnn`: a 2×2 convolution, three blocks, the maximum, a linear layer.

    After the network of K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv:2404.00498. The first
    convolution is not trained: the training sets it to whiten the 2×2 patches of its images.
    """

    STEM_CHANNELS = 24
    WIDTHS = (64, 256, 256)
    HEAD_STD, HEAD_DIVISOR = 0.02, 5.0
    """Of the last layer's initial weights and of its outputs; so scaled, it learns as fast as the convolutions."""

    def __init__(self, num_classes: int, width: float = 1.0, depth: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, self.STEM_CHANNELS, kernel_size=2).requires_grad_(False)
        widths = (self.STEM_CHANNELS, *(_times(channels, width) for channels in self.WIDTHS))
        self.blocks = nn.Sequential(*(Block(*pair, depth) for pair in pairwise(widths)))
        self.classifier = nn.Linear(widths[-1], num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=self.HEAD_STD)

    @property
    def whitened(self) -> nn.Conv2d:
        """The convolution that the training sets before its first step."""
        return self.stem

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32, normalised, to (B, num_classes) logits."""
        features = self.blocks(F.gelu(self.stem(images)))
        return self.classifier(features.amax(dim=(2, 3))) / self.HEAD_DIVISOR
