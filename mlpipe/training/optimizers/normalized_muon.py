"""Muon on convolutions of a fixed norm.

After K. Jordan's `airbench94_muon` (https://github.com/KellerJordan/cifar10-airbench, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.optim import SGD, Optimizer

from mlpipe.config import NetworkSettings
from mlpipe.training.optimizers.muon import Muon, by_kind


def build(parameters: Sequence[nn.Parameter], settings: NetworkSettings) -> list[Optimizer]:
    """Muon for convolutions; for all else SGD with Nesterov momentum and the settings' weight decay."""
    rate = settings.learning_rate
    return by_kind(
        parameters,
        partial(Muon, lr=rate, momentum=0.6, keep_norm=True),
        partial(SGD, lr=rate, momentum=0.85, nesterov=True, weight_decay=settings.weight_decay, fused=True),
    )
