"""The DAG run by Airflow itself, without the GPU executor, against a real object store and MLflow."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlflow
import pytest

from .conftest import ROOT, RunPython

pytestmark = pytest.mark.slow

RUN = """
import importlib.util, json, logging
spec = importlib.util.spec_from_file_location("image_classification", {file!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
run = module.image_classification().test(run_conf={conf!r})
rows = [[ti.task_id, ti.map_index, str(ti.state), ti.try_number] for ti in run.get_task_instances()]
print("RESULT", json.dumps([str(run.state), rows]))
"""


@pytest.fixture
def services(s3_endpoint: str, tmp_path: Path) -> dict[str, str]:
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    return {
        "AWS_ENDPOINT_URL_S3": s3_endpoint,
        **{name: os.environ[name] for name in names},
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLPIPE_CACHE_DIR": str(tmp_path / "cache"),
        "MLPIPE_S3_BUCKET": "dag-test",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
    }


def run_dag(
    run_python: RunPython, services: dict[str, str], conf: dict[str, Any], folder: Path
) -> tuple[str, Any, str]:
    script = f"import os; os.chdir({str(folder)!r})\n" + RUN.format(
        file=str(ROOT / "dags" / "image_classification.py"), conf=conf
    )
    printed = run_python(script, timeout=280, **services)
    line = next(line for line in printed.splitlines() if line.startswith("RESULT "))
    state, rows = json.loads(line.removeprefix("RESULT "))
    return state, rows, printed


def test_it_runs_on_the_default_executor(run_python: RunPython, services: dict[str, str], tmp_path: Path) -> None:
    conf = {"models": "logistic_regression,custom_cnn", "epochs": 1}
    state, rows, _ = run_dag(run_python, services, conf, tmp_path)
    assert state == "success"
    assert sorted(row[:3] for row in rows) == [
        ["download", -1, "success"],
        ["evaluate", -1, "success"],
        ["preprocess", -1, "success"],
        ["train", 0, "success"],
        ["train", 1, "success"],
    ]
    client = mlflow.MlflowClient(services["MLFLOW_TRACKING_URI"])
    assert set(client.get_registered_model("digits-classifier").aliases) == {
        "champion",
        "custom_cnn",
        "logistic_regression",
    }
    experiment = client.get_experiment_by_name("image-classification-digits")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 4
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_mistake_fails_at_once_in_one_line(run_python: RunPython, services: dict[str, str], tmp_path: Path) -> None:
    state, rows, printed = run_dag(run_python, services, {"models": "resnet99"}, tmp_path)
    assert state == "failed"
    assert [row for row in rows if row[0] == "download"] == [["download", -1, "failed", 1]]
    assert "models: 'resnet99' is unknown" in printed
    client = mlflow.MlflowClient(services["MLFLOW_TRACKING_URI"])
    assert client.get_experiment_by_name("image-classification-digits") is None
