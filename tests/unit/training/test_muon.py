from __future__ import annotations

import pytest
import torch
from torch import nn

from mlpipe.training.muon import muon_for_convolutions


@pytest.fixture
def convolution() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(8, 16, kernel_size=3, bias=False).to(memory_format=torch.channels_last)


def step(convolution: nn.Conv2d, weight_decay: float = 0.0) -> torch.Tensor:
    """What one step at rate 0.1 adds to the kernel, a row for each output channel."""
    before = convolution.weight.detach().clone()
    optimizer = muon_for_convolutions([convolution.weight], learning_rate=0.1, weight_decay=weight_decay)
    optimizer.step()
    return (convolution.weight.detach() - before).flatten(1)


def test_a_step_turns_a_kernel_equally_in_all_directions(convolution: nn.Conv2d) -> None:
    convolution(torch.randn(4, 8, 6, 6)).square().sum().backward()
    assert convolution.weight.grad is not None
    spread_of_gradient = torch.linalg.svdvals(convolution.weight.grad.flatten(1))
    change = step(convolution)
    values = torch.linalg.svdvals(change)
    assert spread_of_gradient[0] > 3 * spread_of_gradient[-1]
    assert 0.05 < values[-1] <= values[0] < 0.15  # Newton-Schulz brings them to about 1, times the rate
    assert (change * convolution.weight.grad.flatten(1)).sum() < 0, "it must lead down"


def test_weights_decay_by_rate_times_decay(convolution: nn.Conv2d) -> None:
    before = convolution.weight.detach().clone().flatten(1)
    convolution.weight.grad = torch.zeros_like(convolution.weight)
    torch.testing.assert_close(step(convolution, weight_decay=0.5), -0.05 * before)


def test_a_kernel_without_a_gradient_stays(convolution: nn.Conv2d) -> None:
    assert not step(convolution, weight_decay=0.5).any()


def test_another_layout_is_refused() -> None:
    with pytest.raises(RuntimeError, match="view"):
        muon_for_convolutions([nn.Conv2d(8, 16, kernel_size=3).weight], learning_rate=0.1, weight_decay=0.0)
