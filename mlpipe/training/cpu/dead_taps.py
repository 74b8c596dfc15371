"""Parts of convolution kernels that only ever meet padding.

A 3×3 kernel on a map of 1×1 multiplies eight of its nine taps by zeros. At 32×32 pixels that is the last stage of a
ResNet: two thirds of all its weights, which then never get a gradient, but are cast, multiplied and updated each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Trimmed:
    convolution: nn.Conv2d
    whole: Tensor
    taps: tuple[slice, slice]
    padding: tuple[int, int]


class TrimmedKernels:
    """A network whose kernels are without their dead taps, until `restore` puts them back as they were.

    What the network computes is the same, up to the order of additions, for images of the given size; the dead taps
    keep their initial values, as they would have (but for a weight decay, which cannot be seen at this size).
    """

    def __init__(self, network: nn.Module, image_size: int) -> None:
        """Trim in place.

        Args:
            network: its mode and its buffers stay as they are.
            image_size: height and width of the images that it will be trained on, pixels.
        """
        self._trimmed = [
            trimmed
            for convolution, size in _input_sizes(network, image_size)
            if (trimmed := _trim(convolution, size)) is not None
        ]

    def __len__(self) -> int:
        return len(self._trimmed)

    def restore(self) -> None:
        """Put the trained taps into the whole kernels."""
        for trimmed in self._trimmed:
            convolution, (rows, columns) = trimmed.convolution, trimmed.taps
            whole = trimmed.whole
            whole[:, :, rows, columns] = convolution.weight.detach().to(whole.device)
            convolution.weight = nn.Parameter(whole, requires_grad=convolution.weight.requires_grad)
            convolution.kernel_size = (whole.shape[2], whole.shape[3])
            convolution.padding = trimmed.padding
        self._trimmed = []


def _input_sizes(network: nn.Module, image_size: int) -> list[tuple[nn.Conv2d, tuple[int, int]]]:
    """Each convolution that is called once in a pass, and the height and width of what it is called with."""
    sizes: dict[nn.Conv2d, list[tuple[int, int]]] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Conv2d):
            sizes.setdefault(module, []).append((inputs[0].shape[-2], inputs[0].shape[-1]))

    convolutions = [module for module in network.modules() if type(module) is nn.Conv2d]
    if not convolutions:
        return []
    hooks = [convolution.register_forward_pre_hook(note) for convolution in convolutions]
    was_training = network.training
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, image_size, image_size, dtype=convolutions[0].weight.dtype))
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    return [(convolution, seen[0]) for convolution, seen in sizes.items() if len(set(seen)) == 1]


def _trim(convolution: nn.Conv2d, size: tuple[int, int]) -> _Trimmed | None:
    if isinstance(convolution.padding, str) or convolution.padding_mode != "zeros":
        return None
    kernel, stride = convolution.kernel_size, convolution.stride
    padding, dilation = convolution.padding, convolution.dilation
    live = [_live_taps(size[i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1)]
    if live[0] is None or live[1] is None or all(len(live[i] or ()) == kernel[i] for i in (0, 1)):
        return None
    taps = slice(live[0].start, live[0].stop), slice(live[1].start, live[1].stop)
    whole = convolution.weight.detach()
    trimmed = _Trimmed(convolution, whole, taps, (int(padding[0]), int(padding[1])))
    kept = whole[:, :, taps[0], taps[1]].clone(memory_format=torch.channels_last)
    convolution.weight = nn.Parameter(kept, requires_grad=convolution.weight.requires_grad)
    convolution.kernel_size = (len(live[0]), len(live[1]))
    convolution.padding = (padding[0] - live[0].start * dilation[0], padding[1] - live[1].start * dilation[1])
    return trimmed


def _live_taps(size: int, kernel: int, stride: int, padding: int, dilation: int) -> range | None:
    """The taps along one axis that meet an input somewhere; `None` where they cannot be kept alone."""
    num_outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    live = [
        tap
        for tap in range(kernel)
        if any(0 <= out * stride - padding + tap * dilation < size for out in range(num_outputs))
    ]
    if not live:
        return None
    kept = range(live[0], live[-1] + 1)
    left = padding - kept.start * dilation
    same_outputs = (size + 2 * left - dilation * (len(kept) - 1) - 1) // stride + 1 == num_outputs
    return kept if left >= 0 and same_outputs else None
