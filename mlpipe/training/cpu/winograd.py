"""Wide 3×3 convolutions with a quarter of the multiplications, for processors that train in float32.

Winograd's minimal filtering F(4×4, 3×3), after A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural
Networks" (CVPR 2016): a tile of 6×6 inputs and the kernel are transformed by additions, multiplied value by value, and
transformed to 4×4 outputs: 36 multiplications for what takes 144. Over all channels and tiles those are 36 products of
matrices. The transforms cost about as much as products of 100 channels, so that narrow layers keep PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

TILE = 4
"""Height and width of the outputs of a tile; it reads two more each way."""
MIN_CHANNELS = 128
"""Inputs and outputs from which it is used, and"""
MIN_TILES = 128
"""tiles of a batch."""
CHUNK = 2**16
"""Tiles times channels that are transformed at once: 9 MB."""

_POINTS = torch.tensor(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    dtype=torch.float64,
)
_KERNEL_TRANSFORM = torch.kron(_POINTS, _POINTS)
"""(36, 9): a 3×3 kernel to what a transformed tile is multiplied by."""


@contextmanager
def winograd_convolutions(network: nn.Module) -> Iterator[None]:
    """Within it, the wide 3×3 convolutions of the network are computed so: the same values, up to rounding."""
    wide = [module for module in network.modules() if type(module) is nn.Conv2d and _is_wide(module)]
    for convolution in wide:
        convolution.forward = partial(_forward, convolution)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for convolution in wide:
            del convolution.forward


def _is_wide(convolution: nn.Conv2d) -> bool:
    shape = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    return (
        shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
        and convolution.padding_mode == "zeros"
        and min(convolution.in_channels, convolution.out_channels) >= MIN_CHANNELS
    )


def _forward(convolution: nn.Conv2d, images: Tensor) -> Tensor:
    rows, columns = _tiles(images.shape[2], images.shape[3])
    if len(images) * rows * columns < MIN_TILES:
        return F.conv2d(images, convolution.weight, convolution.bias, padding=1)
    outputs = convolve(images, convolution.weight)
    return outputs if convolution.bias is None else outputs + convolution.bias[:, None, None]


def convolve(images: Tensor, kernels: Tensor) -> Tensor:
    """(B, C, H, W) with (K, C, 3, 3), padded by zeros to the same size: (B, K, H, W), channels last in memory."""
    result: Tensor = _Convolution.apply(images, kernels)
    return result


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, kernels: Tensor) -> Tensor:
        padded = _padded(images)
        ctx.save_for_backward(padded, kernels)
        return _convolved(padded, kernels, images.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        padded, kernels = ctx.saved_tensors
        for_images = for_kernels = None
        if ctx.needs_input_grad[0]:
            turned = kernels.flip(2, 3).transpose(0, 1)
            for_images = _convolved(_padded(gradient), turned, gradient.shape)
        if ctx.needs_input_grad[1]:
            for_kernels = _kernel_gradient(padded, gradient)
        return for_images, for_kernels


def _tiles(height: int, width: int) -> tuple[int, int]:
    return -(-height // TILE), -(-width // TILE)


def _padded(images: Tensor) -> Tensor:
    """(B, C, H, W) to (B, 4·rows + 2, 4·columns + 2, C): one zero before, the others behind."""
    height, width = images.shape[2:]
    rows, columns = _tiles(height, width)
    behind = TILE * rows + 1 - height, TILE * columns + 1 - width
    return F.pad(images.permute(0, 2, 3, 1), (0, 0, 1, behind[1], 1, behind[0]))


def _chunks(num_images: int, tiles: tuple[int, int], num_channels: int) -> Iterator[slice]:
    size = max(1, CHUNK // (tiles[0] * tiles[1] * num_channels))
    for start in range(0, num_images, size):
        yield slice(start, min(start + size, num_images))


def _convolved(padded: Tensor, kernels: Tensor, shape: torch.Size) -> Tensor:
    """(B, K, H, W) of that batch, height and width."""
    batch, _, height, width = shape
    num_outputs, num_inputs = kernels.shape[:2]
    tiles = _tiles(height, width)
    factors = _KERNEL_TRANSFORM.to(kernels.dtype) @ kernels.permute(3, 2, 1, 0).reshape(9, -1)
    factors = factors.view(36, num_inputs, num_outputs)
    outputs = padded.new_empty(batch, tiles[0], TILE, tiles[1], TILE, num_outputs)
    for chunk in _chunks(batch, tiles, max(num_inputs, num_outputs)):
        values = _input_tiles(padded[chunk])
        products = torch.bmm(values.flatten(2, 4).flatten(0, 1), factors).view(*values.shape[:5], num_outputs)
        half = products.new_empty(TILE, *products.shape[1:])
        _to_outputs(products, half)
        _to_outputs(half.transpose(0, 1), outputs[chunk].permute(2, 4, 0, 1, 3, 5))
    whole = outputs.view(batch, TILE * tiles[0], TILE * tiles[1], num_outputs)
    return whole[:, :height, :width].permute(0, 3, 1, 2)


def _kernel_gradient(padded: Tensor, gradient: Tensor) -> Tensor:
    """(K, C, 3, 3)."""
    batch, num_outputs, height, width = gradient.shape
    num_inputs = padded.shape[3]
    tiles = rows, columns = _tiles(height, width)
    spare = (0, 0, 0, TILE * columns - width, 0, TILE * rows - height)
    outputs = F.pad(gradient.permute(0, 2, 3, 1), spare).contiguous()
    outputs = outputs.view(batch, rows, TILE, columns, TILE, num_outputs).permute(4, 2, 0, 1, 3, 5)
    factors = padded.new_zeros(36, num_inputs, num_outputs)
    for chunk in _chunks(batch, tiles, max(num_inputs, num_outputs)):
        values = _input_tiles(padded[chunk])
        half = padded.new_empty(6, TILE, *outputs[:, :, chunk].shape[2:])
        _from_outputs(outputs[:, :, chunk], half)
        products = padded.new_empty(6, 6, *half.shape[2:])
        _from_outputs(half.transpose(0, 1), products.transpose(0, 1))
        factors.baddbmm_(values.flatten(2, 4).flatten(0, 1).transpose(1, 2), products.flatten(2, 4).flatten(0, 1))
    kernels = _KERNEL_TRANSFORM.to(factors.dtype).T @ factors.view(36, -1)
    return kernels.view(3, 3, num_inputs, num_outputs).permute(3, 2, 1, 0)


def _input_tiles(padded: Tensor) -> Tensor:
    """(n, 4·rows + 2, 4·columns + 2, C) to the transformed tiles, (6, 6, n, rows, columns, C); columns come first."""
    by_row = padded.unfold(1, TILE + 2, TILE).permute(4, 0, 1, 2, 3)
    half = padded.new_empty(by_row.shape)
    _from_inputs(by_row, half)
    by_column = half.unfold(3, TILE + 2, TILE).permute(5, 0, 1, 2, 3, 4)
    tiles = padded.new_empty(by_column.shape)
    _from_inputs(by_column, tiles)
    return tiles


def _from_inputs(inputs: Tensor, out: Tensor) -> None:
    """(6, …) to (6, …): Bᵀ of the paper."""
    torch.sub(inputs[4:6], inputs[2:4], alpha=5, out=out[0:6:5]).add_(inputs[0:2], alpha=4)
    odd, even = torch.sub(inputs[3:5], inputs[1:3], alpha=4)
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    odd, even = inputs[3:5] - inputs[1:3]
    torch.add(even, odd, alpha=2, out=out[3])
    torch.sub(even, odd, alpha=2, out=out[4])


def _to_outputs(products: Tensor, out: Tensor) -> None:
    """(6, …) to (4, …): Aᵀ of the paper."""
    sums = products[1:4:2] + products[2:5:2]
    differences = products[1:4:2] - products[2:5:2]
    torch.add(products[0], sums[0], out=out[0]).add_(sums[1])
    torch.add(differences[0], differences[1], alpha=2, out=out[1])
    torch.add(sums[0], sums[1], alpha=4, out=out[2])
    torch.add(differences[0], differences[1], alpha=8, out=out[3]).add_(products[5])


def _from_outputs(outputs: Tensor, out: Tensor) -> None:
    """(4, …) to (6, …): A of the paper, the way back of `_to_outputs`."""
    out[0:6:5].copy_(outputs[0:4:3])
    even, odd = outputs[0:2] + outputs[2:4]
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    even, odd = torch.add(outputs[0:2], outputs[2:4], alpha=4)
    torch.add(even, odd, alpha=2, out=out[3])
    torch.sub(even, odd, alpha=2, out=out[4])
