"""Search for settings: workers that try them, and what the study found."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from mlpipe.config import ModelConfig, RunConfig
from mlpipe.data.dataset import Dataset, open_dataset
from mlpipe.data.storage.store import ObjectStore
from mlpipe.environment import Environment
from mlpipe.errors import ServiceUnavailableError, UserError
from mlpipe.models.own_files import with_own_copy
from mlpipe.models.registry import describe
from mlpipe.models.weights import initial_network
from mlpipe.recipes import write_model
from mlpipe.search import figures
from mlpipe.search.form import Search
from mlpipe.search.study import (
    DEFAULT,
    best_trial,
    check_same_search,
    count_start,
    default_trial,
    is_over,
    next_trial,
    open_study,
    request_trials,
    suggest,
    trials_asked_for,
    unfinished_trial,
)
from mlpipe.services import services_named
from mlpipe.stages.messages import FoundSettings, PublishedData, TrialResult
from mlpipe.tracking import runs, studies
from mlpipe.tracking.dag_runs import OnRun, experiment, parent_run
from mlpipe.tracking.runs import TaskContext, TrackedRun
from mlpipe.training.checkpoints import CheckpointStore
from mlpipe.training.protocol import TrainedModel, TrainingLogger

logger = logging.getLogger(__name__)

OF_THE_SETTINGS = (
    RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, AssertionError,
)  # fmt: skip
"""What a network, its builder or its training raises with settings that it cannot take; services raise others."""


class _TrialLogger:
    """Logs a trial's training to MLflow and reports it to the study; satisfies `TrainingLogger`."""

    def __init__(self, run: TrackedRun, trial: optuna.Trial, *, prune_before: int) -> None:
        """
        Args:
            prune_before: epoch from which on the trial is not pruned; at its last one, nothing would be saved.
        """
        self._run = run
        self._trial = trial
        self._prune_before = prune_before

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log_metrics(metrics, step)
        self._trial.report(metrics["val/accuracy"], step)
        if step < self._prune_before and self._trial.should_prune():
            raise optuna.TrialPruned(f"after epoch {step}: others had a better val/accuracy by then")

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._run.log_params(params)

    def ensure_current(self) -> None:
        self._run.ensure_current()

    def last_logged_step(self, metric: str) -> int:
        return self._run.last_logged_step(metric)


@services_named()
def search(config: Search, origin: TaskContext, worker: int, data: PublishedData, *, on_run: OnRun) -> int:
    """Try settings until all trials of this DAG run are taken; the number of trials that this worker ended.

    A worker that was killed resumes its own trial after its last epoch, unless that kills it again and again.

    Args:
        worker: its number, from 0.

    Raises:
        UserError: weights that cannot be had, a storage of no known kind, or a study of something else.
    """
    environment = Environment.from_env()
    store = ObjectStore.from_environment(environment)
    dataset = open_dataset(data.digest, store, environment.cache_dir)
    config = replace(config, model=with_own_copy(config.model, environment.cache_dir))
    study = open_study(config.study, environment.cache_dir, seed=config.seed, pruning=config.pruning, worker=worker)
    check_same_search(study, config, data.digest)
    if worker == 0:
        request_trials(study, config, origin.key("all"))
    else:
        _wait_for_trials(study, origin, config.trials)
    parent = parent_run(config.run, origin)
    on_run(runs.run_url(parent))
    request, ended = origin.key("all"), 0
    owner = f"{request}-{worker}"
    while True:
        trial = unfinished_trial(study, owner)
        if trial is None and is_over(study, config, request):
            logger.info("minutes: %g have passed since this search began, so no further trial begins", config.minutes)
            break
        trial = trial or next_trial(study, owner, request)
        if trial is None:
            break
        _run_trial(study, trial, config, origin, dataset, store, parent.info.run_id)
        ended += 1
    logger.info("this worker ended %d trials", ended)
    return ended


START_SECONDS = 120.0
"""Within which the first worker must have asked for the trials."""


def _wait_for_trials(study: optuna.Study, origin: TaskContext, number: int) -> None:
    """The first worker asks for the trials; the others wait until it has."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if len(trials_asked_for(study, origin.key("all"))) >= number:
            return
        time.sleep(0.2)
    raise ServiceUnavailableError(
        f"study: no trials were asked for within {START_SECONDS:g} s; see the log of the first worker"
    )


def _run_trial(
    study: optuna.Study,
    trial: optuna.Trial,
    config: Search,
    origin: TaskContext,
    dataset: Dataset,
    store: ObjectStore,
    parent_run_id: str,
) -> None:
    values = suggest(trial, config)
    model = replace(config.model, train=replace(config.model.train, **values, seed=config.seed))
    is_default = bool(trial.user_attrs.get(DEFAULT))
    run = runs.open_run(
        experiment(config.run),
        # A study whose storage was lost begins again from trial 0, with other values.
        runs.key_of(config.study, str(trial.number), json.dumps(values, sort_keys=True)),
        name=f"trial {trial.number}{' (the recipe)' if is_default else ''}",
        tags={
            **origin.tags(),
            "stage": "trial",
            "study": config.study,
            "trial": str(trial.number),
            "model": model.name,
        },
        description=f"{origin.link}\n\nTrial {trial.number} of {config.study}: `{json.dumps(values)}`",
        parent_run_id=parent_run_id,
    )
    trial.set_user_attr("run_id", run.info.run_id)
    logger.info("trial %d: %s", trial.number, values)
    with runs.active(run) as tracked:
        tracked.log_params({**values, "num_epochs": getattr(model.train, "num_epochs", "n/a"), "seed": config.seed})
        may_prune = config.pruning and not is_default
        told = _TrialLogger(tracked, trial, prune_before=getattr(model.train, "num_epochs", 1) if may_prune else 0)
        checkpoints = CheckpointStore(store, tracked.run_id)
        try:
            count_start(trial)
            trained = train_trial(model, dataset, told, checkpoints, store)
        except optuna.TrialPruned as pruned:
            study.tell(trial, state=TrialState.PRUNED)
            tracked.set_tags({"state": "pruned", "why": str(pruned)})
            logger.info("trial %d was pruned %s", trial.number, pruned)
        except OF_THE_SETTINGS as error:
            study.tell(trial, state=TrialState.FAIL)
            tracked.set_tags({"state": "failed", "why": (str(error) or repr(error))[:5000]})
            logger.warning("trial %d failed: %s", trial.number, error, exc_info=not isinstance(error, UserError))
        else:
            value = trained.metrics["val/accuracy"]
            study.tell(trial, value)
            tracked.set_tags({"state": "complete"})
            tracked.log_metrics({"best/val_accuracy": value, "best/epoch": trained.best_epoch})
            logger.info("trial %d: val/accuracy %.4f", trial.number, value)
    checkpoints.delete()
    # What this trial held on the device counts as taken where the next one's need is checked.
    gc.collect()
    torch.cuda.empty_cache()


def train_trial(
    model: ModelConfig, dataset: Dataset, told: TrainingLogger, checkpoints: CheckpointStore, store: ObjectStore
) -> TrainedModel:
    """Train a trial's model.

    Raises:
        optuna.TrialPruned: `told` ended the trial.
    """
    description = describe(model, dataset.manifest)
    if description.kind == "estimator":
        from mlpipe.training.estimator import train_estimator

        return train_estimator(model, description, dataset, told)
    from mlpipe.training.network import train_network

    start = initial_network(model, description, store)
    return train_network(model, dataset, told, start=start, checkpoints=checkpoints)


@services_named()
def conclude(config: Search, origin: TaskContext, *, on_run: OnRun) -> FoundSettings:
    """What the study found: the best settings by validation, and pictures of the search on the parent run.

    The recipe's own settings are among the trials, so the best are never worse than these on the validation images.

    Raises:
        UserError: no trial was completed.
    """
    environment = Environment.from_env()
    study = open_study(config.study, environment.cache_dir, seed=config.seed, pruning=config.pruning)
    best = best_trial(study)
    trials = study.get_trials(deepcopy=False)
    default = default_trial(study)
    found = FoundSettings(
        study=config.study,
        settings=dict(best.params),
        trials=tuple(map(_result, trials)),
        default=_result(default) if default else None,
        best=_result(best),
    )
    parent = TrackedRun(parent_run(config.run, origin))  # which `evaluate` ends
    on_run(parent.url)
    for name, figure in figures.of_study(study).items():
        parent.log_figure(figure, name)
    parent.log_dict(dict(best.params), "best_settings.json")
    parent.log_table(
        {
            "trial": [trial.number for trial in trials],
            "state": [trial.state.name.lower() for trial in trials],
            "val_accuracy": [trial.value for trial in trials],
            "settings": [json.dumps(trial.params) for trial in trials],
        },
        "trials.json",
    )
    model = write_model(config.model.architecture, config.model.weights)
    parent.set_tags({"study": config.study, studies.MODEL: model, studies.SETTINGS: json.dumps(best.params)})
    logger.info(
        "best of %d trials: number %d, val/accuracy %.4f, %s", len(trials), best.number, best.value, best.params
    )
    return found


def _result(trial: FrozenTrial) -> TrialResult:
    return TrialResult(
        number=trial.number,
        state=trial.state.name.lower(),
        value=trial.value,
        params=dict(trial.params),
        run_id=str(trial.user_attrs.get("run_id", "")),
        epochs=max(trial.intermediate_values, default=0),
    )


def winners(config: Search, settings: Mapping[str, Any]) -> RunConfig:
    """The run that trains the best settings anew, once for each seed; none of these seeds chose them."""
    models = tuple(
        replace(
            config.model,
            name=f"{config.model.name}_seed_{config.seed + number}",
            train=replace(config.model.train, **settings, seed=config.seed + number),
        )
        for number in range(1, config.seeds + 1)
    )
    form = {**config.run.form, "settings": json.dumps(dict(settings))}
    return replace(config.run, models=models, form=form)
