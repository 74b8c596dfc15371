from __future__ import annotations

import pytest
import torch
from torch import nn

from mlpipe.config import NetworkSettings
from mlpipe.errors import UserError
from mlpipe.training.optimizers import build_optimizers
from mlpipe.training.optimizers.muon import COEFFICIENTS, ITERATIONS, Muon, orthogonalise


def convolution(layout: torch.memory_format = torch.channels_last) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(8, 16, kernel_size=3, bias=False).to(memory_format=layout)


def step(layer: nn.Conv2d, weight_decay: float = 0.0) -> torch.Tensor:
    """What one step at rate 0.1 adds to the kernel, a row for each output channel."""
    before = layer.weight.detach().clone()
    Muon([layer.weight], lr=0.1, weight_decay=weight_decay).step()
    return (layer.weight.detach() - before).flatten(1)


@pytest.mark.parametrize("optimizer", ["muon", "normalized_muon"])
def test_a_network_may_have_no_convolution_or_nothing_else(optimizer: str) -> None:
    settings = NetworkSettings(num_epochs=1, batch_size=2, seed=0, optimizer=optimizer)
    for layer in (nn.Linear(2, 3), convolution()):
        optimizers = build_optimizers(list(layer.parameters()), settings)
        assert [each for one in optimizers for group in one.param_groups for each in group["params"]] == list(
            layer.parameters()
        )
    with pytest.raises(UserError, match=r"^optimizer: .* has nothing to train"):
        build_optimizers([], settings)


def test_a_step_turns_a_kernel_equally_in_all_directions() -> None:
    layer = convolution()
    layer(torch.randn(4, 8, 6, 6)).square().sum().backward()
    assert layer.weight.grad is not None
    spread_of_gradient = torch.linalg.svdvals(layer.weight.grad.flatten(1))
    change = step(layer)
    values = torch.linalg.svdvals(change)
    assert spread_of_gradient[0] > 3 * spread_of_gradient[-1]
    assert 0.05 < values[-1] <= values[0] < 0.15  # the iteration brings them to about 1, times the rate
    assert (change * layer.weight.grad.flatten(1)).sum() < 0, "it must lead down"


@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (64, 3, 3, 3), (24, 8, 1, 1)], ids=["wide", "tall", "one_pixel"])
def test_steps_are_those_of_pytorchs_own_up_to_its_bfloat16(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(shape))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    ours = Muon([kernel], lr=0.05, weight_decay=0.1, momentum=0.9)
    theirs = torch.optim.Muon([matrix], lr=0.05, weight_decay=0.1, momentum=0.9, nesterov=True)
    for _ in range(5):
        kernel.grad = torch.randn(shape)
        matrix.grad = kernel.grad.flatten(1).clone()
        before = matrix.detach().clone()
        ours.step()
        theirs.step()
        change = (matrix - before).norm()
        assert (kernel.flatten(1) - matrix).norm() < 0.02 * change
        with torch.no_grad():
            matrix.copy_(kernel.flatten(1))  # or the differences would add up


@pytest.mark.parametrize("rank", [64, 5], ids=["full_rank", "few_directions"])
def test_collecting_the_polynomials_gives_what_applying_each_gives(rank: int) -> None:
    torch.manual_seed(0)
    # Directions from 1 to a millionth, as gradients have them.
    matrix = torch.randn(64, rank) * torch.logspace(0, -6, rank) @ torch.randn(rank, 500)
    a, b, c = COEFFICIENTS
    expected = matrix.double() / matrix.double().norm()
    for _ in range(ITERATIONS):
        gram = expected @ expected.T
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    result = orthogonalise(matrix)
    assert result.dtype == torch.float32
    assert (result - expected).norm() < 1e-2 * expected.norm()


def test_the_layout_in_memory_changes_nothing() -> None:
    changes = []
    for layout in (torch.channels_last, torch.contiguous_format):
        layer = convolution(layout)
        layer.weight.grad = torch.linspace(-1, 1, 16 * 8 * 9).sin().view(16, 8, 3, 3).contiguous(memory_format=layout)
        changes.append(step(layer))
        assert layer.weight.is_contiguous(memory_format=layout)
    torch.testing.assert_close(*changes)


def test_weights_decay_by_rate_times_decay() -> None:
    layer = convolution()
    before = layer.weight.detach().clone().flatten(1)
    layer.weight.grad = torch.zeros_like(layer.weight)
    torch.testing.assert_close(step(layer, weight_decay=0.5), -0.05 * before)


def test_a_kernel_without_a_gradient_stays() -> None:
    assert not step(convolution(), weight_decay=0.5).any()
