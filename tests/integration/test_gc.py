"""`mlpipe gc` after a data set's runs and models were deleted in MLflow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest

from mlpipe.stack.health import s3_client
from mlpipe.stack.local import ARTIFACT_BUCKET, StackSettings

pytestmark = pytest.mark.integration


def test_gc_leaves_no_object(stack: StackSettings, environment: dict[str, str], tmp_path: Path) -> None:
    everything = os.environ | environment
    command = [sys.executable, "-m", "mlpipe.cli", "run", "--name", "passing", "--models", "logistic_regression"]
    done = subprocess.run(command, env=everything, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    client = mlflow.MlflowClient(environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("image-classification-passing")
    assert experiment

    def objects() -> list[str]:
        pages: Any = s3_client(stack.client_environment()).get_paginator("list_objects_v2")
        listed = pages.paginate(Bucket=ARTIFACT_BUCKET, Prefix=f"{experiment.experiment_id}/")
        return [entry["Key"] for page in listed for entry in page.get("Contents", [])]

    (version,) = client.search_model_versions("name = 'passing-classifier'")
    assert version.source in {model.model_uri for model in client.search_logged_models([experiment.experiment_id])}
    assert len(objects()) > 10
    client.delete_registered_model("passing-classifier")
    client.delete_experiment(experiment.experiment_id)
    done = subprocess.run(
        [sys.executable, "-m", "mlpipe.cli", "gc"],
        env=everything,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert objects() == [], done.stdout
    assert client.get_experiment_by_name("image-classification-passing") is None
