"""What a network's last layer is given: the features that it classifies by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def inputs_of(layer: nn.Linear) -> Iterator[list[Tensor]]:
    """A list that gets the layer's input, (B, D) float32 on the CPU, with each call of the network meanwhile."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(1).float().cpu()))
    try:
        yield seen
    finally:
        hook.remove()
