"""What the recipe strong reaches, and what each of its parts gives.

    python benchmarks/accuracy.py cifar10-png.zip --ablation-epochs 3
    python benchmarks/accuracy.py cifar10-png.zip --model resnet18 --seeds 0 --ablation-seeds 1 --ablation-epochs 2

The final recipe is trained with several seeds and measured on the test images. The parts are taken away one by one and
measured on validation images alone, which is also how the recipe was found.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Logged, conditions, read_images, table
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from mlpipe.config import ModelConfig, NetworkSettings, RunParams
from mlpipe.data.dataset import Dataset
from mlpipe.models.registry import describe
from mlpipe.models.weights import initial_network
from mlpipe.recipes import resolve
from mlpipe.training.network import train_network
from mlpipe.training.protocol import TrainedModel

BATCH_SIZE = 500


def dataset(path: Path) -> Dataset:
    """The training images of a zip, a stratified tenth of them held out."""
    return held_out_tenth(*read_images(path, "train"))


def held_out_tenth(images_u8: NDArray[np.uint8], labels: NDArray[np.int64]) -> Dataset:
    """A data set of ten classes; a stratified tenth of its images is for validation."""
    train, val = train_test_split(np.arange(len(labels)), test_size=0.1, stratify=labels, random_state=0)
    training, validation = ((images_u8[rows], labels[rows]) for rows in (train, val))
    return Dataset.in_memory(tuple("abcdefghij"), training, validation)


def settings(model: ModelConfig) -> NetworkSettings:
    """Those of a network."""
    if not isinstance(model.train, NetworkSettings):
        raise TypeError(f"{model.name} is no network")
    return model.train


def by_recipe(architecture: str, seed: int = 0) -> ModelConfig:
    return resolve(RunParams(dataset="cifar10", recipe="strong", models=architecture, seed=seed)).models[0]


def trained(data: Dataset, model: ModelConfig, logged: Logged | None = None) -> TrainedModel:
    start = initial_network(model, describe(model, data.manifest), store=None)  # type: ignore[arg-type]  # random weights
    return train_network(model, data, logged or Logged(), start=start)


def hits(model: TrainedModel, images_u8: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,) whether the most probable class is the true one."""
    starts = range(0, len(labels), BATCH_SIZE)
    predicted = [model.probabilities(images_u8[start : start + BATCH_SIZE]).argmax(axis=1) for start in starts]
    return np.concatenate(predicted) == labels


def without_averaging(model: TrainedModel) -> TrainedModel:
    return replace(model, description=replace(model.description, test_time_averaging="none"))


def ablations(recipe: ModelConfig) -> Iterator[tuple[str, ModelConfig]]:
    """What is changed in the recipe, in words and in settings."""

    train = settings(recipe)

    def changed(**values: Any) -> ModelConfig:
        return replace(recipe, train=replace(train, **values))

    yield "the recipe", recipe
    sgd = changed(optimizer="sgd", learning_rate=0.1, weight_decay=5e-4, batch_size=128)
    yield "SGD at 0.1, batches of 128, in place of Muon", sgd
    if train.optimizer == "muon":
        yield "the published form of the network", replace(recipe, variant="standard")
        yield "whole images in all epochs", changed(progressive_resizing=False)
    else:
        yield "no change of brightness and contrast", changed(augmentation="flip_crop")
        yield "Muon without a fixed norm", changed(optimizer="muon")
    yield "flips only, no crops", changed(augmentation="flip")
    yield "crops only, no flips", changed(augmentation="crop")
    yield "no weight decay", changed(weight_decay=0.0)
    yield "no label smoothing", changed(label_smoothing=0.0)
    fifth = train.learning_rate / 5
    yield "constant learning rate, a fifth of the peak", changed(schedule="constant", learning_rate=fifth)


def seeds_table(data: Any, path: Path, architecture: str, num_seeds: int) -> str:
    test = read_images(path, "test")
    rows, reached = [], []
    for seed in range(num_seeds):
        began = time.perf_counter()
        model = trained(data, by_recipe(architecture, seed))
        seconds = time.perf_counter() - began
        reached.append(float(hits(model, *test).mean()))
        plain = float(hits(without_averaging(model), *test).mean())
        rows.append([str(seed), f"{plain:.4f}", f"{reached[-1]:.4f}", f"{seconds:.0f}"])
    deviation = f" ± {statistics.stdev(reached):.4f}" if num_seeds > 1 else ""
    rows.append(["mean, standard deviation", "", f"{statistics.mean(reached):.4f}{deviation}", ""])
    return table(["seed", "test accuracy, plain images", "averaged over views", "training and validation, s"], rows)


def print_ablation(data: Dataset, recipe: ModelConfig, num_seeds: int) -> None:
    """A row as soon as it is known."""
    val = data.val_split()
    images_u8, labels = np.asarray(val.images_u8[:]), np.asarray(val.labels)
    head = ["changed", "validation accuracy, plain images", "averaged over views", "points lost"]
    print(table(head, []), flush=True)
    whole: list[float] = []
    for name, config in ablations(recipe):
        plain, averaged = [], []
        for seed in range(num_seeds):
            model = trained(data, replace(config, train=replace(settings(config), seed=seed)))
            plain.append(float(hits(without_averaging(model), images_u8, labels).mean()))
            averaged.append(float(hits(model, images_u8, labels).mean()))
        lost = [100 * (before - now) for before, now in zip(whole, averaged, strict=False)]
        whole = whole or averaged
        error = f" ± {statistics.stdev(lost) / num_seeds**0.5:.2f}" if len(lost) > 1 else ""
        told = f"{statistics.mean(lost):.2f}{error}" if lost else ""
        row = [name, f"{statistics.mean(plain):.4f}", f"{statistics.mean(averaged):.4f}", told]
        print(table(row, []).splitlines()[0], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="zip of train/<class>/… and test/<class>/…, 32×32 pixels")
    parser.add_argument("--model", default="custom_cnn", choices=["custom_cnn", "resnet18"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ablation-seeds", type=int, default=3)
    parser.add_argument("--ablation-epochs", type=int, help="0: none; default: the recipe's")
    arguments = parser.parse_args()
    recipe = by_recipe(arguments.model)
    train = settings(recipe)
    num_epochs = train.num_epochs if arguments.ablation_epochs is None else arguments.ablation_epochs
    data = dataset(arguments.data)
    print(f"# {arguments.model} with the recipe strong\n")
    print(conditions("torch", "lightning"), f"{torch.get_num_threads()} threads.\n")
    if arguments.seeds:
        print(f"{arguments.model}, {train.num_epochs} epochs, 45,000 training images, 10,000 test images.\n")
        print(seeds_table(data, arguments.data, arguments.model, arguments.seeds) + "\n", flush=True)
    if num_epochs:
        print(f"{arguments.model}, one change at a time, {num_epochs} epochs, {arguments.ablation_seeds} seeds, 5,000")
        print("validation images. Points lost: mean over the seeds, each against the recipe, and its standard error.\n")
        print_ablation(data, replace(recipe, train=replace(train, num_epochs=num_epochs)), arguments.ablation_seeds)


if __name__ == "__main__":
    main()
