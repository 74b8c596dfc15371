"""Kernels without the taps that only meet padding: the same network, and whole again afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

from mlpipe.training.cpu.dead_taps import TrimmedKernels


def resnet18(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return torchvision.models.resnet18(num_classes=5)


def one_convolution(**settings: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, **settings))  # type: ignore[arg-type]

    return build


def steps(network: nn.Module, image_size: int, count: int = 3) -> None:
    """A few optimizer steps in double precision, where the order of additions cannot be seen."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        images = torch.randn(4, 3, image_size, image_size, generator=generator, dtype=torch.float64)
        loss = network(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_training_ends_with_the_same_weights_as_with_whole_kernels() -> None:
    whole, trimmed = resnet18().double(), resnet18().double()
    kernels = TrimmedKernels(trimmed, image_size=32)
    assert len(kernels) == 4, "the last stage's 3×3 convolutions, which see maps of 2×2 and 1×1"
    num_trained = sum(parameter.numel() for parameter in trimmed.parameters())
    assert num_trained < 0.4 * sum(parameter.numel() for parameter in whole.parameters())
    steps(whole, 32)
    steps(trimmed, 32)
    kernels.restore()
    for (name, expected), value in zip(whole.state_dict().items(), trimmed.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, msg=name, rtol=1e-6, atol=1e-9)


def test_dead_taps_keep_their_initial_values_for_larger_images() -> None:
    network = resnet18().double()
    initial = network.layer4[1].conv2.weight.detach().clone()
    kernels = TrimmedKernels(network, image_size=32)
    steps(network, 32)
    kernels.restore()
    weight = network.layer4[1].conv2.weight
    assert weight.shape == initial.shape
    assert not torch.equal(weight[:, :, 1, 1], initial[:, :, 1, 1])
    outside = torch.ones(3, 3, dtype=torch.bool)
    outside[1, 1] = False
    assert torch.equal(weight[:, :, outside], initial[:, :, outside])


def test_neither_mode_nor_buffers_change() -> None:
    network = resnet18().train()
    before = network.bn1.running_mean.clone()
    TrimmedKernels(network, image_size=32)
    assert network.training
    assert torch.equal(network.bn1.running_mean, before)


@pytest.mark.parametrize("settings", [
    {"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "padding": 1, "stride": 2}, {"kernel_size": 5, "padding": 2},
    {"kernel_size": 7, "padding": 3, "stride": 2}, {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 2}, {"kernel_size": 4, "padding": 2, "stride": 3}, {"kernel_size": 2, "padding": 1},
])  # fmt: skip
@pytest.mark.parametrize("image_size", [1, 2, 3, 4, 8])
def test_whatever_the_convolution_its_output_stays(settings: dict[str, int], image_size: int) -> None:
    whole, trimmed = one_convolution(**settings)(), one_convolution(**settings)()
    images = torch.randn(2, 3, image_size, image_size)
    kernels = TrimmedKernels(trimmed, image_size)
    torch.testing.assert_close(trimmed(images), whole(images))
    kernels.restore()
    assert torch.equal(trimmed[0].weight, whole[0].weight)  # type: ignore[arg-type, index]
    torch.testing.assert_close(trimmed(images), whole(images))
