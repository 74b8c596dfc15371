"""Only the last layer of a pretrained network is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mlpipe.config import ModelConfig, NetworkSettings
from mlpipe.errors import UserError
from mlpipe.models.registry import describe
from mlpipe.models.weights import InitialNetwork
from mlpipe.training.head import train_head

from .conftest import RecordingLogger, tiny_dataset


class Pretrained(nn.Module):
    """Sees stripes and dots, by differences of neighbors."""

    def __init__(self, num_classes: int, *, bias: bool = True, divisor: float = 1.0) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, num_classes, bias=bias)
        self.divisor = divisor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images).abs().mean(dim=(2, 3))) / self.divisor


def start_of(network: nn.Module) -> tuple[ModelConfig, InitialNetwork]:
    model = ModelConfig(
        architecture="custom_cnn", weights="file:///w", name="m", train=NetworkSettings(fine_tuning="head")
    )
    description = describe(model, tiny_dataset().manifest)
    return model, InitialNetwork(network=network, description=description, sha256="abc")


def test_the_head_learns_and_all_else_stays(store) -> None:
    torch.manual_seed(0)
    network = Pretrained(3)
    before = network.body.weight.clone()
    model, start = start_of(network)
    data = tiny_dataset()
    trained = train_head(model, data, RecordingLogger(), start=start, store=store)
    assert torch.equal(network.body.weight, before)
    assert trained.metrics["val/accuracy"] > 0.9
    validation = data.val_split()
    right = (trained.probabilities(np.asarray(validation.images_u8)).argmax(axis=1) == validation.labels).mean()
    assert right == pytest.approx(trained.metrics["val/accuracy"])


def test_features_are_computed_once_for_the_same_network(store, tmp_path: Path) -> None:
    model, start = start_of(Pretrained(3))
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    start.network.register_forward_pre_hook(count)

    def computes(model: ModelConfig, start: InitialNetwork) -> bool:
        before = passes
        train_head(model, tiny_dataset(), RecordingLogger(), start=start, store=store)
        return passes > before

    assert computes(model, start)
    assert not computes(model, start)
    assert computes(model, replace(start, sha256="def"))
    file = tmp_path / "nets.py"
    file.write_text("one = two = None")
    for name in ("one", "two"):
        own = replace(model, architecture=f"{file}:{name}")
        assert computes(own, start)
        assert not computes(own, start)
    file.write_text("one = two = 1")
    assert computes(own, start)


@pytest.mark.parametrize("network", [Pretrained(3, bias=False), Pretrained(3, divisor=8.0), nn.Conv2d(3, 3, 1)])
def test_networks_without_such_a_layer_are_refused(network: nn.Module, store) -> None:
    model, start = start_of(network)
    with pytest.raises(UserError, match="^fine_tuning: head is not allowed"):
        train_head(model, tiny_dataset(), RecordingLogger(), start=start, store=store)
