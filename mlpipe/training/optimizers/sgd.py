"""Stochastic gradient descent with Nesterov momentum, fused."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import SGD, Optimizer

from mlpipe.config import NetworkSettings
from mlpipe.training.optimizers.decay import decay_groups


def build(parameters: Sequence[nn.Parameter], settings: NetworkSettings) -> list[Optimizer]:
    """One optimizer; its weight decay is an L2 penalty."""
    groups = decay_groups(parameters, settings.weight_decay)
    return [SGD(groups, lr=settings.learning_rate, momentum=0.9, nesterov=True, fused=True)]
