"""Labelling images with a logged model, against its bare network.

    python benchmarks/predict.py cifar10-images.zip

`mlflow.pyfunc.load_model(…).predict` takes raw pixels: it checks them, normalises, computes probabilities and makes a
table. The bare network gets the same images as finished float tensors, in batches of the same size, in inference mode.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from common import conditions, paired, read_images, spread, table
from numpy.typing import NDArray
from torch import Tensor, nn

from mlpipe.models.architectures import find
from mlpipe.models.package import log_packaged_model
from mlpipe.models.portable import PIXELS_PER_BATCH, ModelDescription, normalise
from mlpipe.models.registry import build_network

NUM_IMAGES = 10_000
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CLASSES = tuple("abcdefghij")


@contextlib.contextmanager
def tracking_store() -> Iterator[None]:
    """An MLflow store in a folder, for as long as this runs."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        mlflow.set_experiment(experiment_id=mlflow.create_experiment("b", artifact_location=f"file://{folder}/files"))
        with mlflow.start_run():
            yield


def logged_model(architecture: str, network: nn.Module, images_u8: NDArray[np.uint8]) -> Any:
    """The network as a user gets it."""
    entry = find(architecture)
    description = ModelDescription(
        kind="network",
        architecture=architecture,
        classes=CLASSES,
        image_size=32,
        channel_mean=MEAN,
        channel_std=STD,
        code=entry.code,
        outline=entry.outline,
    )
    logged = log_packaged_model(description, network, name=architecture, example_images_u8=images_u8[:2])
    return mlflow.pyfunc.load_model(logged.model_uri)


@torch.inference_mode()
def prepared(images_u8: NDArray[np.uint8]) -> list[Tensor]:
    """Normalised batches of the size that `predict` uses."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    batches = torch.from_numpy(images_u8).split(PIXELS_PER_BATCH // (32 * 32))
    return [normalise(batch, mean, std) for batch in batches]


@torch.inference_mode()
def bare(network: nn.Module, batches: list[Tensor]) -> Tensor:
    return torch.cat([network(batch) for batch in batches])


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(architecture: str, images_u8: NDArray[np.uint8], rounds: int) -> list[str]:
    """A row of the table."""
    network = build_network(architecture, num_classes=len(CLASSES), image_size=32, seed=0).eval()
    model = logged_model(architecture, network, images_u8)
    network = network.requires_grad_(False).to(memory_format=torch.channels_last)
    batches = prepared(images_u8)
    expected = bare(network, batches).softmax(dim=1).numpy()
    answers = model.predict(images_u8)
    np.testing.assert_allclose(answers.iloc[:, 2:].to_numpy(), expected, atol=1e-4)
    times: dict[str, list[float]] = {"bare": [], "predict": []}
    for _ in range(rounds):
        times["bare"].append(seconds(lambda: bare(network, batches)))
        times["predict"].append(seconds(lambda: model.predict(images_u8)))
    rates = {name: [len(images_u8) / each for each in values] for name, values in times.items()}
    ratios = paired(rates["predict"], rates["bare"])
    return [architecture, spread(rates["predict"], 0), spread(rates["bare"], 0), spread(ratios, 3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="zip of train/<class>/… and test/<class>/…, 32×32 pixels")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    images_u8, _ = read_images(arguments.data, "test", NUM_IMAGES)
    with tracking_store():
        rows = [measure(name, images_u8, arguments.rounds) for name in ("custom_cnn", "resnet18")]
    print("# Prediction\n")
    print(f"`predict` of a logged model, loaded by MLflow, on {len(images_u8):,} raw images at once, against its bare")
    print("network on the same images as finished float tensors, in batches of the same size, in inference mode.\n")
    print(conditions("mlflow", "torch"), f"{torch.get_num_threads()} threads, float32, {arguments.rounds} rounds.\n")
    print(table(["network", "predict, images/s, median (range)", "bare network", "predict / bare"], rows))


if __name__ == "__main__":
    main()
