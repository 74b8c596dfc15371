"""Muon on convolutions of a fixed norm.

After K. Jordan's `airbench94_muon` (https://github.com/KellerJordan/cifar10-airbench, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import SGD, Optimizer

from mlpipe.config import NetworkSettings
from mlpipe.training.optimizers.muon import Muon


def build(parameters: Sequence[nn.Parameter], settings: NetworkSettings) -> list[Optimizer]:
    """Muon for convolutions; for all else SGD with Nesterov momentum and the settings' weight decay."""
    kernels = [each for each in parameters if each.dim() == 4]
    others = [each for each in parameters if each.dim() != 4]
    optimizers: list[Optimizer] = []  # PyTorch makes none for no parameters
    if kernels:
        optimizers.append(Muon(kernels, lr=settings.learning_rate, momentum=0.6, keep_norm=True))
    if others:
        sgd = SGD(
            others,
            lr=settings.learning_rate,
            momentum=0.85,
            nesterov=True,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        optimizers.append(sgd)
    return optimizers
