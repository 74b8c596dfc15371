"""What the DAG's tasks do: download, preprocess, train, evaluate. Each can be called from anywhere.

Stages exchange data through object storage and small dictionaries; any machine can run any of them.
Each result is JSON.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from mlflow.entities import Run

from mlpipe.config import RunConfig
from mlpipe.data.dataset import open_dataset
from mlpipe.data.prepare import Manifest, prepare_dataset
from mlpipe.data.sources import SourceRef, fetch_source
from mlpipe.data.store import ObjectStore
from mlpipe.environment import Environment
from mlpipe.models.registry import check_architecture
from mlpipe.tracking import runs
from mlpipe.tracking.runs import Origin, TrackedRun

logger = logging.getLogger(__name__)

OnRun = Callable[[str], None]
"""Told the address of the MLflow run as soon as there is one."""

NETWORK_SETTINGS = frozenset(
    {
        "num_epochs",
        "batch_size",
        "learning_rate",
        "optimizer",
        "weight_decay",
        "schedule",
        "label_smoothing",
        "augmentation",
        "early_stopping_patience",
        "precision",
    }
)
"""Fields of `TrainConfig` that say nothing about an estimator; the others of these say nothing about a network."""
ESTIMATOR_SETTINGS = frozenset({"inverse_regularization", "max_iterations"})


def _experiment(config: RunConfig) -> str:
    return runs.experiment_id(f"image-classification-{config.data.dataset}")


def _parent(config: RunConfig, origin: Origin, experiment: str) -> Run:
    """The MLflow run of the whole DAG run."""
    names = ", ".join(model.name for model in config.models)
    return runs.open_run(
        experiment,
        origin.key("parent"),
        name=f"{config.recipe} · {config.data.dataset} · {origin.dag_run_id}",
        tags={**origin.tags(), "stage": "parent", "recipe": config.recipe, "dataset": config.data.dataset},
        description=f"{origin.link}\n\n{names} on {config.data.dataset}: not compared yet.",
    )


def download(config: RunConfig, origin: Origin, *, on_run: OnRun) -> dict[str, Any]:
    """Bring the source's bytes into object storage and open the MLflow run of this DAG run.

    Returns:
        `key`, `sha256` and `kind` of the source, and the names of the `models` to train.

    Raises:
        UserError: an unknown model, or a source that cannot be had.
    """
    for model in config.models:
        check_architecture(model.architecture)
    source = fetch_source(config.data, ObjectStore.from_environment(Environment.from_env()))
    parent = TrackedRun(_parent(config, origin, _experiment(config)))
    on_run(parent.url)
    parent.log_params({"recipe": config.recipe, "models": ",".join(model.name for model in config.models)})
    parent.log_params({f"data/{name}": value for name, value in asdict(config.data).items()})
    return {**asdict(source), "models": [model.name for model in config.models]}


def preprocess(config: RunConfig, origin: Origin, source: Mapping[str, Any], *, on_run: OnRun) -> dict[str, Any]:
    """Publish the images as arrays, and log what they look like.

    Returns:
        `dataset`, `digest` and `uri`, `num_train`, `num_val`, `num_test` and `classes` of the published data.

    Raises:
        UserError: the archive or its images cannot be used.
    """
    environment = Environment.from_env()
    store = ObjectStore.from_environment(environment)
    reference = SourceRef(key=source["key"], sha256=source["sha256"], kind=source["kind"])
    manifest = prepare_dataset(config.data, reference, store)
    dataset = open_dataset(manifest.digest, store, environment.cache_dir)
    experiment = _experiment(config)
    run = runs.open_run(
        experiment,
        origin.key("data"),
        name=f"data · {manifest.dataset}",
        tags={**origin.tags(), "stage": "data", "dataset": manifest.dataset, "data_digest": manifest.digest},
        description=_data_description(manifest, origin),
        parent_run_id=_parent(config, origin, experiment).info.run_id,
    )
    with runs.active(run) as tracked:
        on_run(tracked.url)
        _log_data(tracked, config, dataset, store)
    return {
        "dataset": manifest.dataset,
        "digest": manifest.digest,
        "uri": store.uri(f"datasets/{manifest.digest}"),
        "num_train": manifest.num_train,
        "num_val": manifest.num_val,
        "num_test": manifest.num_test,
        "classes": list(manifest.classes),
    }


def _data_description(manifest: Manifest, origin: Origin) -> str:
    notes = "\n".join(f"- {note}" for note in manifest.notes)
    return (
        f"{origin.link}\n\n{manifest.num_train:,} images to train on, {manifest.num_val:,} to validate, "
        f"{manifest.num_test:,} to test; {len(manifest.classes)} classes; "
        f"{manifest.image_size} × {manifest.image_size} pixels.\n\n{notes}"
    )
