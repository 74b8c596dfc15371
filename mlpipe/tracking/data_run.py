"""What MLflow shows of a data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from mlpipe.data import figures
from mlpipe.data.dataset import Dataset
from mlpipe.tracking.data_input import log_input
from mlpipe.tracking.runs import TrackedRun


def log_left_out(run: TrackedRun, images: Sequence[tuple[str, str]]) -> None:
    """Log the name of each image that could not be used, with the reason."""
    run.log_table({"image": [name for name, _ in images], "reason": [why for _, why in images]}, "left_out.json")


def log_data(run: TrackedRun, dataset: Dataset, uri: str) -> None:
    """Log counts, statistics and pictures of the training images, and the manifest."""
    manifest = dataset.manifest
    log_input(manifest, uri, context="preprocessing")
    run.log_params(
        {
            "dataset": manifest.dataset,
            "data_digest": manifest.digest,
            "source_sha256": manifest.source_sha256,
            "image_size": manifest.image_size,
            "num_classes": len(manifest.classes),
        }
    )
    run.log_metrics(
        {
            "data/num_train": manifest.num_train,
            "data/num_val": manifest.num_val,
            "data/num_test": manifest.num_test,
            "data/num_left_out": len(manifest.left_out),
            **{
                f"data/channel_{part}_{channel}": value
                for part, values in (("mean", manifest.channel_mean), ("std", manifest.channel_std))
                for channel, value in zip(("red", "green", "blue"), values, strict=True)
            },
        }
    )
    if manifest.left_out:
        log_left_out(run, manifest.left_out)
    if manifest.near_duplicates:
        run.log_table(
            {
                "held-out image": [held_out for held_out, _ in manifest.near_duplicates],
                "seen image": [seen for _, seen in manifest.near_duplicates],
            },
            "near_duplicates.json",
        )
    split = dataset.train_split()
    run.log_figure(figures.sample_grid(split, manifest.classes), "samples.png")
    run.log_figure(figures.class_balance(dataset), "class_balance.png")
    run.log_figure(figures.channel_statistics(split), "channel_statistics.png")
    run.log_text(json.dumps(asdict(manifest), indent=2, ensure_ascii=False), "manifest.json")
