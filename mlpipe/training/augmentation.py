"""Random changes of training images, a whole batch at a time, on whatever device it is on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mlpipe.config import Augmentation, Mixing

KNUTH = 2654435761
"""Multiplier of D. Knuth's hash (The Art of Computer Programming, 6.4)."""


BRIGHTNESS, CONTRAST = 9.0, 0.14
"""Of `flip_crop_color`: largest change of all pixels, of 255, and largest share by which they move from or to 128."""
GROUPS = 32
"""Parts of a batch that are each given a change of their own by `trivial`."""
MIXUP_ALPHA, CUTMIX_ALPHA = 0.2, 1.0
"""Of the shares' distribution: H. Zhang et al., arXiv:1710.09412 (for ImageNet); S. Yun et al., arXiv:1905.04899."""


def augment(images_u8: Tensor, kind: Augmentation, epoch: int) -> Tensor:
    """Change each image of a batch.

    `flip` mirrors half of them horizontally, and in the next epoch the other half: so each image is seen both ways in
    any two epochs (K. Jordan, arXiv:2404.00498, section 3.6). `crop` shifts each by up to a sixteenth of its size or
    one pixel, both ways, drawn from the device's default generator, the gap being filled by reflection; `flip_crop`
    does both. All are one gather. `flip_crop_color` also changes each image's brightness and contrast a little (after
    https://github.com/hiverge/cifar10-speedrun, 2025). `trivial` follows `flip_crop` by one change of color or geometry
    (S. Müller, F. Hutter, arXiv:2103.10158) that every thirty-second part of the batch draws for itself.

    Args:
        images_u8: (B, H, W, C) uint8.
        epoch: from 0.

    Returns:
        The same shape and type; with `none` the very same tensor.
    """
    if kind == "none":
        return images_u8
    batch, height, width, channels = images_u8.shape
    device = images_u8.device
    rows = torch.arange(height, device=device).expand(batch, height)
    columns = torch.arange(width, device=device).expand(batch, width)
    if kind != "flip":
        rows = _shifted(rows, height)
        columns = _shifted(columns, width)
    if kind != "crop":
        # Whether an image begins mirrored depends on its own bytes, so nothing has to be kept for it.
        drawn = images_u8.flatten(1).sum(dim=1, dtype=torch.int64) * KNUTH >> 16
        mirrored = ((drawn + epoch) % 2 == 1)[:, None]
        columns = torch.where(mirrored, width - 1 - columns, columns)
    first_row = torch.arange(0, batch * height, height, device=device)[:, None]
    pixels = ((first_row + rows) * width)[:, :, None] + columns[:, None, :]  # (B, H, W) index of the source pixel
    gathered = images_u8.reshape(-1, channels).index_select(0, pixels.reshape(-1))
    changed = gathered.view(batch, height, width, channels)
    if kind == "flip_crop_color":
        return _recolored(changed)
    return _trivial(changed) if kind == "trivial" else changed


def _recolored(images_u8: Tensor) -> Tensor:
    brightness, contrast = (torch.rand(2, len(images_u8), 1, 1, 1, device=images_u8.device) * 2 - 1).unbind()
    pixels = (images_u8.float() - 128).mul_(1 + CONTRAST * contrast).add_(128.5 + BRIGHTNESS * brightness)
    return pixels.clamp_(0, 255).to(torch.uint8)  # rounded, by the half that was added


def _trivial(images_u8: Tensor) -> Tensor:
    from torchvision.transforms.v2 import TrivialAugmentWide

    change = TrivialAugmentWide()
    parts = [change(part) for part in images_u8.permute(0, 3, 1, 2).split(-(-len(images_u8) // GROUPS))]
    return torch.cat(parts).permute(0, 2, 3, 1)


def mix(images: Tensor, labels: Tensor, kind: Mixing, num_classes: int) -> tuple[Tensor, Tensor]:
    """Blend each image of a batch with its neighbor, by one share for all.

    Args:
        images: (B, C, H, W) float32.
        labels: (B,) int64.

    Returns:
        The same shapes; but the labels are (B, num_classes) shares where images were blended.
    """
    if kind == "none":
        return images, labels
    from torchvision.transforms.v2 import CutMix, MixUp

    blend = (
        MixUp(alpha=MIXUP_ALPHA, num_classes=num_classes)
        if kind == "mixup"
        else CutMix(alpha=CUTMIX_ALPHA, num_classes=num_classes)
    )
    blended, shares = blend(images, labels)
    return blended, shares


def _shifted(positions: Tensor, size: int) -> Tensor:
    """(B, size) positions moved by one random offset per image, reflected at the borders."""
    reach = max(1, size // 16)
    offset = torch.randint(-reach, reach + 1, (len(positions), 1), device=positions.device)
    moved = (positions + offset).abs()
    return (size - 1) - ((size - 1) - moved).abs()


def shrink(images: Tensor, image_size: int) -> Tensor:
    """(B, C, H, W) float32 to (B, C, image_size, image_size), bilinear, antialiased, channels last in memory."""
    if images.shape[-2:] == (image_size, image_size):
        return images
    smaller = F.interpolate(images, size=(image_size, image_size), mode="bilinear", antialias=True)
    return smaller.contiguous(memory_format=torch.channels_last)
