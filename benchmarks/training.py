"""Training throughput, in pairs: this project, the loop everybody writes, and the same arithmetic without a framework.

    make bench DATA=cifar10-images.zip

Each round runs all contestants one after the other on the same images; what is compared are the rounds. Images per
second are those of the training steps of one epoch, without validation, after an epoch to warm up.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import platform
import statistics
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from mlpipe.config import TrainConfig
from mlpipe.data.batches import BatchLoader
from mlpipe.data.dataset import Split
from mlpipe.models.registry import build_network
from mlpipe.training.module import ClassificationModule
from mlpipe.training.network import choose_precision

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


class Setting(NamedTuple):
    """What is measured."""

    architecture: str
    batch_size: int
    num_images: int


SETTINGS = (Setting("custom_cnn", 64, 12_800), Setting("resnet18", 64, 3_200), Setting("resnet18", 256, 3_072))


def read_images(path: Path, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The first `count` training images of a zip, spread over all classes: (N, 32, 32, 3) and (N,)."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.startswith("train/") and not name.endswith("/")]
        classes = sorted({name.split("/")[1] for name in names})
        names = names[:: max(1, len(names) // count)][:count]
        images = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
        labels = [classes.index(name.split("/")[1]) for name in names]
    return np.stack(images), np.array(labels, np.int64)


class PerImage(Dataset[tuple[Tensor, int]]):
    """As torchvision's CIFAR10 with the usual transforms: one PIL image at a time."""

    def __init__(self, images_u8: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self._images, self._labels = images_u8, labels
        self._transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._images[index])), int(self._labels[index])


class Reference(pl.LightningModule):
    """What a good user writes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class EpochTimer(pl.Callback):
    """Seconds of the training steps of each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        self.seconds.append(time.perf_counter() - self._began)


def trainer(timer: EpochTimer, precision: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", max_epochs=2, precision=precision, callbacks=[timer], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def reference(new: Callable[[], nn.Module], images: Any, labels: Any, batch_size: int, workers: int) -> float:
    loader = DataLoader(
        PerImage(images, labels), batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    timer = EpochTimer()
    trainer(timer, "32-true").fit(Reference(new()), loader)
    return len(labels) / timer.seconds[-1]


def ours(new: Callable[[], nn.Module], images: Any, labels: Any, batch_size: int) -> float:
    loader = BatchLoader(Split.of(images, labels), batch_size, seed=0, shuffle=True)
    module = ClassificationModule(
        new(), TrainConfig(batch_size=batch_size), channel_mean=MEAN, channel_std=STD, total_steps=2 * len(loader)
    )
    timer = EpochTimer()
    trainer(timer, choose_precision("auto")).fit(module, loader)
    return len(labels) / timer.seconds[-1]


def bare(new: Callable[[], nn.Module], images: Any, labels: Any, batch_size: int) -> float:
    """Tensors in memory, channels last, fused Adam, the same precision as ours; nothing else."""
    network = new().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    all_images, all_labels = torch.from_numpy(images), torch.from_numpy(labels)
    scale = (1 / (255 * torch.tensor(STD))).view(3, 1, 1)
    shift = (255 * torch.tensor(MEAN)).view(3, 1, 1)
    half = choose_precision("auto") == "bf16-mixed"
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        for rows in torch.randperm(len(labels)).split(batch_size):
            batch = all_images[rows].permute(0, 3, 1, 2).to(torch.float32).sub_(shift).mul_(scale)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = F.cross_entropy(network(batch), all_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds = time.perf_counter() - began
    return len(labels) / seconds


def best_workers(new: Callable[[], nn.Module], images: Any, labels: Any, batch_size: int) -> int:
    """The number of loader processes with which the reference is fastest here."""
    rates = {workers: reference(new, images, labels, batch_size, workers) for workers in (0, 1, 2)}
    return max(rates, key=lambda workers: rates[workers])


def spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def heading() -> str:
    return "\n".join(
        [
            "# Training throughput",
            "",
            "`make bench DATA=cifar10-images.zip`. *reference*: a Lightning module, torchvision transforms per image,",
            "`DataLoader` with the best of 0, 1, 2 persistent workers, Adam. *bare*: the same arithmetic as ours,",
            "tensors in memory, no framework. One epoch after an epoch to warm up; the loops take turns in each of the",
            "rounds.",
            "",
            f"{datetime.now(UTC):%Y-%m-%d}; {platform.machine()} {torch.cpu.get_capabilities().get('cpu_name', '')}, "
            f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {choose_precision('auto')}; "
            f"torch {torch.__version__}, torchvision {torchvision.__version__}, lightning {pl.__version__}; seed 0.",
        ]
    )


def report(setting: Setting, rates: Mapping[str, list[float]], workers: int) -> str:
    lines = [
        "",
        f"## {setting.architecture}, batch {setting.batch_size}",
        "",
        f"{setting.num_images:,} images, {len(rates['ours'])} rounds; reference with {workers} workers.",
        "",
        "| loop | images/s, median (range) |",
        "| --- | ---: |",
        *(f"| {name} | {spread(values, 0)} |" for name, values in rates.items()),
        "",
        "| ratio, round by round | median (range) |",
        "| --- | ---: |",
    ]
    for other in ("reference", "bare"):
        ratios = [mine / theirs for mine, theirs in zip(rates["ours"], rates[other], strict=True)]
        lines.append(f"| ours / {other} | {spread(ratios, 2)} |")
    return "\n".join(lines)


def measure(setting: Setting, path: Path, rounds: int) -> str:
    images, labels = read_images(path, setting.num_images)

    def new() -> nn.Module:
        return build_network(setting.architecture, num_classes=10, image_size=32, seed=0)

    workers = best_workers(new, images, labels, setting.batch_size)
    rates: dict[str, list[float]] = {"reference": [], "bare": [], "ours": []}
    for _ in range(rounds):
        rates["reference"].append(reference(new, images, labels, setting.batch_size, workers))
        rates["bare"].append(bare(new, images, labels, setting.batch_size))
        rates["ours"].append(ours(new, images, labels, setting.batch_size))
    return report(setting, rates, workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="zip of train/<class>/…, 32×32 pixels")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print(heading())
    for setting in SETTINGS:
        print(measure(setting, arguments.data, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
