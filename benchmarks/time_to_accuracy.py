"""What training gives after equal epochs, and after how many seconds it gives the 71.38 % of the report's network.

    python benchmarks/time_to_accuracy.py cifar10-images.zip

The usual loop is that of training.py: Adam at 0.001, batches of 64. Ours is `train_network`: for equal epochs with the
recipe report, which has the same settings; for the time with custom_cnn of the recipe quick, over three epochs.
The test images measure both after each epoch, outside of the time; ours are put where it looks for its validation
images. Choosing an epoch by the test split is what a comparison of speed may do, and nothing else.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from accuracy import trained
from common import Logged, conditions, paired, read_images, spread, table
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from training import Contestant, PerImage, Reference, trainer, usual_network

from mlpipe.config import RecipeName, RunParams
from mlpipe.data.dataset import Dataset
from mlpipe.recipes import resolve

TARGET = 0.7138
MAX_EPOCHS = 25
QUICK_EPOCHS = 3
"""Of our schedule, which ends with them."""
EQUAL_EPOCHS = {"custom_cnn": 3, "resnet18": 1}


class Epoch(NamedTuple):
    """What was reached."""

    accuracy: float
    seconds: float
    """Of training, since its start."""


class Measuring(pl.Callback):
    """Measures after each epoch, and ends the training at the target."""

    def __init__(self, test: DataLoader[Any], target: float) -> None:
        self.epochs: list[Epoch] = []
        self._seconds = 0.0
        self._test = test
        self._target = target

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._seconds += time.perf_counter() - self._began
        pl_module.eval()
        with torch.inference_mode():
            hits = sum(int((pl_module.network(images).argmax(1) == labels).sum()) for images, labels in self._test)
        pl_module.train()
        self.epochs.append(Epoch(hits / len(self._test.dataset), self._seconds))  # type: ignore[arg-type]
        trainer.should_stop = self.epochs[-1].accuracy >= self._target


def reference(
    path: Path, architecture: str, seed: int, num_workers: int, num_epochs: int, target: float = 1.0
) -> list[Epoch]:
    """The usual loop, until the target at most."""
    network = usual_network(architecture, seed)
    loader = DataLoader(
        PerImage(*read_images(path, "train")), 64, shuffle=True,
        num_workers=num_workers, persistent_workers=num_workers > 0,
    )  # fmt: skip
    measuring = Measuring(DataLoader(PerImage(*read_images(path, "test")), 1000), target)
    trainer(measuring, num_epochs=num_epochs).fit(Reference(network), loader)
    return measuring.epochs


def ours(path: Path, architecture: str, seed: int, recipe: RecipeName, num_epochs: int) -> list[Epoch]:
    """Likewise, all epochs."""
    train, test = read_images(path, "train"), read_images(path, "test")
    dataset = Dataset.in_memory(tuple("abcdefghij"), train, test)
    models = f"{architecture}=random"
    model = resolve(RunParams(dataset="cifar10", recipe=recipe, models=models, seed=seed, epochs=num_epochs)).models[0]
    logged = Logged()
    trained(dataset, model, logged)
    seconds = np.cumsum([len(train[1]) / epoch["images_per_second"] for epoch in logged.epochs])
    return [Epoch(epoch["val/accuracy"], total) for epoch, total in zip(logged.epochs, seconds, strict=True)]


def in_turn(rounds: int, loops: Mapping[str, tuple[Any, ...]]) -> dict[str, list[list[Epoch]]]:
    """Epochs of each loop by round; each runs in a process of its own, with the round's number as its seed.

    Args:
        loops: function, archive, architecture, and what follows the seed.
    """
    results: dict[str, list[list[Epoch]]] = {name: [] for name in loops}
    for seed in range(rounds):
        for name, (loop, path, architecture, *rest) in loops.items():
            contestant = Contestant(loop, path, architecture, seed, *rest)
            results[name].append(contestant.run())  # type: ignore[arg-type]
            contestant.close()
    return results


def until(target: float, epochs: list[Epoch]) -> tuple[float, int]:
    """Seconds and epochs; infinite seconds where it was not reached."""
    for number, epoch in enumerate(epochs, start=1):
        if epoch.accuracy >= target:
            return epoch.seconds, number
    return float("inf"), len(epochs)


def mean_and_error(values: NDArray[np.float64]) -> str:
    """Mean and its standard error, over seeds."""
    return f"{values.mean():+.4f} ± {values.std(ddof=1) / len(values) ** 0.5:.4f}"


def equal_epochs(path: Path, rounds: int, num_workers: int) -> list[str]:
    lines = []
    for architecture, number in EQUAL_EPOCHS.items():
        loops = {
            "reference": (reference, path, architecture, num_workers, number),
            "ours": (ours, path, architecture, "report", number),
        }
        reached = {
            name: np.array([[epoch.accuracy for epoch in run] for run in runs])
            for name, runs in in_turn(rounds, loops).items()
        }  # (seeds, epochs)
        rows = [[name, *(spread(list(each), 3) for each in values.T)] for name, values in reached.items()]
        rows.append(["ours minus reference", *map(mean_and_error, (reached["ours"] - reached["reference"]).T)])
        lines += [table([f"{architecture}: test accuracy after epoch", *map(str, range(1, number + 1))], rows), ""]
    return lines


def time_to_target(path: Path, rounds: int, num_workers: int) -> str:
    loops = {
        "reference": (reference, path, "custom_cnn", num_workers, MAX_EPOCHS, TARGET),
        "ours": (ours, path, "custom_cnn", "quick", QUICK_EPOCHS),
    }
    reached = {name: [until(TARGET, run) for run in runs] for name, runs in in_turn(rounds, loops).items()}
    seconds = {name: [each[0] for each in runs] for name, runs in reached.items()}
    rows = [[name, spread(seconds[name], 1), spread([each[1] for each in runs], 0)] for name, runs in reached.items()]
    ratio = ["ours / reference", spread(paired(seconds["ours"], seconds["reference"]), 3), ""]
    return table(["loop", "seconds, median (range)", "epochs"], [*rows, ratio])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="zip of train/<class>/… and test/<class>/…, 32×32 pixels")
    parser.add_argument("--rounds", type=int, default=3, help="each with a seed of its own")
    parser.add_argument("--workers", type=int, default=0, help="of the reference's loader")
    parser.add_argument("--only", choices=["epochs", "time"], help="one of the two tables")
    arguments = parser.parse_args()
    how = arguments.data, arguments.rounds, arguments.workers
    print("# Accuracy by epochs and by time\n")
    print(
        "50,000 training images. *reference*: the usual loop, Adam at 0.001, batches of 64. *ours*: `train_network`.\n"
    )
    print(conditions("torch", "torchvision", "lightning"), f"{arguments.rounds} seeds, from 0; median (range).\n")
    if arguments.only != "time":
        print("Equal epochs and settings (recipe report, random weights):\n")
        print("\n".join(equal_epochs(*how)), flush=True)
    if arguments.only != "epochs":
        print("Seconds of training, without evaluation, until 71.38 %; ours: custom_cnn, quick, three epochs:\n")
        print(time_to_target(*how))


if __name__ == "__main__":
    main()
