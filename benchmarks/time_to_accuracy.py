"""Seconds of training until the test accuracy of the report's network, 71.38 %.

    python benchmarks/time_to_accuracy.py cifar10-images.zip

The usual loop trains the report's network with Adam at 0.001 and batches of 64; ours is `train_network` with
custom_cnn of the recipe quick. Both are measured on the test images after each epoch, outside of the time; ours are
put where it looks for its validation images. Choosing an epoch by the test split is what a comparison of speed may do,
and nothing else.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from common import conditions, read_images, spread, table
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from training import MEAN, STD, Contestant, PerImage, Reference, usual_network

from mlpipe.config import RunParams
from mlpipe.data.dataset import Split
from mlpipe.models.registry import build_network
from mlpipe.models.weights import InitialWeights
from mlpipe.recipes import resolve
from mlpipe.training.network import train_network

TARGET = 0.7138
MAX_EPOCHS = 25

Images = tuple[NDArray[np.uint8], NDArray[np.int64]]


class UntilTarget(pl.Callback):
    """Measures after each epoch, and ends the training at the target."""

    def __init__(self, test: DataLoader[Any]) -> None:
        self.seconds = 0.0
        self.epochs = 0
        self._test = test

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds += time.perf_counter() - self._began
        self.epochs += 1
        pl_module.eval()
        with torch.inference_mode():
            hits = sum(int((pl_module.network(images).argmax(1) == labels).sum()) for images, labels in self._test)
        pl_module.train()
        trainer.should_stop = hits >= TARGET * len(self._test.dataset)  # type: ignore[arg-type]


def reference(path: Path, num_workers: int, seed: int) -> tuple[float, int]:
    """Seconds and epochs; infinite seconds where the target was not reached."""
    torch.manual_seed(seed)
    loader = DataLoader(
        PerImage(*read_images(path, "train")), 64, shuffle=True,
        num_workers=num_workers, persistent_workers=num_workers > 0,
    )  # fmt: skip
    until = UntilTarget(DataLoader(PerImage(*read_images(path, "test")), 1000))
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=MAX_EPOCHS, callbacks=[until], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Reference(usual_network("custom_cnn")), loader)
    return (until.seconds if trainer.should_stop else float("inf")), until.epochs


class Epochs:
    """Keeps what is logged of each epoch."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def log_metrics(self, metrics: Any, step: int) -> None:  # noqa: ARG002
        self.logged.append(dict(metrics))

    def log_params(self, params: Any) -> None:
        """Of no interest here."""

    def last_logged_step(self, metric: str) -> int:  # noqa: ARG002
        return 0


def ours(path: Path, seed: int) -> tuple[float, int]:
    """Likewise."""
    train, test = read_images(path, "train"), read_images(path, "test")
    manifest = SimpleNamespace(
        digest="0", classes=tuple("abcdefghij"), image_size=32, channel_mean=MEAN, channel_std=STD
    )
    dataset = SimpleNamespace(
        manifest=manifest, train_split=lambda: Split.of(*train), val_split=lambda: Split.of(*test)
    )
    model = resolve(RunParams(recipe="quick", models="custom_cnn", seed=seed)).models[0]
    network = build_network("custom_cnn", num_classes=10, image_size=32, seed=seed)
    initial = InitialWeights(description="random", replaced_head=False, sha256=None)
    epochs = Epochs()
    train_network(model, dataset, epochs, network=network, initial=initial)  # type: ignore[arg-type]
    seconds = 0.0
    for number, epoch in enumerate(epochs.logged, start=1):
        seconds += len(train[1]) / epoch["images_per_second"]
        if epoch["val/accuracy"] >= TARGET:
            return seconds, number
    return float("inf"), len(epochs.logged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="zip of train/<class>/… and test/<class>/…, 32×32 pixels")
    parser.add_argument("--rounds", type=int, default=1, help="each with a seed of its own")
    parser.add_argument("--workers", type=int, default=0, help="of the reference's loader")
    arguments = parser.parse_args()
    results: dict[str, list[tuple[float, int]]] = {"reference": [], "ours": []}
    for seed in range(arguments.rounds):
        for name, loop, options in (("reference", reference, (arguments.workers, seed)), ("ours", ours, (seed,))):
            contestant = Contestant(loop, arguments.data, *options)
            results[name].append(contestant.run())
            contestant.close()
    ratios = [mine / theirs for (mine, _), (theirs, _) in zip(results["ours"], results["reference"], strict=True)]
    print("# Time to 71.38 %\n")
    print(
        "Seconds of training on 50,000 images, evaluation apart, until the test accuracy of the report's network. The"
    )
    print("usual loop trains that network with Adam at 0.001, batch 64; ours is custom_cnn of the recipe quick.\n")
    print(conditions("torch", "torchvision", "lightning"), f"{arguments.rounds} seeds, from 0.\n")
    rows = [
        [name, spread([seconds for seconds, _ in each], 1), spread([epochs for _, epochs in each], 0)]
        for name, each in results.items()
    ]
    print(table(["loop", "seconds, median (range)", "epochs"], [*rows, ["ours / reference", spread(ratios, 3), ""]]))


if __name__ == "__main__":
    main()
