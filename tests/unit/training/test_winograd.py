"""Winograd's convolutions: the values and the gradients of PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlpipe.training.cpu import winograd
from mlpipe.training.cpu.winograd import convolve, winograd_convolutions


def results(images: Tensor, kernels: Tensor, *, fast: bool) -> tuple[Tensor, ...]:
    images, kernels = images.clone().requires_grad_(), kernels.clone().requires_grad_()
    outputs = convolve(images, kernels) if fast else F.conv2d(images, kernels, padding=1)
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view(outputs.shape).sin()
    return (outputs.detach(), *torch.autograd.grad(outputs, (images, kernels), weights))


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 8, 8), (2, 5, 7), (3, 2, 2), (2, 1, 13)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_the_convolution(
    shape: tuple[int, int, int], layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "CHUNK", 16)  # chunks of single images
    batch, height, width = shape
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 5, height, width, dtype=torch.float64, generator=generator).to(memory_format=layout)
    kernels = torch.randn(7, 5, 3, 3, dtype=torch.float64, generator=generator).to(memory_format=layout)
    slow, fast = (results(images, kernels, fast=fast) for fast in (False, True))
    for expected, value in zip(slow, fast, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def test_rounding_of_float32_stays_small() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 256, 8, 8, generator=generator)
    kernels = torch.randn(256, 256, 3, 3, generator=generator) / 48
    for expected, value in zip(results(images, kernels, fast=False), results(images, kernels, fast=True), strict=True):
        assert (value - expected).abs().max() < 2e-4 * expected.std()


def test_wide_convolutions_alone_are_computed_so_and_only_within(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(
        nn.Conv2d(128, 256, 3, padding=1),
        nn.Conv2d(256, 256, 3, padding=1, stride=2),
        nn.Conv2d(256, 256, 3, padding=1, groups=2),
        nn.Conv2d(256, 256, 1, padding=1),
        nn.Conv2d(256, 64, 3, padding=1),
    )
    wide: list[tuple[int, ...]] = []

    def noted(images: Tensor, kernels: Tensor) -> Tensor:
        wide.append(tuple(kernels.shape))
        return convolve(images, kernels)

    monkeypatch.setattr(winograd, "convolve", noted)
    images = torch.randn(32, 128, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(images)
        with winograd_convolutions(network):
            value = network(images)
            network(images[:4])  # too few tiles
        torch.testing.assert_close(network(images), expected, rtol=0, atol=0)
    assert wide == [(256, 128, 3, 3)]
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)
