"""What the DAG's tasks do: download, preprocess, train, evaluate. Each can be called from anywhere.

Stages exchange data through object storage and small dictionaries; any machine can run any of them.
Each result is JSON.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from mlflow.entities import Run
from torch import nn

from mlpipe.config import ESTIMATORS, ModelConfig, RunConfig
from mlpipe.data.dataset import Dataset, open_dataset
from mlpipe.data.prepare import Manifest, prepare_dataset
from mlpipe.data.sources import SourceRef, fetch_source
from mlpipe.data.store import ObjectStore
from mlpipe.environment import Environment
from mlpipe.errors import UserError
from mlpipe.evaluation.comparison import Contender, compare
from mlpipe.models.package import log_packaged_model, verify_packaged_model
from mlpipe.models.portable import build_network
from mlpipe.models.registry import check_architecture
from mlpipe.models.weights import InitialWeights, load_initial_weights
from mlpipe.tracking import registry, runs
from mlpipe.tracking.data_run import log_data, log_input
from mlpipe.tracking.evaluation_run import Result, log_comparison, log_evaluation, measure, promote
from mlpipe.tracking.runs import Origin, TrackedRun
from mlpipe.training.checkpoints import CheckpointStore
from mlpipe.training.estimator import train_estimator
from mlpipe.training.network import train_network

logger = logging.getLogger(__name__)

OnRun = Callable[[str], None]
"""Told the address of the MLflow run as soon as there is one."""

NUM_EXAMPLES = 8
"""Images by which a logged model is checked and shown; more than one, so that the batch size is seen to be free."""

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


def _experiment_name(dataset: str) -> str:
    return f"image-classification-{dataset}"


def _experiment(config: RunConfig) -> str:
    return runs.experiment_id(_experiment_name(config.data.dataset))


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
        `key`, `sha256` and `kind` of the source.

    Raises:
        UserError: an unknown model, or a source that cannot be had.
    """
    for model in config.models:
        check_architecture(model.architecture, config.data.image_size)
    source = fetch_source(config.data, ObjectStore.from_environment(Environment.from_env()))
    parent = TrackedRun(_parent(config, origin, _experiment(config)))
    on_run(parent.url)
    parent.log_params({"recipe": config.recipe, "models": ",".join(model.name for model in config.models)})
    parent.log_params({f"data/{name}": value for name, value in asdict(config.data).items()})
    return asdict(source)


def preprocess(config: RunConfig, origin: Origin, source: Mapping[str, Any], *, on_run: OnRun) -> dict[str, Any]:
    """Publish the images as arrays, and log what they look like.

    Returns:
        `name`, `digest` and `uri`, `num_train`, `num_val`, `num_test` and `classes` of the published data.

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
        log_data(tracked, dataset, store.uri(f"datasets/{manifest.digest}"))
    return {
        "name": manifest.dataset,
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


def train(config: RunConfig, origin: Origin, name: str, data: Mapping[str, Any], *, on_run: OnRun) -> dict[str, Any]:
    """Train one model, log it, check that it loads elsewhere, and register it.

    Returns:
        `name`, `architecture` and `weights` of the model, its `run_id`, `model_uri` and `version`, `train_seconds`,
        `images_per_second`, the validation `metrics`, and the `dataset` that it was trained on.

    Raises:
        UserError: initial weights that cannot be had or do not fit, or settings with which nothing is learned.
    """
    model = config.model(name)
    environment = Environment.from_env()
    store = ObjectStore.from_environment(environment)
    dataset = open_dataset(data["digest"], store, environment.cache_dir)
    # Before the run is opened: weights that cannot be had leave no run behind.
    start = None if model.architecture in ESTIMATORS else _start(model, dataset, store)
    experiment = _experiment(config)
    run = runs.open_run(
        experiment,
        origin.key(model.name),
        name=display_name(model),
        tags={**origin.tags(), "stage": "train", **_model_tags(model, dataset)},
        description=f"{origin.link}\n\n{display_name(model)} on {data['name']}, recipe {config.recipe}.",
        parent_run_id=_parent(config, origin, experiment).info.run_id,
    )
    with runs.active(run, system_metrics=True) as tracked:
        on_run(tracked.url)
        tracked.log_params(_params(config, model, dataset))
        log_input(dataset.manifest, data["uri"], context="training")
        checkpoints = CheckpointStore(store, tracked.run_id)
        if start is None:
            trained = train_estimator(model, dataset, tracked)
        else:
            network, initial = start
            tracked.log_params({"initial_weights": initial.description})
            trained = train_network(model, dataset, tracked, network=network, initial=initial, checkpoints=checkpoints)
        tracked.log_metrics({"train_seconds": trained.train_seconds, "best_epoch": trained.best_epoch})
        examples_u8 = np.ascontiguousarray(dataset.val_split().images_u8[:NUM_EXAMPLES])
        logged = log_packaged_model(
            trained.description,
            trained.predictor,
            name=model.name,
            example_images_u8=examples_u8,
            tags=_model_tags(model, dataset),
        )
        verify_packaged_model(logged.model_uri, examples_u8, trained.probabilities(examples_u8))
        version = registry.register(
            registry.registered_name(data["name"]),
            model_uri=logged.model_uri,
            run_id=tracked.run_id,
            tags={**_model_tags(model, dataset), "dag_run_id": origin.dag_run_id},
            description=f"{display_name(model)}, trained on {data['name']} ({len(dataset.manifest.classes)} classes) "
            f"by recipe {config.recipe}. {origin.link}",
        )
        tracked.set_tags({"model_version": f"{version.name}/{version.version}"})
        checkpoints.delete()
    return {
        "name": model.name,
        "architecture": model.architecture,
        "weights": model.weights,
        "run_id": run.info.run_id,
        "run_url": tracked.url,
        "model_uri": version.uri,
        "model_id": logged.model_id,
        "version": version.version,
        "train_seconds": trained.train_seconds,
        "images_per_second": trained.images_per_second,
        "metrics": dict(trained.metrics),
        "dataset": dict(data),
    }


def _start(model: ModelConfig, dataset: Dataset, store: ObjectStore) -> tuple[nn.Module, InitialWeights]:
    """The network with its initial weights."""
    manifest = dataset.manifest
    torch.manual_seed(model.train.seed)
    network = build_network(model.architecture, len(manifest.classes), manifest.image_size)
    return network, load_initial_weights(network, model, classes=manifest.classes, store=store)


def display_name(model: ModelConfig) -> str:
    """The model's name for people; says so where a network starts from random weights."""
    return f"{model.name} (random weights)" if model.weights == "random" else model.name


def _model_tags(model: ModelConfig, dataset: Dataset) -> dict[str, str]:
    return {
        "model": model.name,
        "architecture": model.architecture,
        "weights": model.weights,
        "dataset": dataset.manifest.dataset,
        "data_digest": dataset.manifest.digest,
    }


def _params(config: RunConfig, model: ModelConfig, dataset: Dataset) -> dict[str, Any]:
    """The same names for every model; a setting that says nothing about this kind of model is `n/a`."""
    foreign = NETWORK_SETTINGS if model.architecture in ESTIMATORS else ESTIMATOR_SETTINGS
    settings = {name: "n/a" if name in foreign else value for name, value in asdict(model.train).items()}
    return {"recipe": config.recipe, **_model_tags(model, dataset), **settings, "image_size": config.data.image_size}


def evaluate(
    config: RunConfig, origin: Origin, trained: Sequence[Mapping[str, Any]], *, on_run: OnRun
) -> dict[str, Any]:
    """Measure the trained models on the test images, compare them and decide on promotion.

    The only reader of the test split.

    Returns:
        `parent_run_id`, `parent_url` and `compare_url`; the `dataset`; the `models` by falling accuracy with all their
        metrics; `failed` names; the `champion`, and `promoted`, the same if it became that now; a `summary`.

    Raises:
        UserError: no model was trained.
    """
    if not trained:
        raise UserError("models: none was trained, so there is nothing to compare; see the logs of the train tasks")
    data = trained[0]["dataset"]
    environment = Environment.from_env()
    store = ObjectStore.from_environment(environment)
    dataset = open_dataset(data["digest"], store, environment.cache_dir)
    test = dataset.test_split()
    classes = dataset.manifest.classes
    finished = {model["name"]: dict(model) for model in trained}
    failed = {model.name: "its training failed" for model in config.models if model.name not in finished}
    with runs.active(_parent(config, origin, _experiment(config))) as parent:
        on_run(parent.url)
        log_input(dataset.manifest, data["uri"], context="testing")
        results: dict[str, Result] = {}
        for name, model in finished.items():
            logger.info("measuring %s on %d test images", name, len(test.labels))
            try:
                results[name] = measure(model["model_uri"], test, classes)
            except UserError as error:
                failed[name] = str(error)
                continue
            log_evaluation(model, results[name], test)
            model["metrics"] |= results[name].evaluation.as_metrics()
        if not results:
            raise UserError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
        comparison = compare({name: _contender(finished[name], result) for name, result in results.items()}, failed)
        outcome = promote(
            config.promotion,
            registry.registered_name(data["name"]),
            [(finished[row.name], results[row.name]) for row in comparison.rows],
            lambda uri: measure(uri, test, classes),
        )
        ranked = [finished[row.name] for row in comparison.rows]
        summary = f"{comparison.summary()} {outcome.summary}"
        link = runs.compare_url([model["run_id"] for model in ranked], parent.experiment_id)
        log_comparison(parent, comparison, outcome, f"{origin.link} · [compare the runs]({link})\n\n{summary}")
    for model in ranked:
        del model["dataset"]
    return {
        "parent_run_id": parent.run_id,
        "parent_url": parent.url,
        "compare_url": link,
        "dataset": dict(data),
        "models": ranked,
        "failed": failed,
        "champion": outcome.champion,
        "promoted": outcome.champion if outcome.moved_champion else None,
        "summary": summary,
    }


def _contender(model: Mapping[str, Any], result: Result) -> Contender:
    return Contender(
        evaluation=result.evaluation,
        correct=result.correct,
        weights=model["weights"],
        train_seconds=model["train_seconds"],
        images_per_second=model["images_per_second"],
    )


def abandon(dataset: str, origin: Origin, reason: str) -> None:
    """End the MLflow runs that a failed DAG run left open: parent and children become FAILED, with the reason."""
    runs.abandon(_experiment_name(dataset), origin, reason)
