"""A study: its trials in storage that workers share, and the settings that Optuna varies.

Storage is a journal: a file where all workers run on one machine, Redis for several; or PostgreSQL. SQLite is not for
parallel searches, and MLflow's database has a version table that Optuna would take for its own.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.parse import urlsplit

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalRedisBackend
from optuna.trial import FrozenTrial, TrialState

from mlpipe.addresses import redact_address
from mlpipe.config import NetworkSettings
from mlpipe.errors import UserError
from mlpipe.models.own_files import code_of
from mlpipe.search.form import Search
from mlpipe.training.optimizers import OPTIMIZERS

logger = logging.getLogger(__name__)

STORAGE_VARIABLE = "MLPIPE_STUDY_STORAGE"
"""`redis://…` or `postgresql://…`; not set: a file in MLPIPE_CACHE_DIR."""

OWNER = "owner"
"""Attribute of a trial: the worker that runs it, which alone may resume it."""
WANTED_BY = "wanted by"
"""Attribute of a trial, with a worker: it was about to take the trial, and owns it if nobody else does."""
REQUEST = "request"
"""Attribute of a trial: the DAG run that asked for it."""
DEFAULT = "default"
"""Attribute of the trial that has the recipe's own settings."""
STARTS = "starts"
"""Attribute of a trial: the last epoch that it has reported, and how often in a row it was started there."""
MOST_STARTS = 2
"""Of a trial at one epoch; Airflow makes three attempts, so the last one is left for the other trials."""
SUBJECT = "subject"
"""Attribute of the study: what its trials have in common."""
BEGAN = "began"
"""Attribute of the study, with the DAG run: when that asked for its trials first, seconds since the epoch."""


def open_study(name: str, cache_dir: Path, *, seed: int, pruning: bool, worker: int = 0) -> optuna.Study:
    """The study of that name, which is created on first use.

    Args:
        worker: number of the worker, so that each samples other settings.

    Raises:
        UserError: the storage's address is of no known kind.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=name,
        storage=_storage(cache_dir, name),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
        if pruning
        else optuna.pruners.NopPruner(),
        direction="maximize",
        load_if_exists=True,
    )
    # A search that goes on must not draw what it has drawn; NumPy takes no larger seed than 2**32 - 1.
    num_ended = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)))
    study.sampler = optuna.samplers.TPESampler(
        seed=(seed * 1000 + worker + 7919 * num_ended) % 2**32, constant_liar=True, n_startup_trials=6
    )
    return study


def _storage(cache_dir: Path, name: str) -> BaseStorage:
    url = os.environ.get(STORAGE_VARIABLE)
    if not url:
        folder = cache_dir / "studies"
        folder.mkdir(parents=True, exist_ok=True)
        path = str(folder / f"{name}.log")
        # The lock of a worker that was killed is taken over after half a minute.
        return JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))
    scheme = urlsplit(url).scheme
    if scheme in ("redis", "rediss"):
        return JournalStorage(JournalRedisBackend(url))
    if scheme.startswith("postgresql"):
        return RDBStorage(url, heartbeat_interval=None)
    raise UserError(f"{STORAGE_VARIABLE}: {scheme}:// is not allowed; give redis:// or postgresql://, or nothing")


def check_same_search(study: optuna.Study, search: Search, digest: str) -> None:
    """See that the study's trials can be compared with those that are to come.

    Args:
        digest: of the data set.

    Raises:
        UserError: they are of other data, another model, or other settings.
    """
    settings = {name: value for name, value in asdict(search.model.train).items() if name != "seed"}
    model = [code_of(search.model.architecture), redact_address(search.model.weights)]
    facts = {"data": digest, "model": model, "varied settings": sorted(search.vary), "recipe and settings": settings}
    known = study.user_attrs.get(SUBJECT)
    if known is None:
        study.set_user_attr(SUBJECT, facts)
    elif other := [name for name, value in facts.items() if known[name] != value]:
        raise UserError(
            f"study: {study.study_name} was made with other {', '.join(other)}, so its trials cannot be compared with "
            "these; continue it with the same, or name another study"
        )


def request_trials(study: optuna.Study, search: Search, request: str) -> None:
    """Ask for the trials of a DAG run; a retry asks for what is missing.

    The first has the recipe's settings, unless a trial with them has a value: the best is never worse than these.

    Args:
        request: names the DAG run.
    """
    if f"{BEGAN} {request}" not in study.user_attrs:
        study.set_user_attr(f"{BEGAN} {request}", time.time())
    asked = trials_asked_for(study, request)
    number = search.trials - len(asked)
    default = default_trial(study)
    if not any(DEFAULT in trial.user_attrs for trial in asked) and (default is None or default.value is None):
        study.enqueue_trial(default_settings(search), user_attrs={REQUEST: request, DEFAULT: True})
        number -= 1
    for _ in range(number):
        study.enqueue_trial({}, user_attrs={REQUEST: request})


def is_over(study: optuna.Study, search: Search, request: str) -> bool:
    """Whether the time of a DAG run is over, within which its trials begin: on all workers, in all attempts."""
    return search.minutes is not None and time.time() > study.user_attrs[f"{BEGAN} {request}"] + 60 * search.minutes


def trials_asked_for(study: optuna.Study, request: str) -> list[FrozenTrial]:
    """The trials that a DAG run asked for."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.user_attrs.get(REQUEST) == request]


def unfinished_trial(study: optuna.Study, owner: str) -> optuna.Trial | None:
    """The trial that this worker left when it was stopped."""
    for known in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        # It may have been stopped before it could write itself down as the owner.
        if known.user_attrs.get(OWNER, owner if f"{WANTED_BY} {owner}" in known.user_attrs else None) == owner:
            logger.info("resuming trial %d", known.number)
            return _owned(study, known._trial_id, owner)
    return None


def _owned(study: optuna.Study, trial_id: int, owner: str) -> optuna.Trial:
    trial = optuna.Trial(study, trial_id)
    trial.set_user_attr(OWNER, owner)
    return trial


def next_trial(study: optuna.Study, owner: str, request: str) -> optuna.Trial | None:
    """A trial of this DAG run that nobody has, for this worker; `None`: all are taken.

    `study.ask` would take another DAG run's, or make one more where there is none.
    """
    study._thread_local.cached_all_trials = None  # as `study.ask` does: others have told results meanwhile
    for waiting in trials_asked_for(study, request):
        # Where another worker was first, the storage refuses, or raises if that one has ended it already.
        with suppress(UpdateFinishedTrialError):
            if waiting.state == TrialState.WAITING:
                study._storage.set_trial_user_attr(waiting._trial_id, f"{WANTED_BY} {owner}", True)
                if study._storage.set_trial_state_values(waiting._trial_id, state=TrialState.RUNNING):
                    return _owned(study, waiting._trial_id, owner)
    return None


def count_start(trial: optuna.Trial) -> None:
    """Note that a trial is started: one that kills its worker would otherwise kill each attempt, and end the search.

    Raises:
        UserError: it has been started as often as is allowed without reporting another epoch.
    """
    epoch = max(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values, default=0)
    last, starts = trial.user_attrs.get(STARTS, (epoch, 0))
    if last != epoch:
        starts = 0
    if starts == MOST_STARTS:
        raise UserError(f"killed its worker {starts} times, most likely for memory")
    trial.set_user_attr(STARTS, (epoch, starts + 1))


def suggest(trial: optuna.Trial, search: Search) -> dict[str, Any]:
    """Values of the varied settings for a trial; ranges lie around the recipe's own."""
    settings = search.model.train
    return {name: _suggest(trial, name, getattr(settings, name)) for name in search.vary}


def _suggest(trial: optuna.Trial, name: str, default: Any) -> Any:
    if name in ("learning_rate", "inverse_regularization"):
        return trial.suggest_float(
            name, default / 30, default * 30 if name != "learning_rate" else default * 10, log=True
        )
    if name == "weight_decay":
        return trial.suggest_float(name, 0.0, max(10 * default, 0.01))
    if name == "label_smoothing":
        return trial.suggest_float(name, 0.0, 0.3)
    if name == "batch_size":
        return trial.suggest_categorical(name, sorted({32, 64, 128, 256, 512, default}))
    if name == "num_components":
        return trial.suggest_int(name, 16, max(1024, default), log=True)
    if name == "width":
        return trial.suggest_categorical(name, sorted({0.5, 0.75, 1.0, 1.5, 2.0, default}))
    if name == "depth":
        return trial.suggest_categorical(name, sorted({1, 2, 3, default}))
    if name in ("augmentation", "mixing"):
        return trial.suggest_categorical(name, get_args(get_type_hints(NetworkSettings)[name]))
    return trial.suggest_categorical(name, tuple(OPTIMIZERS))


def default_settings(search: Search) -> dict[str, Any]:
    """The recipe's values of the varied settings."""
    return {name: getattr(search.model.train, name) for name in search.vary}


def default_trial(study: optuna.Study) -> FrozenTrial | None:
    """The trial with the recipe's settings, one that has a value where there is one; `None`: there is none at all."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if DEFAULT in trial.user_attrs]
    return max(trials, key=lambda trial: trial.state == TrialState.COMPLETE, default=None)


def best_trial(study: optuna.Study) -> FrozenTrial:
    """The trial of highest value; among equals the first.

    Raises:
        UserError: none has a value.
    """
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not done:
        raise UserError(f"study: {study.study_name} has no trial that was completed; see the logs of its workers")
    return max(done, key=lambda trial: (trial.value, -trial.number))
