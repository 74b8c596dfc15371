"""Which parameters are decayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer; biases and the parameters of normalisation are not decayed.

    It would only rescale them.
    """
    decayed = [each for each in parameters if each.dim() > 1]
    others = [each for each in parameters if each.dim() <= 1]
    groups = ({"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]
