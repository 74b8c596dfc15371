"""Training takes the steps of the loop that everybody writes."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from mlpipe.data.batches import BatchLoader
from mlpipe.models.registry import build_network

BATCH_SIZE = 64
LEARNING_RATE = 1e-3


def network_without_dropout(architecture: str) -> nn.Module:
    """Which numbers are dropped is drawn by another generator than PyTorch's dropout has."""
    network = build_network(architecture, num_classes=3, image_size=32, seed=0)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=LEARNING_RATE),
    "sgd": partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=0.9, nesterov=True),
}


def usual_loop(network: nn.Module, optimizer: str, dataset: Any, batches: list[np.ndarray]) -> nn.Module:
    """Train in the type of the network's weights, with torchvision's transforms, image by image."""
    dtype = next(network.parameters()).dtype
    manifest = dataset.manifest
    transform = v2.Compose(
        [v2.ToImage(), v2.ToDtype(dtype, scale=True), v2.Normalize(manifest.channel_mean, manifest.channel_std)]
    )
    split = dataset.train_split()
    images, labels = split.images_u8[:], split.labels
    steps = OPTIMIZERS[optimizer](network.parameters())
    network.train()
    for rows in batches:
        batch = torch.stack([transform(Image.fromarray(images[row])) for row in rows])
        loss = F.cross_entropy(network(batch), torch.from_numpy(labels[rows]))
        steps.zero_grad()
        loss.backward()
        steps.step()
    return network


def numbers(network: nn.Module) -> Tensor:
    """All weights in a row, float64."""
    return torch.cat([weight.detach().double().flatten() for weight in network.parameters()])


@pytest.mark.parametrize(
    ("architecture", "optimizer", "steps", "tolerance"),
    # A deep network multiplies rounding at each step, and Adam divides by gradients that are hardly more than that.
    [("custom_cnn", "adam", 10, 1e-3), ("resnet18", "sgd", 1, 0.03)],
)
def test_steps_are_those_of_the_usual_loop_up_to_rounding(
    architecture, optimizer, steps, tolerance, new_dataset, config, train, tracking
) -> None:
    """With channels last, the fused optimizer, trimmed kernels and Winograd's convolutions."""
    dataset = new_dataset(num_train=steps * BATCH_SIZE, size=32)
    order = BatchLoader(dataset.train_split(), BATCH_SIZE, seed=0, shuffle=True).order()
    settings = {"num_epochs": 1, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "precision": "32-true"}
    model = config(architecture, optimizer=optimizer, **settings)

    network = network_without_dropout(architecture)
    before = numbers(network)
    ours = numbers(train(model, dataset, tracking, network=network).predictor)
    usual = numbers(
        usual_loop(network_without_dropout(architecture).double(), optimizer, dataset, np.split(order, steps))
    )

    assert (ours - usual).norm() < tolerance * (usual - before).norm()
