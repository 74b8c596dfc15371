"""Update rules by name. To add one, write a file that builds it and one line in `OPTIMIZERS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from torch import nn
from torch.optim import Optimizer

from mlpipe.config import NetworkSettings

OPTIMIZERS = {
    "adam": "mlpipe.training.optimizers.adam:build",
    "muon": "mlpipe.training.optimizers.muon:build",
    "sgd": "mlpipe.training.optimizers.sgd:build",
}
"""`module:function` that takes the trained parameters and the settings, and returns the optimizers of a training."""


def build_optimizers(parameters: Sequence[nn.Parameter], settings: NetworkSettings) -> list[Optimizer]:
    """The optimizers of `settings.optimizer`; each parameter is trained by one of them.

    Raises:
        ValueError: there is no such optimizer.
    """
    if settings.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: {settings.optimizer!r} is unknown; known are {', '.join(OPTIMIZERS)}")
    module, _, name = OPTIMIZERS[settings.optimizer].partition(":")
    build: Callable[[Sequence[nn.Parameter], NetworkSettings], list[Optimizer]] = getattr(import_module(module), name)
    return build(parameters, settings)
