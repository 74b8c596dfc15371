"""The workflow's stages one after the other, as the DAG calls them, on a real object store and a real MLflow store."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlflow
import pytest

from mlpipe.config import RunParams
from mlpipe.data.storage.store import ObjectStore
from mlpipe.recipes import resolve
from mlpipe.stages.download import download
from mlpipe.stages.messages import PublishedData, TrainedVersion
from mlpipe.stages.preprocess import preprocess
from mlpipe.stages.train import train
from mlpipe.tracking.runs import TaskContext
from tests.stage_stores import stage_stores

RUN_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Pipeline:
    """One bucket and the stages that publish to it."""

    store: ObjectStore

    def prepare(self, form: Mapping[str, Any]) -> PublishedData:
        """From a filled-in form to a published data set, as `preprocess` returns it."""
        config, origin = self._asked(form)
        source = download(config, origin, on_run=lambda _: None)
        return preprocess(config, origin, source, on_run=lambda _: None)

    def train(self, form: Mapping[str, Any], data: PublishedData) -> TrainedVersion:
        """Train the form's only model."""
        config, origin = self._asked(form)
        return train(config, origin, config.models[0].name, data, on_run=lambda _: None)

    def published(self) -> dict[str, Any]:
        """What others could use: data sets and weights in the bucket, models and training runs in MLflow."""
        client = mlflow.MlflowClient()
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        return {
            "objects": [key for prefix in ("datasets", "weights", "checkpoints") for key in self.store.list(prefix)],
            "versions": [(version.name, version.version) for version in client.search_model_versions()],
            "trainings": [run.info.run_id for run in client.search_runs(experiments, "tags.stage = 'train'")],
        }

    @staticmethod
    def _asked(form: Mapping[str, Any]) -> tuple[Any, TaskContext]:
        number = next(RUN_NUMBERS)
        own_name = {"name": f"case-{number}"} if form.get("dataset") == "images" else {}
        config = resolve(RunParams.from_mapping({**own_name, **form}))
        return config, TaskContext(dag_id="image_classification", dag_run_id=f"bad__{number}", task_id="any")


@pytest.fixture(scope="session")
def pipeline(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:  # noqa: ARG001
    """One for all rows: each leaves it as it was, which is what they test."""
    with stage_stores(tmp_path_factory.mktemp("bad-input"), "bad-input") as store:
        yield Pipeline(store)


@pytest.fixture(scope="session")
def digits(pipeline: Pipeline) -> dict[str, Any]:
    """Published digits, as `preprocess` returns them."""
    return pipeline.prepare({"image_size": 8})
