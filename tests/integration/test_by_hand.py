"""What people do by hand in Airflow: clear, mark, pause. No MLflow run of an ended DAG run stays open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests

from mlpipe.airflow_api import AirflowApi, NoAnswerError, log_in
from tests.web import Content, Request, serving

pytestmark = pytest.mark.integration

DAG_ID = "image_classification"
FORM = {"models": "custom_cnn", "epochs": 200, "promotion": "disabled"}
"""Some minutes of training: somebody marks it meanwhile."""


@pytest.fixture
def api(environment: dict[str, str]) -> AirflowApi:
    return AirflowApi.from_env(environment)


@pytest.fixture
def ask(environment: dict[str, str]) -> Callable[..., Any]:
    """Send a request to Airflow's API as its pages do."""
    session = requests.Session()
    url, user, password = (environment[name] for name in AirflowApi.VARIABLES)
    log_in(session, url, user, password)

    def ask(method: str, path: str, body: dict[str, Any]) -> Any:
        answer = session.request(method, f"{url}/api/v2{path}", json=body, timeout=30)
        assert answer.ok, answer.text
        return answer.json()

    return ask


def until(condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, f"{what} did not happen"
        time.sleep(0.5)


@pytest.fixture
def training(environment: dict[str, str], api: AirflowApi) -> str:
    """A DAG run whose model trains just now."""
    run_id = api.trigger(DAG_ID, FORM)
    until(lambda: statuses(environment, run_id).get("train custom_cnn") == "RUNNING", "the training")
    return run_id


def statuses(environment: dict[str, str], run_id: str) -> dict[str, str]:
    """Status of each MLflow run of a DAG run, by stage and model."""
    client = mlflow.MlflowClient(environment["MLFLOW_TRACKING_URI"])
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.dag_run_id = '{run_id}'")
    return {f"{run.data.tags['stage']} {run.data.tags.get('model', '')}".strip(): run.info.status for run in found}


@pytest.fixture
def losing_answers(environment: dict[str, str]) -> Iterator[str]:
    """The API server behind a proxy that loses the answers to triggers."""
    server_url = environment["MLPIPE_AIRFLOW_URL"]

    def forward(request: Request) -> Content | None:
        answer = requests.request(
            request.method, server_url + request.path, data=request.body, headers=request.headers, timeout=30
        )
        return None if request.path.endswith("/dagRuns") else (answer.status_code, {}, answer.content)

    with serving(forward) as address:
        yield address


def test_a_dag_run_whose_answer_is_lost_is_found(
    environment: dict[str, str], api: AirflowApi, losing_answers: str
) -> None:
    _, user, password = (environment[name] for name in AirflowApi.VARIABLES)
    lossy = AirflowApi(losing_answers, user, password)
    assert lossy.trigger(DAG_ID, FORM, "answer-lost") == "answer-lost"
    assert api.dag_run_state(DAG_ID, "answer-lost") in ("queued", "running")
    api.stop(DAG_ID, "answer-lost")
    with pytest.raises(NoAnswerError, match="does not answer"):
        lossy.trigger(DAG_ID, FORM | {"epochs": "many"}, "refused")


def test_calls_that_write_do_not_wait_for_each_other(ask: Callable[..., Any]) -> None:
    """Without the plugin one_writer, the API server soon stands still for a minute, and a call fails."""
    began = time.monotonic()

    def write(number: int) -> None:
        for turn in range(10):
            ask("POST", "/variables", {"key": f"key-{number}-{turn}", "value": "x"})
            ask("PATCH", f"/variables/key-{number}-{turn}", {"key": f"key-{number}-{turn}", "value": "y"})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert time.monotonic() - began < 50


def test_clearing_one_mapped_task_ends_with_ended_runs(
    demo: dict[str, Any], environment: dict[str, str], api: AirflowApi, ask: Callable[..., Any]
) -> None:
    run_id = demo["dag_run_id"]
    client = mlflow.MlflowClient(environment["MLFLOW_TRACKING_URI"])
    model = next(each for each in demo["models"] if each["name"] == "logistic_regression")
    trained = client.get_run(model["run_id"]).info.end_time
    index = next(
        task.map_index for task in api.task_instances(DAG_ID, run_id) if task.label == "train [logistic_regression]"
    )
    ask(
        "POST",
        f"/dags/{DAG_ID}/clearTaskInstances",
        {"dag_run_id": run_id, "task_ids": [["train", index]], "dry_run": False, "only_failed": False},
    )
    until(lambda: api.dag_run_state(DAG_ID, run_id) == "success", "the end of the cleared task")
    until(lambda: set(statuses(environment, run_id).values()) == {"FINISHED"}, "the end of the MLflow runs", 60)
    assert client.get_run(model["run_id"]).info.end_time == trained  # it was not trained again


@pytest.mark.parametrize("state", ["success", "failed"])
def test_marking_a_dag_run_that_trains_ends_its_runs(
    state: str, training: str, environment: dict[str, str], api: AirflowApi, ask: Callable[..., Any]
) -> None:
    ask("PATCH", f"/dags/{DAG_ID}/dagRuns/{training}", {"state": state})
    until(lambda: "RUNNING" not in statuses(environment, training).values(), "the end of the MLflow runs", 60)
    assert api.dag_run_state(DAG_ID, training) == state


@pytest.mark.parametrize("state", ["success", "failed"])
def test_marking_a_task_that_trains_ends_its_runs(
    state: str, training: str, environment: dict[str, str], api: AirflowApi, ask: Callable[..., Any]
) -> None:
    ask("PATCH", f"/dags/{DAG_ID}/dagRuns/{training}/taskInstances/train/0", {"new_state": state})
    until(lambda: api.dag_run_state(DAG_ID, training) in ("success", "failed"), "the end of the DAG run")
    until(lambda: "RUNNING" not in statuses(environment, training).values(), "the end of the MLflow runs", 60)


def test_a_paused_dag_is_said_at_once(
    environment: dict[str, str], api: AirflowApi, ask: Callable[..., Any], tmp_path: Path
) -> None:
    def mlpipe(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mlpipe.cli", *arguments]
        return subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, timeout=200, check=False
        )

    ask("PATCH", f"/dags/{DAG_ID}", {"is_paused": True})
    try:
        for command in ("run", "status"):
            told = mlpipe(command)
            assert told.returncode == 2, told.stdout
            assert "is paused" in told.stderr
            assert "mlpipe run --unpause" in told.stderr
        assert "is paused" in mlpipe("doctor").stdout
        file = tmp_path / "result.json"
        done = mlpipe("run", "--unpause", "--models", "logistic_regression", "--json", str(file))
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(file.read_text())["state"] == "success"
    finally:
        api.unpause(DAG_ID)
