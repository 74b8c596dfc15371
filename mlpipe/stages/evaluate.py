"""Measure the models on the test images, compare them, promote the best."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from mlpipe.config import RunConfig
from mlpipe.data.dataset import Dataset, open_dataset
from mlpipe.data.storage.store import ObjectStore
from mlpipe.environment import Environment
from mlpipe.errors import UserError
from mlpipe.evaluation.comparison import Contender, compare
from mlpipe.services import services_named
from mlpipe.tracking import registry, runs
from mlpipe.tracking.dag_runs import OnRun, parent_run
from mlpipe.tracking.data_input import log_input
from mlpipe.tracking.evaluation_run import Result, log_comparison, log_evaluation, measure, promote
from mlpipe.tracking.runs import TaskContext

logger = logging.getLogger(__name__)


@services_named()
def evaluate(
    config: RunConfig, origin: TaskContext, trained: Sequence[Mapping[str, Any]], *, on_run: OnRun
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
    with runs.active(parent_run(config, origin)) as parent:
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
            except MlflowException as error:
                if runs.is_unreachable(error):
                    raise
                failed[name] = (
                    f"{model['model_uri']} cannot be loaded ({str(error).splitlines()[0][:200]}); "
                    f"was it deleted, or its registered model renamed? Clear train [{name}] to register it again"
                )
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
            lambda holder: _unseen_by(holder, dataset, store, environment.cache_dir),
            test.labels,
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


def _unseen_by(
    holder: registry.RegisteredVersion, dataset: Dataset, store: ObjectStore, cache_dir: Path
) -> NDArray[np.bool_] | None:
    """(N,) the test images whose files a registered version was not trained on; `None`: that is not known."""
    digest = holder.tags.get("data_digest")
    if not digest:
        return None
    try:
        seen = open_dataset(digest, store, cache_dir).trained_on_hashes()
    except (FileNotFoundError, KeyError, TypeError):
        return None
    return ~np.isin(dataset.test_hashes(), seen)


def _contender(model: Mapping[str, Any], result: Result) -> Contender:
    return Contender(
        evaluation=result.evaluation,
        correct=result.correct,
        weights=model["weights"],
        train_seconds=model["train_seconds"],
        images_per_second=model["images_per_second"],
    )
