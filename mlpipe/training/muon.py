"""The optimizer Muon, for convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Muon

MOMENTUM = 0.9


def muon_for_convolutions(kernels: Sequence[Tensor], learning_rate: float, weight_decay: float) -> Muon:
    """PyTorch's Muon, which takes matrices alone: each kernel is seen as one of a row for each output channel.

    After K. Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024). The kernels' gradients are read
    at each step; whoever trains clears them.

    Args:
        kernels: (outputs, inputs, height, width) each, with channels last in memory.
        weight_decay: share of the weights, times the learning rate, that each step takes away.

    Raises:
        RuntimeError: a kernel is laid out otherwise in memory, and so has no such view.
    """
    matrices = [nn.Parameter(_as_matrix(kernel.detach())) for kernel in kernels]

    def pass_on_gradients(*_: Any) -> None:
        for matrix, kernel in zip(matrices, kernels, strict=True):
            matrix.grad = None if kernel.grad is None else _as_matrix(kernel.grad)

    optimizer = Muon(matrices, lr=learning_rate, weight_decay=weight_decay, momentum=MOMENTUM, nesterov=True)
    optimizer.register_step_pre_hook(pass_on_gradients)
    return optimizer


def _as_matrix(kernel: Tensor) -> Tensor:
    return kernel.permute(0, 2, 3, 1).view(len(kernel), -1)
