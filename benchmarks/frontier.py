"""The published recipe `airbench94_muon` beside this project's `strong`: accuracy, and seconds per image in pairs.

    python benchmarks/frontier.py cifar10-png.zip --rounds 5                # seconds per image
    python benchmarks/frontier.py cifar10-png.zip --rounds 0 --seeds 3      # accuracy of the published recipe
    OMP_NUM_THREADS=1 python benchmarks/frontier.py cifar10-png.zip --rounds 0 --json docs/runs/frontier.json

The last one trains the published recipe and the usual loop (training.py) once each, for the README's picture; their
minutes are of the processor, so work beside them does not count.

Written anew after K. Jordan's file of that name (https://github.com/KellerJordan/cifar10-airbench, 2024; 94.01 %
as the mean of 200 runs on the official images), for a processor or a GPU: bfloat16 by autocast where it has that,
channels last in memory, this project's allocator settings. Both train on the same images; the published recipe on all
50,000 with `--all-images`, as its authors do.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import by_recipe, dataset, settings
from common import conditions, paired, read_images, spread, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from training import PerImage, Reference, trainer, usual_network

from mlpipe.data.batches import BatchLoader
from mlpipe.data.dataset import Dataset
from mlpipe.models.registry import describe
from mlpipe.models.weights import initial_network
from mlpipe.training.cpu.memory import keep_freed_memory
from mlpipe.training.module import ClassificationModule
from mlpipe.training.optimizers.muon import orthogonalise
from mlpipe.training.precision import choose_precision
from mlpipe.training.whitening import whiten

EPOCHS, BATCH_SIZE, WHITEN_EPOCHS = 8, 2000, 3
BIAS_RATE, HEAD_RATE, KERNEL_RATE, DECAY = 0.053, 0.67, 0.24, 2e-6 * BATCH_SIZE
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
VIEWS_AT_ONCE = 500
TIMED_IMAGES = 8_000
USUAL_EPOCHS = 10


class Norm(nn.BatchNorm2d):
    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad = False


def convolution(num_inputs: int, num_outputs: int) -> nn.Conv2d:
    layer = nn.Conv2d(num_inputs, num_outputs, 3, padding="same", bias=False)
    nn.init.dirac_(layer.weight.data[:num_inputs])
    return layer


class Published(nn.Module):
    """Its network: 1.97 million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad = False
        layers: list[nn.Module] = [nn.GELU()]
        for before, after in ((24, 64), (64, 256), (256, 256)):
            layers += [convolution(before, after), nn.MaxPool2d(2), Norm(after), nn.GELU()]
            layers += [convolution(after, after), Norm(after), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.MaxPool2d(3))
        self.head = nn.Linear(256, 10, bias=False)
        self.head.weight.data /= self.head.weight.data.std()

    def forward(self, images: Tensor, train_whitening_bias: bool = False) -> Tensor:
        bias = self.whiten.bias
        features = F.conv2d(images, self.whiten.weight, bias if train_whitening_bias or bias is None else bias.detach())
        return self.head(self.layers(features).flatten(1)) / 256


class Recipe:
    """Its training, a step at a time."""

    def __init__(self, images_u8: Tensor, labels: Tensor, seed: int) -> None:
        torch.manual_seed(seed)
        self.images_u8, self.labels, self.device = images_u8, labels, images_u8.device
        self.network = Published().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        whiten(self.network.whiten, [normalised(images_u8[:5000])])
        self.mirrored = torch.rand(len(labels), device=self.device) < 0.5
        parameters = dict(self.network.named_parameters())
        self.kernels = [each for each in parameters.values() if each.dim() == 4 and each.requires_grad]
        biases = [each for name, each in parameters.items() if name.startswith("layers") and each.dim() == 1]
        biases = [each for each in biases if each.requires_grad]
        self.averages = [torch.zeros_like(kernel) for kernel in self.kernels]
        rates = ((parameters["whiten.bias"], BIAS_RATE), (biases, BIAS_RATE), (parameters["head.weight"], HEAD_RATE))
        groups = [
            {"params": [what] if isinstance(what, Tensor) else what, "lr": rate, "weight_decay": DECAY / rate}
            for what, rate in rates
        ]
        self.sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True, fused=True)
        self.steps_of_epoch = len(labels) // BATCH_SIZE
        self.total_steps = EPOCHS * self.steps_of_epoch
        self.step_number = 0
        self.precision = choose_precision("auto")

    def batch(self, rows: Tensor, epoch: int) -> Tensor:
        """Normalised images, shifted by up to two pixels; all are mirrored from epoch to epoch."""
        count = len(rows)
        positions = torch.arange(32, device=self.device).expand(count, 32)
        down, across = (_reflected(positions + torch.randint(-2, 3, (count, 1), device=self.device)) for _ in range(2))
        mirrored = self.mirrored[rows] ^ (epoch % 2 == 1)
        across = torch.where(mirrored[:, None], 31 - across, across)
        pixels = ((torch.arange(0, count * 32, 32, device=self.device)[:, None] + down) * 32)[:, :, None] + across[
            :, None, :
        ]
        gathered = self.images_u8[rows].reshape(-1, 3).index_select(0, pixels.reshape(-1))
        return normalised(gathered.view(count, 32, 32, 3))

    def step(self, rows: Tensor, epoch: int) -> None:
        images, number = self.batch(rows, epoch), self.step_number
        self.network.train()
        early = number < WHITEN_EPOCHS * self.steps_of_epoch
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            logits = self.network(images, early)
        self.network.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), self.labels[rows], label_smoothing=0.2, reduction="sum").backward()
        left = 1 - number / self.total_steps
        whitening_left = max(0.0, 1 - number / (WHITEN_EPOCHS * self.steps_of_epoch))
        for group, rate in zip(self.sgd.param_groups, (BIAS_RATE, BIAS_RATE, HEAD_RATE), strict=True):
            group["lr"] = rate * left
        self.sgd.param_groups[0]["lr"] = BIAS_RATE * whitening_left
        self.sgd.step()
        with torch.no_grad():
            for kernel, average in zip(self.kernels, self.averages, strict=True):
                if kernel.grad is None:
                    continue
                average.mul_(0.6).add_(kernel.grad)
                wanted = kernel.grad.add(average, alpha=0.6).flatten(1)
                kernel.mul_(len(kernel) ** 0.5 / kernel.norm())
                kernel.add_(orthogonalise(wanted).view(kernel.shape), alpha=-KERNEL_RATE * left)
        self.step_number += 1

    def run(self) -> float:
        """All epochs; seconds."""
        began = time.perf_counter()
        for epoch in range(EPOCHS):
            order = torch.randperm(len(self.labels), device=self.device)
            for start in range(0, self.steps_of_epoch * BATCH_SIZE, BATCH_SIZE):
                self.step(order[start : start + BATCH_SIZE], epoch)
        return time.perf_counter() - began

    @torch.no_grad()
    def accuracy(self, images_u8: Tensor, labels: Tensor) -> float:
        """Over six views of each image: two mirror images of it and of two copies shifted by a pixel."""
        self.network.eval()
        hits = 0
        for start in range(0, len(labels), VIEWS_AT_ONCE):
            images = normalised(images_u8[start : start + VIEWS_AT_ONCE])
            padded = F.pad(images, (1, 1, 1, 1), "reflect")
            shifted = [self._both_ways(padded[:, :, at : at + 32, at : at + 32]) for at in (0, 2)]
            logits = self._both_ways(images) / 2 + (shifted[0] + shifted[1]) / 4
            hits += int((logits.argmax(1) == labels[start : start + VIEWS_AT_ONCE]).sum())
        return hits / len(labels)

    def _both_ways(self, images: Tensor) -> Tensor:
        return (self.network(images) + self.network(images.flip(3))) / 2


def _reflected(positions: Tensor) -> Tensor:
    return 31 - (31 - positions.abs()).abs()


def normalised(images_u8: Tensor) -> Tensor:
    """(B, 32, 32, 3) uint8 to (B, 3, 32, 32) float32, channels last in memory."""
    mean, std = (255 * torch.tensor(values, device=images_u8.device) for values in (MEAN, STD))
    return ((images_u8.float() - mean) / std).permute(0, 3, 1, 2)


def usual_loop(data: Dataset, test: list[Tensor]) -> tuple[float, float]:
    """custom_cnn by the usual loop, with the settings of `report`: seconds of the processor, and test accuracy."""
    torch.manual_seed(0)
    split = data.train_split()
    loader = DataLoader(PerImage(np.asarray(split.images_u8), np.asarray(split.labels)), 64, shuffle=True)
    module = Reference(usual_network("custom_cnn"))
    began = time.process_time()
    trainer(num_epochs=USUAL_EPOCHS).fit(module, loader)
    seconds = time.process_time() - began
    module.eval()
    hits = 0
    with torch.inference_mode():
        for images, labels in DataLoader(PerImage(test[0].numpy(), test[1].numpy()), 500):
            hits += int((module.network(images).argmax(1) == labels).sum())
    return seconds, hits / len(test[1])


def points(data: Dataset, path: Path, images_u8: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Of the picture: a name, minutes of training and test accuracy each."""
    test = [torch.from_numpy(each) for each in read_images(path, "test")]
    recipe = Recipe(images_u8, labels, 0)
    began = time.process_time()
    recipe.run()
    published = time.process_time() - began, recipe.accuracy(test[0], test[1])
    named = {"published recipe": published, "usual loop": usual_loop(data, test)}
    return [
        {"name": name, "minutes": seconds / 60, "accuracy": accuracy} for name, (seconds, accuracy) in named.items()
    ]


def seconds_of_published(images_u8: Tensor, labels: Tensor) -> float:
    """Of training on `TIMED_IMAGES`, after a step to warm up."""
    recipe = Recipe(images_u8, labels, 0)
    rows = torch.arange(TIMED_IMAGES)
    recipe.step(rows[:BATCH_SIZE], 0)
    began = time.perf_counter()
    for part in rows.split(BATCH_SIZE):
        recipe.step(part, 1)
    return time.perf_counter() - began


def seconds_of_ours(data: Dataset) -> float:
    """The same for `strong`, by the module that the trainer drives, without the trainer."""
    model = by_recipe("custom_cnn")
    config = settings(model)
    start = initial_network(model, describe(model, data.manifest), store=None)  # type: ignore[arg-type]  # random
    module = ClassificationModule(
        start.network,
        config,
        channel_mean=data.manifest.channel_mean,
        channel_std=data.manifest.channel_std,
        num_classes=10,
        total_steps=10_000,
    )
    loader = BatchLoader(data.train_split(), config.batch_size, seed=0, shuffle=True)
    batches = [batch for batch, _ in zip(loader, range(1 + math.ceil(TIMED_IMAGES / config.batch_size)), strict=False)]
    optimizers, schedules = module.configure_optimizers()
    module.on_train_epoch_start()

    def step(images_u8: Tensor, labels: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=choose_precision("auto") == "bf16-mixed"):
            loss = module.training_loss((images_u8, labels))
        module.network.zero_grad()
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()

    step(*batches[0])
    began, count = time.perf_counter(), 0
    for images_u8, labels in batches[1:]:
        step(images_u8, labels)
        count += len(labels)
    return (time.perf_counter() - began) * TIMED_IMAGES / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="zip of train/<class>/… and test/<class>/…, 32×32 pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--all-images", action="store_true", help="train on the validation images, too")
    parser.add_argument("--json", type=Path, help="write the points of the README's picture to this file")
    arguments = parser.parse_args()
    keep_freed_memory()
    print("# The published recipe and strong\n")
    print(conditions("torch"), f"{torch.get_num_threads()} threads, {choose_precision('auto')}.\n")
    data = dataset(arguments.data)
    split = data.train_split()
    images_u8, labels = torch.from_numpy(np.asarray(split.images_u8)), torch.from_numpy(np.asarray(split.labels))
    if arguments.rounds:
        ours, published = [], []
        for _ in range(arguments.rounds):
            ours.append(1e3 * seconds_of_ours(data) / TIMED_IMAGES)
            published.append(1e3 * seconds_of_published(images_u8, labels) / TIMED_IMAGES)
        rows = [["strong", spread(ours, 3)], ["published", spread(published, 3)]]
        print(table(["recipe", "ms per training image, median (range)"], rows))
        print(f"\nstrong / published, round by round: {spread(paired(ours, published), 2)}\n", flush=True)
    if arguments.json:
        found = {
            "conditions": conditions("torch", "lightning"),
            "points": points(data, arguments.data, images_u8, labels),
        }
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    if arguments.seeds:
        if arguments.all_images:
            whole = read_images(arguments.data, "train")
            images_u8, labels = torch.from_numpy(whole[0]), torch.from_numpy(whole[1])
        test = [torch.from_numpy(each) for each in read_images(arguments.data, "test")]
        reached, rows = [], []
        for seed in range(arguments.seeds):
            recipe = Recipe(images_u8, labels, seed)
            seconds = recipe.run()
            reached.append(recipe.accuracy(test[0], test[1]))
            rows.append([str(seed), f"{reached[-1]:.4f}", f"{seconds:.0f}"])
        mean = f"{statistics.mean(reached):.4f}"
        print(table(["seed", "test accuracy, six views", "training, s"], [*rows, ["mean", mean, ""]]))


if __name__ == "__main__":
    main()
