"""A first convolution that whitens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mlpipe.training.whitening import whiten


def test_its_outputs_are_uncorrelated_and_of_one_variance() -> None:
    torch.manual_seed(0)
    smooth = nn.functional.avg_pool2d(torch.randn(64, 3, 20, 20), 2, stride=1)  # neighbors alike
    images = smooth + 0.3 * smooth.mean(dim=1, keepdim=True)  # channels, too
    convolution = nn.Conv2d(3, 24, kernel_size=2)
    whiten(convolution, images.split(20))
    outputs = convolution(images).permute(1, 0, 2, 3).flatten(1)
    covariance = outputs[:12] @ outputs[:12].T / outputs.shape[1]
    torch.testing.assert_close(covariance, torch.eye(12), atol=0.05, rtol=0)
    torch.testing.assert_close(outputs[12:], -outputs[:12])


def test_it_computes_where_the_images_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked_at(matrix: torch.Tensor) -> None:
        raise InterruptedError(matrix.device.type)

    monkeypatch.setattr(torch.linalg, "eigh", looked_at)
    convolution = nn.Conv2d(3, 24, kernel_size=2, device="meta")  # in place of a GPU
    with pytest.raises(InterruptedError, match="^meta$"):
        whiten(convolution, [torch.zeros(4, 3, 8, 8, device="meta")])


def test_no_output_is_always_the_same_where_a_channel_is_constant() -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 3, 20, 20)
    images[:, 2] = 0
    convolution = nn.Conv2d(3, 24, kernel_size=2)
    whiten(convolution, [images])
    assert convolution(images).std(dim=(0, 2, 3)).min() > 0.1
