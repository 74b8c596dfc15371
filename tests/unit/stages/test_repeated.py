"""Stages that run once more: a task was cleared, or its first attempt was killed late."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from mlpipe.config import RunConfig, RunParams
from mlpipe.errors import UserError
from mlpipe.recipes import resolve
from mlpipe.stages.download import download
from mlpipe.stages.evaluate import evaluate
from mlpipe.stages.messages import PublishedData, TrainedVersion
from mlpipe.stages.preprocess import preprocess
from mlpipe.stages.train import train
from mlpipe.tracking.runs import TaskContext
from tests.stage_stores import stage_stores

FROZEN = """
import torch
from torch import nn


class Frozen(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3)
        self.classifier = nn.Linear(8, num_classes)

    def forward(self, images):
        with torch.no_grad():
            features = self.features(images).relu().amax(dim=(2, 3))
        return self.classifier(features)
"""


def told(_: str) -> None:
    """Nobody asks for the address of the run."""


def config_of(models: str, **form: object) -> RunConfig:
    return resolve(RunParams(recipe="report", models=models, image_size=8, epochs=1, batch_size=1024, **form))  # type: ignore[arg-type]


def origin(dag_run_id: str) -> TaskContext:
    return TaskContext(dag_id="image_classification", dag_run_id=dag_run_id, task_id="any")


@pytest.fixture(scope="module")
def data(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PublishedData]:  # noqa: ARG001
    """Digits of 8×8 pixels; an object store and an MLflow store of their own."""
    with stage_stores(tmp_path_factory.mktemp("repeated"), "repeated"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlpipe.stages.train.verify_packaged_model", lambda *_: None)  # in a process; not looked at here
        config = config_of("logistic_regression")
        yield preprocess(config, origin("data"), download(config, origin("data"), on_run=told), on_run=told)


def other_data() -> PublishedData:
    config = config_of("logistic_regression")
    config = replace(config, data=replace(config.data, image_size=9))
    return preprocess(config, origin("other"), download(config, origin("other"), on_run=told), on_run=told)


def test_a_cleared_preprocessing_logs_what_it_finds_now(data: PublishedData) -> None:  # noqa: ARG001 - the stores
    config = config_of("logistic_regression")
    digests = []
    for size in (8, 9):
        config = replace(config, data=replace(config.data, image_size=size))
        source = download(config, origin("images"), on_run=told)
        digests.append(preprocess(config, origin("images"), source, on_run=told).digest)
    experiments = [experiment.experiment_id for experiment in mlflow.search_experiments()]
    wanted = "tags.dag_run_id = 'images' and tags.stage = 'data'"
    [run] = mlflow.MlflowClient().search_runs(experiments, wanted)
    assert run.data.params["data_digest"] == run.data.tags["data_digest"] == digests[-1] != digests[0]


@pytest.mark.slow
def test_a_cleared_training_takes_its_version_only_for_the_same_data_and_settings(data: PublishedData) -> None:
    def trained(settings: str | None = None, data: PublishedData = data) -> TrainedVersion:
        config = config_of("logistic_regression", settings=settings)
        return train(config, origin("cleared"), "logistic_regression", data, on_run=told)

    first = trained()
    assert trained().model.version == first.model.version
    others = [trained('{"inverse_regularization": 0.5}'), trained(data=other_data())]
    assert len({first.model.version, *(other.model.version for other in others)}) == 3
    assert runs_below_the_parent() == [others[-1].model.run_id]
    assert trained() == first
    assert runs_below_the_parent() == [first.model.run_id]


def runs_below_the_parent() -> list[str]:
    """Of the DAG run whose training is cleared."""
    experiments = [experiment.experiment_id for experiment in mlflow.search_experiments()]
    wanted = "tags.dag_run_id = 'cleared' and tags.model = 'logistic_regression' and tags.stage = 'train'"
    runs = mlflow.MlflowClient().search_runs(experiments, wanted)
    return [run.info.run_id for run in runs if "mlflow.parentRunId" in run.data.tags]


@pytest.mark.slow
def test_an_evaluation_is_repeated_and_a_network_that_cannot_be_explained_does_not_stop_it(
    data: PublishedData, tmp_path: Path
) -> None:
    (tmp_path / "mynets.py").write_text(FROZEN)
    config = config_of(f"{tmp_path}/mynets.py:Frozen", promotion_metric="balanced_accuracy")
    trained = train(config, origin("explained"), "frozen", data, on_run=told)
    first, again = (evaluate(config, origin("explained"), [trained], on_run=told) for _ in range(2))
    assert again == first
    page = mlflow.artifacts.load_text(f"runs:/{first.parent_run_id}/report.html")
    assert f'"network": "{tmp_path}/mynets.py:Frozen"' in page  # from where the next run goes on


@pytest.mark.slow
def test_test_images_that_the_first_network_was_trained_on_are_told(data: PublishedData) -> None:
    first = train(config_of("custom_cnn"), origin("known"), "custom_cnn", data, on_run=told).model
    config = config_of(f"custom_cnn={first.model_uri}")
    config = replace(config, data=replace(config.data, name="more", test_fraction=0.5))
    more = preprocess(config, origin("more"), download(config, origin("more"), on_run=told), on_run=told)
    trained = train(config, origin("more"), "custom_cnn", more, on_run=told)
    compared = evaluate(config, origin("more"), [trained], on_run=told)
    page = mlflow.artifacts.load_text(f"runs:/{compared.parent_run_id}/comparison.md")
    assert "What it started or learned from was trained on" in page


@pytest.mark.slow
def test_a_cross_validation_does_not_start_from_weights_that_know_its_images(data: PublishedData) -> None:
    first = train(config_of("custom_cnn"), origin("folds"), "custom_cnn", data, on_run=told).model
    for form in ({"models": f"custom_cnn={first.model_uri}"}, {"models": "custom_cnn", "teacher": first.model_uri}):
        config = config_of(folds=2, **form)
        with pytest.raises(UserError, match=rf"^folds: {first.model_uri} was trained on images of this data set"):
            train(config, origin("folds"), "custom_cnn", data, on_run=told)
    with pytest.raises(UserError, match=r"^folds: 200 is not allowed"):
        train(replace(config, folds=200), origin("folds"), "custom_cnn", data, on_run=told)
