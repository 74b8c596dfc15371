"""What a worker of a search does with its trials, in a real MLflow store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import optuna
import pytest
import torch

from mlpipe.config import ModelConfig
from mlpipe.errors import UserError
from mlpipe.search import study as studies
from mlpipe.search.form import Search, TuneParams, resolve_search
from mlpipe.search.study import open_study
from mlpipe.stages import search as stage
from mlpipe.stages.messages import FoundSettings, PublishedData
from mlpipe.tracking.runs import TaskContext
from mlpipe.tracking.studies import found_by

DATA = PublishedData(name="pets", digest="d", uri="s3://b", num_train=1, num_val=1, num_test=1, classes=("a", "b"))


@pytest.fixture(scope="module")
def _store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
    yield
    mlflow.set_tracking_uri(None)


class Killed(BaseException):
    """As a worker ends that cannot say why."""


class Workers:
    """Workers of one search, whose trainings are the test's."""

    def __init__(self, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._name, self._monkeypatch = folder, name, monkeypatch
        self.architectures: list[str] = []
        """Of all trainings that have ended."""

    def config(self, **form: object) -> Search:
        return resolve_search(TuneParams.from_mapping({"trials": 4, "study": self._name, **form}), "run-1")

    def work(self, train: Callable[..., float], worker: int = 0, **form: object) -> int:
        """
        Args:
            train: what a trial's training does with its logger; returns its val/accuracy.
        """

        def fit(model: ModelConfig, _dataset: object, told: Any, *_: object) -> SimpleNamespace:
            self.architectures.append(model.architecture)
            return SimpleNamespace(metrics={"val/accuracy": train(told)}, best_epoch=1)

        self._monkeypatch.setattr(stage, "train_trial", fit)
        return stage.search(self.config(**form), self._origin(worker), worker, DATA, on_run=lambda _: None)

    def conclude(self, **form: object) -> FoundSettings:
        return stage.conclude(self.config(**form), self._origin(), on_run=lambda _: None)

    def _origin(self, map_index: int = -1) -> TaskContext:
        return TaskContext(dag_id="tune", dag_run_id=self._name, task_id="search", map_index=map_index)

    @property
    def study(self) -> optuna.Study:
        return open_study(self._name, self.folder, seed=0, pruning=True)

    def run_of(self, number: int) -> Any:
        """The MLflow run of a trial."""
        return mlflow.get_run(self.study.trials[number].user_attrs["run_id"])


@pytest.fixture
def workers(_store: None, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Workers:
    monkeypatch.chdir(tmp_path)  # MLflow's default artifact folder is relative
    monkeypatch.setenv("MLPIPE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(stage.ObjectStore, "from_environment", lambda _: None)
    monkeypatch.setattr(stage, "open_dataset", lambda *_: None)
    monkeypatch.setattr(stage, "CheckpointStore", lambda *_: SimpleNamespace(delete=lambda: None))
    return Workers(tmp_path, request.node.originalname[:60].rstrip("_"), monkeypatch)


def die(_: object) -> float:
    raise Killed


def test_after_its_minutes_a_worker_only_ends_what_it_has_begun(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mlpipe")
    now = 1_900_000_000.0
    monkeypatch.setattr(studies.time, "time", lambda: now)
    with pytest.raises(Killed):
        workers.work(die, minutes=10)
    now += 601
    assert workers.work(lambda _: 0.5, worker=1, minutes=10) == 0
    assert workers.work(lambda _: 0.5, minutes=10) == 1
    assert [trial.state.name for trial in workers.study.trials] == ["COMPLETE", *["WAITING"] * 3]
    assert "minutes: 10 have passed" in caplog.text


def test_a_trial_that_kills_its_workers_fails_and_the_search_goes_on(workers: Workers) -> None:
    for _ in range(2):
        with pytest.raises(Killed):
            workers.work(die)
    assert workers.work(lambda _: 0.5) == 4
    assert [trial.state.name for trial in workers.study.trials] == ["FAIL", *["COMPLETE"] * 3]
    tags = workers.run_of(0).data.tags
    assert (tags["state"], tags["why"]) == ("failed", "killed its worker 2 times, most likely for memory")


def test_a_trial_that_comes_further_each_time_is_always_resumed(workers: Workers) -> None:
    for epoch in range(1, 6):

        def train(told: Any, epoch: int = epoch) -> float:
            told.log_metrics({"val/accuracy": epoch / 10}, epoch)
            raise Killed

        with pytest.raises(Killed):
            workers.work(train)
    assert workers.work(lambda _: 0.5) == 4
    assert workers.study.trials[0].state.name == "COMPLETE"


def test_a_trial_without_enough_memory_on_the_device_fails(workers: Workers) -> None:
    def train(_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    assert workers.work(train) == 4
    assert {trial.state.name for trial in workers.study.trials} == {"FAIL"}
    assert workers.run_of(1).data.tags["why"].startswith("CUDA out of memory")
    assert workers.run_of(1).info.status == "FINISHED"


def test_a_trial_with_settings_that_its_network_cannot_take_fails_with_the_reason(workers: Workers) -> None:
    def train(_: object) -> float:
        raise ValueError("num_channels must be divisible by num_groups")

    assert workers.work(train) == 4
    assert {trial.state.name for trial in workers.study.trials} == {"FAIL"}
    assert workers.run_of(1).data.tags["why"] == "num_channels must be divisible by num_groups"


def test_a_trial_is_not_pruned_when_it_is_trained(workers: Workers) -> None:
    accuracies = iter([0.9, 0.8, 0.7, 0.6])

    def train(told: Any) -> float:
        told.log_metrics({"val/accuracy": (accuracy := next(accuracies))}, 3)
        return accuracy

    assert workers.work(train, epochs=3) == 4
    assert {trial.state.name for trial in workers.study.trials} == {"COMPLETE"}


def test_the_studys_storage_has_no_login(workers: Workers) -> None:
    address = f"https://user:secret@host/w.pth?sig=secret#sha256={'ab' * 32}"
    workers.work(lambda _: 0.5, model=f"resnet18={address}")
    assert "secret" not in (Path(workers.folder) / "studies" / f"{workers.study.study_name}.log").read_text()


def test_the_trials_build_a_copy_of_the_users_file(workers: Workers, tmp_path: Path) -> None:
    file = tmp_path / "mynets.py"
    file.write_text("class Tiny: ...")

    def train(_: object) -> float:
        file.write_text("class Tiny: depth = 2")
        return 0.5

    workers.work(train, model=f"{file}:Tiny")
    (built,) = set(workers.architectures)
    path, name = built.rsplit(":", 1)
    assert (Path(path).read_text(), name) == ("class Tiny: ...", "Tiny")
    with pytest.raises(UserError, match="made with other model"):
        workers.work(train, model=f"{file}:Tiny")


def test_what_was_found_is_known_with_its_model(workers: Workers) -> None:
    form = {"model": "resnet18", "recipe": "quick"}
    workers.work(lambda _: 0.5, **form)
    found = workers.conclude(**form)
    assert found_by(found.study) == ("resnet18=random", found.settings)
    assert found.default == found.best
