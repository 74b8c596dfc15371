"""Training throughput, in pairs: this project, the loop everybody writes, and the same arithmetic without a framework.

    python benchmarks/training.py cifar10-images.zip

Each round runs all contestants one after the other on the same images, each in a process of its own, so that none
profits from another's settings; what is compared are the rounds. Images per second are those of the training steps of
one epoch, without validation, after an epoch to warm up.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from common import conditions, paired, read_images, restrict_to_avx2, spread, table
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from mlpipe.config import NetworkSettings
from mlpipe.data.batches import BatchLoader
from mlpipe.data.dataset import Split
from mlpipe.models.networks.custom_cnn import ByteDropout
from mlpipe.models.registry import build_network
from mlpipe.training.cpu.dead_taps import TrimmedKernels
from mlpipe.training.cpu.memory import keep_freed_memory
from mlpipe.training.cpu.winograd import winograd_convolutions
from mlpipe.training.module import ClassificationModule
from mlpipe.training.precision import choose_precision

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


class Setting(NamedTuple):
    """What is measured."""

    architecture: str
    batch_size: int
    num_images: int
    avx2_only: bool = False
    """PyTorch is restricted to AVX2, and to float32."""

    @property
    def precision(self) -> Literal["32-true", "bf16-mixed"]:
        return "32-true" if self.avx2_only else choose_precision("auto")


SETTINGS = (
    Setting("custom_cnn", 64, 12_800),
    Setting("resnet18", 64, 3_200),
    Setting("resnet18", 256, 3_072),
    Setting("custom_cnn", 64, 12_800, avx2_only=True),
    Setting("resnet18", 256, 3_072, avx2_only=True),
)

images = lru_cache(maxsize=1)(read_images)


def usual_network(architecture: str, seed: int = 0) -> nn.Module:
    """The network as its users write it, with PyTorch's own dropout."""
    network = build_network(architecture, num_classes=10, image_size=32, seed=seed)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, ByteDropout):
                setattr(module, name, nn.Dropout(child.p))
    return network


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


def trainer(*callbacks: pl.Callback, precision: Any = "32-true", num_epochs: int = 2) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", max_epochs=num_epochs, precision=precision, callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def reference(setting: Setting, path: Path, num_workers: int) -> float:
    """Images per second of a Lightning module, torchvision transforms per image, a DataLoader and Adam."""
    images_u8, labels = images(path, "train", setting.num_images)
    loader = DataLoader(
        PerImage(images_u8, labels), setting.batch_size, shuffle=True,
        num_workers=num_workers, persistent_workers=num_workers > 0,
    )  # fmt: skip
    timer = EpochTimer()
    trainer(timer).fit(Reference(usual_network(setting.architecture)), loader)
    return len(labels) / timer.seconds[-1]


def ours(setting: Setting, path: Path) -> float:
    """Images per second of what `train_network` does."""
    images_u8, labels = images(path, "train", setting.num_images)
    keep_freed_memory()
    network = build_network(setting.architecture, num_classes=10, image_size=32, seed=0)
    TrimmedKernels(network, 32)
    loader = BatchLoader(Split.of(images_u8, labels), setting.batch_size, seed=0, shuffle=True)
    module = ClassificationModule(
        network,
        NetworkSettings(batch_size=setting.batch_size),
        channel_mean=MEAN,
        channel_std=STD,
        num_classes=10,
        total_steps=2 * len(loader),
    )
    timer = EpochTimer()
    with winograd_convolutions(network) if setting.precision == "32-true" else nullcontext():
        trainer(timer, precision=setting.precision).fit(module, loader)
    return len(labels) / timer.seconds[-1]


def bare(setting: Setting, path: Path) -> float:
    """Images per second without a framework: our network, precision and allocator, tensors in memory, fused Adam."""
    images_u8, labels = images(path, "train", setting.num_images)
    keep_freed_memory()
    network = build_network(setting.architecture, num_classes=10, image_size=32, seed=0)
    network = network.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    all_images, all_labels = torch.from_numpy(images_u8), torch.from_numpy(labels)
    scale = (1 / (255 * torch.tensor(STD))).view(3, 1, 1)
    shift = (255 * torch.tensor(MEAN)).view(3, 1, 1)
    half = setting.precision == "bf16-mixed"
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        for rows in torch.randperm(len(labels)).split(setting.batch_size):
            batch = all_images[rows].permute(0, 3, 1, 2).to(torch.float32).sub_(shift).mul_(scale)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = F.cross_entropy(network(batch), all_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds = time.perf_counter() - began
    return len(labels) / seconds


class Contestant:
    """A loop in a process of its own, which waits while others run."""

    def __init__(self, loop: Callable[..., float], *arguments: Any, avx2_only: bool = False) -> None:
        self._loop, self._arguments = loop, arguments
        self._pool = ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=prepare, initargs=(avx2_only,)
        )

    def run(self) -> float:
        """Images per second."""
        return self._pool.submit(self._loop, *self._arguments).result()

    def close(self) -> None:
        self._pool.shutdown()


def prepare(avx2_only: bool) -> None:
    """Keep Lightning's remarks out of the report."""
    if avx2_only:
        restrict_to_avx2()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def best_workers(setting: Setting, path: Path) -> int:
    """The number of loader processes with which the reference is fastest here."""
    rates = {}
    for num_workers in (0, 1, 2):
        contestant = Contestant(reference, setting, path, num_workers, avx2_only=setting.avx2_only)
        rates[num_workers] = contestant.run()
        contestant.close()
    return max(rates, key=lambda num_workers: rates[num_workers])


def report(setting: Setting, rates: Mapping[str, list[float]], num_workers: int) -> str:
    ratios = [[f"ours / {other}", spread(paired(rates["ours"], rates[other]), 2)] for other in ("reference", "bare")]
    return "\n".join(
        [
            "",
            f"## {setting.architecture}, batch {setting.batch_size}" + ", only AVX2" * setting.avx2_only,
            "",
            f"{setting.num_images:,} images, {len(rates['ours'])} rounds, {setting.precision}; "
            f"reference with {num_workers} workers.",
            "",
            table(["loop", "images/s, median (range)"], [[name, spread(each, 0)] for name, each in rates.items()]),
            "",
            table(["ratio, round by round", "median (range)"], ratios),
        ]
    )


def measure(setting: Setting, path: Path, rounds: int) -> str:
    num_workers = best_workers(setting, path)
    contestants = {
        "reference": Contestant(reference, setting, path, num_workers, avx2_only=setting.avx2_only),
        "bare": Contestant(bare, setting, path, avx2_only=setting.avx2_only),
        "ours": Contestant(ours, setting, path, avx2_only=setting.avx2_only),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            rates[name].append(contestant.run())
    for contestant in contestants.values():
        contestant.close()
    return report(setting, rates, num_workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="zip of train/<class>/…, 32×32 pixels")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print("# Training throughput\n")
    print("*reference*: a Lightning module, torchvision transforms per image, `DataLoader` with the best of 0, 1, 2")
    print("persistent workers, Adam. *bare*: our network, precision and allocator, tensors in memory, fused Adam, and")
    print("no framework. Each loop runs a warm-up epoch, then a measured one; the loops take turns in each round.\n")
    print(conditions("torch", "torchvision", "lightning"))
    print(f"{torch.get_num_threads()} threads. *Only AVX2*: PyTorch is restricted to it, and to float32.")
    for setting in SETTINGS:
        print(measure(setting, arguments.data, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
