"""A learning rate from a range test.

Source: L. Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017. Lightning has one for a single
optimizer; Muon trains with two.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from itertools import chain, islice, repeat

import numpy as np
import torch
from scipy.signal import savgol_filter
from torch import Tensor

from mlpipe.data.batches import BatchLoader
from mlpipe.errors import UserError
from mlpipe.training.module import ClassificationModule
from mlpipe.training.protocol import TrainingLogger

logger = logging.getLogger(__name__)

NUM_STEPS = 100
SPAN = 1000.0
"""The rates reach from the settings' rate over this to the settings' rate times a tenth of this."""
DIVERGED = 4.0
"""Multiple of the lowest loss at which the test ends."""
WINDOW = 21
"""Steps over which the loss and its slope are smoothed."""


def find_learning_rate(
    module: ClassificationModule, loader: BatchLoader, tracking: TrainingLogger, *, bfloat16: bool
) -> float:
    """The rate at which the loss falls fastest over the rate's logarithm; the same seed always finds the same.

    Args:
        module: of a copy of the network, with a constant schedule; it is trained.
        tracking: is given the found rate, and each step's rate and loss.

    Raises:
        UserError: the loss was soon infinite.
    """
    module.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    module.train()
    module.on_train_epoch_start()
    with torch.random.fork_rng():
        torch.manual_seed(module.train_config.seed)
        tried = list(_range_test(module, loader, bfloat16=bfloat16))
    if len(tried) < WINDOW:
        raise UserError(
            f"find_learning_rate: the loss was infinite after {len(tried)} steps, at rates from "
            f"{module.train_config.learning_rate / SPAN:.3g} on; give a learning_rate instead"
        )
    rates, losses = zip(*tried, strict=True)
    lowest = int(np.argmin(savgol_filter(losses, WINDOW, polyorder=1)))
    steepest = int(np.argmin(savgol_filter(losses, WINDOW, polyorder=1, deriv=1)[: lowest + 1]))
    found = float(f"{rates[steepest]:.3g}")
    for step, (rate, loss) in enumerate(tried, start=1):
        tracking.log_metrics({"find_learning_rate/rate": rate, "find_learning_rate/loss": loss}, step)
    tracking.log_params({"found_learning_rate": found})
    logger.info("the loss fell fastest at a learning rate of %g", found)
    return found


def _range_test(module: ClassificationModule, loader: BatchLoader, *, bfloat16: bool) -> Iterator[tuple[float, float]]:
    """Each step's rate and loss, until it diverges."""
    own = module.train_config.learning_rate
    rates = np.geomspace(own / SPAN, own * SPAN / 10, NUM_STEPS)
    optimizers, _ = module.configure_optimizers()
    batches = islice(chain.from_iterable(repeat(loader)), NUM_STEPS)
    lowest = math.inf
    for rate, batch in zip(map(float, rates), batches, strict=True):
        on_device: tuple[Tensor, ...] = tuple(each.to(module.device) for each in batch)
        with torch.autocast(module.device.type, torch.bfloat16, enabled=bfloat16):
            loss = module.training_loss(on_device)
        value = loss.item()
        if not math.isfinite(value) or value > DIVERGED * lowest:
            return
        lowest = min(lowest, value)
        yield rate, value
        module.network.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
