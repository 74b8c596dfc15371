"""What only a real CUDA device shows; `benchmarks/gpu.sh` runs these tests."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from gpu_slots import find_devices
from sklearn.datasets import load_digits

from mlpipe.config import ModelConfig, RunParams
from mlpipe.data.dataset import Dataset
from mlpipe.models.registry import describe
from mlpipe.models.weights import initial_network
from mlpipe.recipes import resolve
from mlpipe.training.network import train_network
from mlpipe.training.protocol import TrainedModel
from mlpipe.training.whitening import whiten

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


class Silent:
    def __init__(self) -> None:
        self.params: dict[str, object] = {}

    def log_metrics(self, metrics: object, step: int) -> None: ...

    def log_params(self, params: dict[str, object]) -> None:
        self.params |= params

    def ensure_current(self) -> None: ...

    def last_logged_step(self, metric: str) -> int:  # noqa: ARG002
        return 0


@pytest.fixture(scope="module")
def digits() -> Dataset:
    bunch = load_digits()
    images = np.repeat((bunch.images * 15).astype(np.uint8)[..., None], 3, axis=-1).repeat(4, 1).repeat(4, 2)
    return Dataset.in_memory(
        tuple("0123456789"), (images[:1500], bunch.target[:1500]), (images[1500:], bunch.target[1500:])
    )


def trained(model: ModelConfig, data: Dataset, tracking: Silent) -> TrainedModel:
    start = initial_network(model, describe(model, data.manifest), store=None)  # type: ignore[arg-type]
    return train_network(model, data, tracking, start=start)


@pytest.mark.parametrize("architecture", ["custom_cnn", "resnet18"])
def test_a_network_learns_on_the_device_and_answers_on_the_processor(digits: Dataset, architecture: str) -> None:
    model = resolve(RunParams(models=architecture, recipe="strong")).models[0]
    tracking = Silent()
    done = trained(replace(model, train=replace(model.train, num_epochs=3)), digits, tracking)
    assert tracking.params["device"] == torch.cuda.get_device_name()
    assert done.metrics["val/accuracy"] > 0.9
    answers = done.probabilities(np.asarray(digits.val_split().images_u8[:64])).argmax(axis=1)
    assert (answers == digits.val_split().labels[:64]).mean() > 0.9


def test_each_device_of_the_executor_is_one_device_of_pytorch() -> None:
    devices = find_devices()
    assert devices
    for device in devices:
        script = "import torch; print(torch.cuda.device_count(), torch.ones(1, device='cuda').item())"
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
        assert done.stdout.split() == ["1", "1.0"]


def test_images_on_the_device_whiten_a_convolution_there() -> None:
    convolution = torch.nn.Conv2d(3, 24, kernel_size=2, device="cuda")
    whiten(convolution, [torch.randn(64, 3, 16, 16, device="cuda")])
    assert convolution.weight.isfinite().all()
