"""Adam (D. Kingma and J. Ba, 2015), fused."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Adam, Optimizer

from mlpipe.config import NetworkSettings
from mlpipe.training.optimizers.decay import decay_groups


def build(parameters: Sequence[nn.Parameter], settings: NetworkSettings) -> list[Optimizer]:
    """One optimizer; its weight decay is an L2 penalty."""
    return [Adam(decay_groups(parameters, settings.weight_decay), lr=settings.learning_rate, fused=True)]
