"""Measure the models on the test images, compare them, promote the best."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel

from mlpipe.config import RunConfig
from mlpipe.data.dataset import Dataset, Split, open_dataset
from mlpipe.data.storage.store import ObjectStore
from mlpipe.environment import Environment
from mlpipe.errors import UserError
from mlpipe.evaluation.comparison import compare, rank
from mlpipe.evaluation.gallery import Gallery
from mlpipe.evaluation.promotion import Overlap, promote
from mlpipe.evaluation.report import Report
from mlpipe.evaluation.result import ModelResult
from mlpipe.evaluation.scoring import Evaluation
from mlpipe.services import services_named
from mlpipe.stages.messages import Champion, ComparedModels, PublishedData, RegisteredModel, TrainedVersion
from mlpipe.tracking import registry, runs
from mlpipe.tracking.dag_runs import OnRun, parent_run
from mlpipe.tracking.data_input import ImageDataset, log_input
from mlpipe.tracking.evaluation_run import (
    OtherClassesError,
    is_outage,
    learning_curves,
    log_comparison,
    log_evaluation,
    measure,
    remeasure,
)
from mlpipe.tracking.kept_predictions import KeptPredictions
from mlpipe.tracking.leaderboard import ensure_leaderboard
from mlpipe.tracking.runs import TaskContext
from mlpipe.tracking.seen_images import ancestors_of, images_of, seen_by
from mlpipe.training.cross_validation import ERROR, MEAN

logger = logging.getLogger(__name__)

MODELS_WITH_PICTURES = 4
"""Of the best models so many have pictures in the report; all have them in their runs."""


@services_named()
def evaluate(
    config: RunConfig, origin: TaskContext, trained: Sequence[TrainedVersion], *, on_run: OnRun
) -> ComparedModels:
    """Measure the trained models on the test images, compare them and decide on promotion.

    The only reader of the test split.

    Raises:
        UserError: no model was trained, or none could be measured.
    """
    if not trained:
        raise UserError("models: none was trained, so there is nothing to compare; see the logs of the train tasks")
    data = trained[0].dataset
    environment = Environment.from_env()
    store = ObjectStore.from_environment(environment)
    dataset = open_dataset(data.digest, store, environment.cache_dir)
    kept = KeptPredictions(store, data.digest)
    test, classes = dataset.test_split(), dataset.manifest.classes
    models = {each.model.name: each.model for each in trained}
    failed = {model.name: "its training failed" for model in config.models if model.name not in models}
    results: list[ModelResult] = []
    best_model: PyFuncModel | None = None
    with runs.active(parent_run(config, origin)) as parent:
        on_run(parent.url)
        log_input(dataset.manifest, data.uri, context="testing")
        shown = ImageDataset(dataset.manifest, data.uri)
        for model in models.values():
            logger.info("measuring %s on %d test images", model.name, len(test))
            try:
                result, loaded = _measure(model, test, classes, kept)
                result = _with_known_images(result, model.model_uri, dataset, store, environment.cache_dir)
            except UserError as error:
                failed[model.name] = str(error)
                continue
            log_evaluation(result, test, shown, run_id=model.run_id, model_id=model.model_id)
            results.append(result)
            if min(results, key=rank) is result:
                best_model = loaded
        if best_model is None:
            raise UserError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
        overlap_with = partial(_overlap, dataset, store, environment.cache_dir)
        others = []
        for uri in config.compare_with:
            try:
                others.append(_measure_other(uri, test, classes, kept, overlap_with(uri)))
            except UserError as error:
                failed[uri.removeprefix("models:/")] = str(error)
        comparison = compare([*results, *others], failed)
        own = [row for row in comparison.rows if row in results]
        registered = registry.registered_name(data.name)
        promotion = promote(
            config.promotion,
            own,
            registry.RegistryAliases(registered, parent),
            lambda version: remeasure(registered, version, test, classes, kept),
            lambda version: overlap_with(f"models:/{registered}/{version}"),
        )
        for row in own:
            registry.describe(
                registered,
                row.version,
                _version_text(row, data, registered),
                {"accuracy": f"{row.evaluation.accuracy:.4f}"},
            )
        summary = " ".join(
            [comparison.summary(), *dataset.manifest.warnings, promotion.summary, *_told_of_reused(trained)]
        )
        ranked = tuple(_with_test_metrics(models[row.name], row) for row in own)
        link = runs.compare_url(parent.run_id, parent.experiment_id)
        best = own[0]
        report = Report(
            title=f"{data.name}: {', '.join(row.name for row in comparison.rows)}",
            comparison=comparison,
            manifest=dataset.manifest,
            verdict=summary,
            notes=data.notes,
            curves={row.name: learning_curves(models[row.name].run_id) for row in own},
            gallery=_gallery(own, dataset, best_model),
            snippet=(
                "import mlflow  # with its login in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD\n\n"
                f'mlflow.set_tracking_uri("{runs.ui_url()}")\n'
                f'model = mlflow.pyfunc.load_model("models:/{registered}/{best.version}")'
            ),
            links={
                "Charts in MLflow": link,
                "Leaderboard": ensure_leaderboard(parent.experiment_id),
                "Run in MLflow": parent.url,
            }
            | ({"DAG run in Airflow": origin.url} if origin.url else {}),
            addresses={"Arrays of the data set": data.uri} | {row.name: models[row.name].model_uri for row in own},
            former=promotion.former,
            settings=config.form,
            best=best,
            best_network=config.model(best.name).architecture if best.weights != "none" else "",
            best_uri=models[best.name].model_uri,
        )
        log_comparison(parent, report, promotion)
    logger.info("%s", comparison.plain_table())
    logger.info("%s", summary)
    champion = None
    if promotion.champion:
        uri = f"models:/{registered}/{promotion.champion}"
        page = runs.version_url(registered, promotion.champion)
        champion = Champion(name=registered, version=promotion.champion, model_uri=uri, url=page)
    return ComparedModels(
        parent_run_id=parent.run_id,
        parent_url=parent.url,
        compare_url=link,
        dataset=data,
        models=ranked,
        failed=failed,
        champion=champion,
        promoted=champion if promotion.moved_champion else None,
        summary=summary,
    )


def _told_of_reused(trained: Sequence[TrainedVersion]) -> list[str]:
    reused = [f"{each.model.name} (version {each.model.version})" for each in trained if each.is_reused]
    if not reused:
        return []
    same = "data, settings, seed, code and libraries equal those of an earlier run"
    return [f"Not trained again, because {same}: {', '.join(reused)}."]


def _gallery(rows: Sequence[ModelResult], dataset: Dataset, best_model: PyFuncModel) -> Gallery:
    """Pictures of the best models' mistakes; the best one's are explained, if it is a network that allows it."""
    test, training = dataset.test_split(), dataset.train_split()
    gallery = Gallery(test, dataset.test_names(), dataset.manifest.classes, training)
    best, *others = rows[:MODELS_WITH_PICTURES]
    _add_best(gallery, best, best_model)
    for row in others:
        gallery.add_model(row)
    gallery.add_doubts(best)
    return gallery


def _add_best(gallery: Gallery, best: ModelResult, model: PyFuncModel) -> None:
    """With explanations of its mistakes, unless these fail: a user's network may do anything."""
    if best.weights != "none":
        from mlpipe.evaluation.explain import Explainer  # with torch, which the network has loaded

        try:
            return gallery.add_model(best, Explainer.of(model.unwrap_python_model()))
        except Exception as error:  # noqa: BLE001 - of any kind
            logger.warning("the report does not explain the mistakes of %s (%r)", best.name, error)
    return gallery.add_model(best)


def _measure(
    model: RegisteredModel, test: Split, classes: tuple[str, ...], kept: KeptPredictions
) -> tuple[ModelResult, PyFuncModel]:
    """The scores, and the loaded model.

    Raises:
        UserError: the model cannot be loaded, or has other classes.
    """
    way_out = f"; was it deleted, or its registered model renamed? Clear train [{model.name}] to register it again"
    with _told(model.model_uri, way_out):
        evaluation, loaded = measure(model.model_uri, test, classes, kept, model.model_id)
    result = ModelResult(
        name=model.name,
        evaluation=evaluation,
        architecture=model.architecture,
        version=model.version,
        weights=model.weights,
        train_seconds=model.train_seconds,
        images_per_second=model.images_per_second,
        cross_validated=(model.metrics[MEAN], model.metrics[ERROR]) if MEAN in model.metrics else None,
    )
    return result, loaded


def _with_known_images(
    result: ModelResult, uri: str, dataset: Dataset, store: ObjectStore, cache_dir: Path
) -> ModelResult:
    """Say, and let the gate know, which test images those were trained on from which the model started or learned."""
    digests = ancestors_of(uri)
    if not digests:
        return result
    try:
        known = np.isin(dataset.test_hashes(), images_of(digests, store, cache_dir))
    except FileNotFoundError:
        told = "It is not known which test images what it started or learned from was trained on."
        return replace(result, evaluation=_noted(result.evaluation, told))
    if not known.any():
        return result
    told = (
        f"What it started or learned from was trained on {int(known.sum()):,} of these test images, so it is worse "
        "than it seems here. The gate leaves them out."
    )
    return replace(result, known=known, evaluation=_noted(result.evaluation, told))


def _noted(evaluation: Evaluation, note: str) -> Evaluation:
    return replace(evaluation, notes=(*evaluation.notes, note))


def _measure_other(
    uri: str, test: Split, classes: tuple[str, ...], kept: KeptPredictions, overlap: Overlap | None
) -> ModelResult:
    """A registered model that this run did not train.

    Args:
        overlap: of its training images and the test images; `None`: it is not known.

    Raises:
        UserError: it cannot be loaded, or has other classes.
    """
    try:
        with _told(f"compare_with: {uri}"):
            model_id, _ = registry.model_at(uri)
            evaluation, _ = measure(uri, test, classes, kept, model_id)
    except UserError:
        raise
    except Exception as error:  # anybody may have written it
        if is_outage(error):
            raise
        raise UserError(f"compare_with: {uri} cannot be measured ({str(error) or repr(error)})") from error
    if overlap and (known := int((~overlap.unseen).sum())):
        told = f"It was trained on {known:,} of these test images, so it is worse than it seems here."
        evaluation = _noted(evaluation, told)
    return ModelResult(name=uri.removeprefix("models:/"), evaluation=evaluation)


@contextmanager
def _told(subject: str, way_out: str = "") -> Iterator[None]:
    """Turn what keeps a model from being measured into a user's error about `subject`."""
    try:
        yield
    except OtherClassesError as error:
        raise UserError(f"{subject} {error}") from error
    except MlflowException as error:
        if runs.is_unreachable(error):
            raise
        raise UserError(f"{subject} cannot be loaded ({str(error).splitlines()[0][:200]}){way_out}") from error


def _version_text(row: ModelResult, data: PublishedData, registered: str) -> str:
    """What the page of a registered version says."""
    return (
        f"{row.display_name}: {row.evaluation.accuracy_text} right on {row.evaluation.num_images:,} test images of "
        f"{data.name}, {len(data.classes)} classes.\n\n"
        f'`mlflow.pyfunc.load_model("models:/{registered}/{row.version}")`'
    )


def _with_test_metrics(model: RegisteredModel, result: ModelResult) -> RegisteredModel:
    return replace(model, metrics={**model.metrics, **result.evaluation.as_metrics()})


def _overlap(dataset: Dataset, store: ObjectStore, cache_dir: Path, uri: str) -> Overlap | None:
    """Of a registered model's training images and this data set; `None`: it is not known."""
    seen = seen_by(uri, store, cache_dir)
    if seen is None:
        return None
    is_seen = np.isin(dataset.test_hashes(), seen)
    return Overlap(
        unseen=~is_seen, same_problem=bool(is_seen.any() or np.isin(dataset.trained_on_hashes(), seen).any())
    )
