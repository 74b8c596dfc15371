"""The optimizer Muon, for convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from mlpipe.config import NetworkSettings

COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of the quintic a·x + b·x³ + c·x⁵, K. Jordan's: five times over, it brings singular values to about 0.7 to 1.2."""
ITERATIONS = 5


def build(parameters: Sequence[nn.Parameter], settings: NetworkSettings) -> list[Optimizer]:
    """Muon for convolutions; for all else SGD with Nesterov momentum, without weight decay."""
    return by_kind(
        parameters,
        partial(Muon, lr=settings.learning_rate, weight_decay=settings.weight_decay),
        partial(SGD, lr=settings.learning_rate, momentum=0.9, nesterov=True, fused=True),
    )


def by_kind(
    parameters: Sequence[nn.Parameter],
    of_convolutions: Callable[[list[nn.Parameter]], Optimizer],
    of_others: Callable[[list[nn.Parameter]], Optimizer],
) -> list[Optimizer]:
    """One optimizer for convolutions and one for all else, where there are any: PyTorch makes none for none."""
    kernels = [each for each in parameters if each.dim() == 4]
    others = [each for each in parameters if each.dim() != 4]
    return [make(own) for make, own in ((of_convolutions, kernels), (of_others, others)) if own]


class Muon(Optimizer):
    """Momentum, orthogonalised by a Newton-Schulz iteration; a kernel is a matrix of a row for each output channel.

    After K. Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024). PyTorch's own takes matrices
    alone and computes in bfloat16, which takes a processor without it more than a minute a step.
    """

    def __init__(
        self,
        kernels: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        keep_norm: bool = False,
    ) -> None:
        """
        Args:
            kernels: (outputs, inputs, height, width) each.
            weight_decay: share of the weights, times the learning rate, that each step takes away.
            momentum: Nesterov's.
            keep_norm: bring a kernel's norm to the root of its number of outputs before each step, so that the learning
                rate is the relative size of a step.
        """
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "keep_norm": keep_norm}
        super().__init__(kernels, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Change every kernel that has a gradient."""
        for group in self.param_groups:
            for kernel in group["params"]:
                if kernel.grad is None:
                    continue
                state = self.state[kernel]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(kernel)
                average = state["momentum_buffer"]
                average.lerp_(kernel.grad, 1 - group["momentum"])
                wanted = kernel.grad.lerp(average, group["momentum"])
                # Rows of one memory layout: a view where channels are last in memory.
                rows = wanted.permute(0, 2, 3, 1)
                update = orthogonalise(rows.flatten(1)).view(rows.shape).permute(0, 3, 1, 2)
                gain = max(1.0, len(kernel) ** 2 / kernel.numel()) ** 0.5  # as PyTorch's: rows to columns
                if group["keep_norm"]:
                    kernel.mul_(len(kernel) ** 0.5 / kernel.norm())
                kernel.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * gain)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Bring the singular values of (rows, columns) near 1, and leave its singular vectors.

    Each iteration multiplies the matrix by a polynomial of its Gram matrix. Those are collected and multiplied with the
    matrix once: on wide ones that is less than half of the arithmetic of the usual form.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalise(matrix.T).T
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    gram = matrix @ matrix.T
    factor = product = _factor(gram)
    for _ in range(ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    return product @ matrix


def _factor(gram: Tensor) -> Tensor:
    """What one iteration multiplies a matrix of this Gram matrix with."""
    a, b, c = COEFFICIENTS
    factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal().add_(a)
    return factor
