"""Train one model, log it, check that it loads elsewhere, register it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.entities import Run

from mlpipe.addresses import redact_uri
from mlpipe.config import LinearSettings, ModelConfig, NetworkSettings, RunConfig
from mlpipe.data.dataset import Dataset, open_dataset
from mlpipe.data.storage.store import ObjectStore, file_sha256
from mlpipe.environment import Environment
from mlpipe.errors import UserError
from mlpipe.models import architectures
from mlpipe.models.own_files import with_own_copy
from mlpipe.models.package import PackagedModel, log_packaged_model, verify_packaged_model
from mlpipe.models.portable import ModelDescription
from mlpipe.models.registry import describe
from mlpipe.models.weights import InitialNetwork, initial_network
from mlpipe.services import services_named
from mlpipe.stages.messages import PublishedData, RegisteredModel, TrainedVersion
from mlpipe.tracking import registry, runs
from mlpipe.tracking.dag_runs import OnRun, experiment, parent_run
from mlpipe.tracking.data_input import log_input
from mlpipe.tracking.registry import RegisteredVersion
from mlpipe.tracking.runs import TaskContext, TrackedRun
from mlpipe.tracking.seen_images import ANCESTORS, data_of, seen_by
from mlpipe.tracking.trained_before import TAG as TRAINING_KEY
from mlpipe.tracking.trained_before import copy_history, find_trained, training_key, wanted_training
from mlpipe.training.calibration import with_calibration
from mlpipe.training.checkpoints import CheckpointStore
from mlpipe.training.cross_validation import ACCURACY, ERROR, MEAN, cross_validate
from mlpipe.training.protocol import TrainedModel, TrainingLogger
from mlpipe.training.teacher import Teacher, load_teacher

logger = logging.getLogger(__name__)

NUM_EXAMPLES = 8
"""Images by which a logged model is checked and shown; more than one, so that the batch size is seen to be free."""

OF_THE_HEAD = ("fine_tuning", "class_weights", "test_time_averaging", "width", "depth", "seed")
"""Settings that say something about a network of which only the last layer is trained."""


@services_named()
def train(config: RunConfig, origin: TaskContext, name: str, data: PublishedData, *, on_run: OnRun) -> TrainedVersion:
    """Train one model, log it, check that it loads elsewhere, and register it.

    Raises:
        UserError: initial weights that cannot be had or do not fit, or settings with which nothing is learned.
    """
    environment = Environment.from_env()
    model = with_own_copy(config.model(name), environment.cache_dir)
    store = ObjectStore.from_environment(environment)
    dataset = open_dataset(data.digest, store, environment.cache_dir)
    key = training_key(model, data.digest, config.folds)
    registered = registry.registered_name(data.name)
    experiment_id = experiment(config)
    # A task that was cleared may be given other data or settings: that is another training, with a run of its own.
    run_key = origin.key(f"{model.name} {wanted_training(model, data.digest, config.folds)}")
    own = runs.find_run(experiment_id, run_key)
    runs.set_aside(experiment_id, origin, f"tags.model = '{model.name}' and tags.run_key != '{run_key}'")
    if own and own.info.status == "FINISHED" and (done := registry.find(registered, own.info.run_id)):
        runs.take_back(own, parent_run(config, origin).info.run_id)
        return _done(model, own, done, data, on_run=on_run)
    is_begun = own is not None and runs.stage_of(own) != "reused"  # by an attempt before
    if key and not (config.retrain or is_begun) and (earlier := find_trained(registered, key)):
        return _reuse(config, origin, run_key, model, dataset, data, earlier, on_run=on_run)
    if config.folds:
        dataset.check_folds(config.folds)
        _check_unseen(model, dataset, store, environment.cache_dir)
    # Before the run is opened: weights that cannot be had leave no run behind.
    description = describe(model, dataset.manifest)
    start = initial_network(model, description, store) if description.kind == "network" else None
    teacher = None
    if start and isinstance(model.train, NetworkSettings) and model.train.teacher:
        teacher = load_teacher(model.train.teacher, dataset.manifest.classes)
    tags = _model_tags(model, dataset)
    ancestors = data_of(_addresses(model))
    run = runs.open_run(
        experiment_id,
        run_key,
        name=display_name(model),
        tags={**origin.tags(), "stage": "train", **tags},
        description=f"{origin.link}\n\n{display_name(model)} on {data.name}, recipe {config.recipe}.",
        parent_run_id=parent_run(config, origin).info.run_id,
    )
    with runs.active(run, system_metrics=True) as tracked:
        on_run(tracked.url)
        tracked.log_params(_params(config, model, dataset))
        log_input(dataset.manifest, data.uri, context="training")
        checkpoints = CheckpointStore(store, tracked.run_id)
        trained = _fit(model, description, dataset, tracked, start, teacher, checkpoints, store)
        trained = with_calibration(trained, dataset.val_split())
        folds = _cross_validate(config, model, description, dataset, tracked, teacher, store) if config.folds else {}
        tracked.log_metrics(
            {
                **folds,
                "temperature": trained.description.temperature,
                "uniform_share": trained.description.uniform_share,
                "train_seconds": trained.train_seconds,
                "best/epoch": trained.best_epoch,
                "best/val_accuracy": trained.metrics["val/accuracy"],
            }
        )
        tracked.ensure_current()
        version = registry.find(registered, tracked.run_id)
        if version is None:
            registry.discard_logged_models(run)
            if ancestors:
                tags[ANCESTORS] = ",".join(sorted(ancestors))
            logged = _package(model, dataset, trained, tags)
            version = registry.register(
                registered,
                model_uri=logged.model_uri,
                run_id=tracked.run_id,
                tags={**tags, "dag_run_id": origin.dag_run_id, **({TRAINING_KEY: key} if key else {})},
                description=f"{display_name(model)}, trained on {data.name} "
                f"({len(dataset.manifest.classes)} classes) by recipe {config.recipe}. {origin.link}",
            )
        tracked.set_tags({"model_version": f"{version.name}/{version.version}"})
    # When MLflow has all: until then a retry trains nothing again.
    checkpoints.delete()
    return TrainedVersion(
        model=_registered(
            model,
            tracked,
            version,
            train_seconds=trained.train_seconds,
            images_per_second=trained.images_per_second,
            metrics={**trained.metrics, **folds},
        ),
        dataset=data,
    )


def _reuse(
    config: RunConfig,
    origin: TaskContext,
    run_key: str,
    model: ModelConfig,
    dataset: Dataset,
    data: PublishedData,
    earlier: RegisteredVersion,
    *,
    on_run: OnRun,
) -> TrainedVersion:
    """Take a version that was trained in the same way before; the MLflow run shows how that went."""
    told = (
        f"{display_name(model)} is not trained again: {earlier.uri} has the same data, settings, seed, code "
        "and libraries. Set retrain to train it anyway."
    )
    run = runs.open_run(
        experiment(config),
        run_key,
        name=f"{display_name(model)}: version {earlier.version}, trained before",
        tags={
            **origin.tags(),
            "stage": "reused",
            **_model_tags(model, dataset),
            "model_version": f"{earlier.name}/{earlier.version}",
        },
        description=f"{origin.link}\n\n{told}",
        parent_run_id=parent_run(config, origin).info.run_id,
    )
    with runs.active(run) as tracked:
        on_run(tracked.url)
        logger.info("%s", told)
        log_input(dataset.manifest, data.uri, context="training")
        metrics = copy_history(runs.tracked(earlier.run_id), tracked)
        result = _registered(model, tracked, earlier, **_training(tracked, metrics))
    return TrainedVersion(model=result, dataset=data, is_reused=True)


def _done(
    model: ModelConfig, own: Run, version: RegisteredVersion, data: PublishedData, *, on_run: OnRun
) -> TrainedVersion:
    """Take what this very task has trained before it was cleared; its MLflow run stays as it is."""
    tracked = TrackedRun(own)
    on_run(tracked.url)
    logger.info(
        "%s is not trained again: this task already made %s; start a DAG run with retrain", model.name, version.uri
    )
    result = _registered(model, tracked, version, **_training(tracked, own.data.metrics))
    return TrainedVersion(model=result, dataset=data)


def _training(tracked: TrackedRun, metrics: Mapping[str, float]) -> dict[str, Any]:
    """How a training went that has ended, from its MLflow run.

    Args:
        metrics: the run's, by name.
    """
    loss = dict(tracked.history("val/loss"))[int(metrics["best/epoch"])]
    folds = {name: metrics[name] for name in (MEAN, ERROR) if name in metrics}
    return {
        "train_seconds": metrics["train_seconds"],
        "images_per_second": metrics.get("images_per_second", 0.0),
        "metrics": {"val/accuracy": metrics["best/val_accuracy"], "val/loss": loss, **folds},
    }


def _registered(
    model: ModelConfig, tracked: TrackedRun, version: RegisteredVersion, **training: Any
) -> RegisteredModel:
    """The message about a version, as this DAG run's MLflow run of the model has it; `training`: how that went."""
    return RegisteredModel(
        name=model.name,
        architecture=architectures.find(model.architecture).name,
        weights=redact_uri(model.weights),
        run_id=tracked.run_id,
        run_url=tracked.url,
        model_uri=version.uri,
        model_id=version.model_id,
        version=version.version,
        **training,
    )


def _addresses(model: ModelConfig) -> list[str]:
    """Of what a model starts and learns from."""
    teacher = model.train.teacher if isinstance(model.train, NetworkSettings) else None
    return [model.weights, *([teacher] if teacher else [])]


def _check_unseen(model: ModelConfig, dataset: Dataset, store: ObjectStore, cache_dir: Path) -> None:
    """
    Raises:
        UserError: what the training starts or learns from has seen images that a cross-validation would hold out.
    """
    for address in _addresses(model):
        seen = seen_by(address, store, cache_dir) if address.startswith("models:/") else None
        if seen is not None and np.isin(dataset.trained_on_hashes(), seen).any():
            raise UserError(
                f"folds: {address} was trained on images of this data set, so no part of them would be unseen; "
                "leave folds out, or start from other weights"
            )


def _fit(
    model: ModelConfig,
    description: ModelDescription,
    dataset: Dataset,
    tracked: TrainingLogger,
    start: InitialNetwork | None,
    teacher: Teacher | None,
    checkpoints: CheckpointStore,
    store: ObjectStore,
) -> TrainedModel:
    if start is None:
        from mlpipe.training.cached_fit import fit_once

        return fit_once(model, description, dataset, tracked, checkpoints)
    form = start.description
    size = form.input_size or form.image_size
    tracked.log_params({"initial_weights": start.source, "variant": form.variant, "input_size": size})
    if isinstance(model.train, NetworkSettings) and model.train.fine_tuning == "head":
        from mlpipe.training.head import train_head

        return train_head(model, dataset, tracked, start=start, store=store)
    from mlpipe.training.network import train_network

    return train_network(model, dataset, tracked, start=start, checkpoints=checkpoints, teacher=teacher)


def _cross_validate(
    config: RunConfig,
    model: ModelConfig,
    description: ModelDescription,
    dataset: Dataset,
    tracked: TrackedRun,
    teacher: Teacher | None,
    store: ObjectStore,
) -> dict[str, float]:
    def train_part(part: Dataset, silent: TrainingLogger, number: int) -> TrainedModel:
        start = initial_network(model, description, store) if description.kind == "network" else None
        checkpoints = CheckpointStore(store, f"{tracked.run_id}/{number}")
        trained = _fit(model, description, part, silent, start, teacher, checkpoints, store)
        checkpoints.delete()
        return trained

    known = {step: value for step, value in tracked.history(ACCURACY) if step <= config.folds}
    return cross_validate(dataset, config.folds, model.train.seed, known, tracked, train_part)


def _package(model: ModelConfig, dataset: Dataset, trained: TrainedModel, tags: Mapping[str, str]) -> PackagedModel:
    """Log the model, and see that a process without this project gets the same answers from it."""
    examples_u8 = np.ascontiguousarray(dataset.val_split().images_u8[:NUM_EXAMPLES])
    logged = log_packaged_model(
        trained.description,
        trained.predictor,
        name=model.name,
        example_images_u8=examples_u8,
        tags=tags,
    )
    verify_packaged_model(logged.model_uri, examples_u8, trained.probabilities(examples_u8))
    return logged


def display_name(model: ModelConfig) -> str:
    """The model's name for people; says so where a network starts from random weights."""
    return f"{model.name} (random weights)" if model.weights == "random" else model.name


def _model_tags(model: ModelConfig, dataset: Dataset) -> dict[str, str]:
    return {
        "model": model.name,
        "architecture": architectures.find(model.architecture).name,
        "weights": redact_uri(model.weights),
        "dataset": dataset.manifest.dataset,
        "data_digest": dataset.manifest.digest,
    }


def _params(config: RunConfig, model: ModelConfig, dataset: Dataset) -> dict[str, Any]:
    """The same names for every model; a setting that says nothing about this kind of model is `n/a`.

    `precision` is left to the training of a network, which knows what `auto` came to.
    """
    settings = {each.name: "n/a" for kind in (NetworkSettings, LinearSettings) for each in fields(kind)}
    used = asdict(model.train)
    if isinstance(model.train, NetworkSettings):
        del settings["precision"], used["precision"]
        if model.train.fine_tuning == "head":
            used = {name: used[name] for name in OF_THE_HEAD}
    settings |= used
    own_file = architectures.find(model.architecture).own_file
    settings["network_file_sha256"] = file_sha256(own_file) if own_file else "n/a"
    return {"recipe": config.recipe, **_model_tags(model, dataset), **settings, "image_size": config.data.image_size}
