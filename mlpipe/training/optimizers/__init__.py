"""Update rules by name. To add one, write a file that builds it and one line in `OPTIMIZERS`.

Only the standard library is loaded: a run's optimizers are checked before anything is triggered.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn
    from torch.optim import Optimizer

    from mlpipe.config import NetworkSettings
from mlpipe.errors import UserError

OPTIMIZERS = {
    "adam": "mlpipe.training.optimizers.adam:build",
    "muon": "mlpipe.training.optimizers.muon:build",
    "normalized_muon": "mlpipe.training.optimizers.normalized_muon:build",
    "sgd": "mlpipe.training.optimizers.sgd:build",
}
"""`module:function` that takes the trained parameters and the settings, and returns the optimizers of a training."""


def check_optimizer(name: str) -> None:
    """
    Raises:
        UserError: there is no optimizer of that name.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"optimizer: {name!r} is unknown; known are {', '.join(OPTIMIZERS)}")


def build_optimizers(parameters: Sequence[nn.Parameter], settings: NetworkSettings) -> list[Optimizer]:
    """The optimizers of `settings.optimizer`; each parameter is trained by one of them.

    Raises:
        UserError: there is no such optimizer, or nothing to train.
    """
    check_optimizer(settings.optimizer)
    if not parameters:
        raise UserError(
            f"optimizer: {settings.optimizer} has nothing to train, for the network has no parameter that requires a "
            "gradient; give a network that has one"
        )
    module, _, name = OPTIMIZERS[settings.optimizer].partition(":")
    build: Callable[[Sequence[nn.Parameter], NetworkSettings], list[Optimizer]] = getattr(import_module(module), name)
    return build(parameters, settings)
