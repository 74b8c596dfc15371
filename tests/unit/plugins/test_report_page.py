"""Whether the pages of a DAG run go on asking, on a private Airflow that knows its state."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import CREATE_DATABASE, RunAirflow, answer_of

PAGES = """
import io
import json
from datetime import UTC, datetime

import report_page
import requests
from airflow.models.dagrun import DagRun
from airflow.utils.session import create_session
from fastapi.testclient import TestClient

report_page.app.dependency_overrides[report_page.READER[0].dependency] = lambda: None
client = TestClient(report_page.app, raise_server_exceptions=False)

def set_state(state):
    with create_session() as session:
        run = session.query(DagRun).filter_by(dag_id="tune", run_id="r").one_or_none()
        if state is None:
            session.delete(run)
        elif run is None:
            now = datetime.now(UTC)
            session.add(DagRun(dag_id="tune", run_id="r", run_type="manual", state=state, run_after=now))
        else:
            run.state = state

def tracked(stage, status, **tags):
    tags = {"stage": stage, "dag_id": "tune", "dag_run_id": "r", **tags}
    return {
        "info": {"run_id": stage, "experiment_id": "1", "status": status},
        "data": {"tags": [{"key": key, "value": value} for key, value in tags.items()]},
    }

def know(*runs, report=False, away=False):
    # MLflow's answers from now on; `away`: the object store with the report does not answer.
    files = [{"path": "report.html"}] if away else []
    experiments = {"experiments": [{"experiment_id": "1"}]}
    answers = {"experiments": experiments, "runs": {"runs": list(runs)}, "artifacts": {"files": files}}

    def request(method, url, **_):
        answer = requests.Response()
        answer.status_code = 200 if report or "get-artifact" not in url else 500
        text = "the report" if "get-artifact" in url else json.dumps(answers[url.split("/")[-2]])
        answer.raw = io.BytesIO(text.encode())
        return answer

    requests.request = request

def look(page):
    whole, part = client.get(f"/tune/r{page}"), client.get(f"/tune/r{page}?part=1")
    return {
        "follows": "if (true) follow();" in whole.text,
        "goes on": part.headers.get("X-Report") != "ended",
        "stop": 'id="stop"' in whole.text,
        "text": part.text,
        "report": "the report" in whole.text,
    }
"""

SCENARIO = (
    PAGES
    + """
seen = {}
real = requests.request
two = {"models": "cnn, svm"}
set_state("running")
know()
seen["not begun"] = [look(""), look("/train/model/0")]
know(tracked("parent", "FINISHED", **two), tracked("data", "FINISHED"))  # as `conclude` leaves it
seen["waits"] = [look(""), look("/train/model/1")]
killed = tracked("parent", "KILLED", **two), tracked("train", "KILLED", model="cnn")
know(*killed)
seen["is tried again"] = [look(""), look("/train/model/0")]
know(tracked("parent", "RUNNING", **two), tracked("train", "FINISHED", model="cnn"))
seen["one is trained"] = [look(""), look("/train/model/0")]
know(tracked("parent", "RUNNING", **two), tracked("train", "RUNNING", model="cnn"), report=True)
seen["is cleared"] = [look(""), look("/train/model/0")]
know(tracked("parent", "FINISHED", **two), tracked("train", "FINISHED", model="cnn"), report=True)
seen["compared"] = [look("")]
set_state("success")
know(tracked("parent", "FINISHED", **two), tracked("train", "FINISHED", model="cnn"), away=True)
seen["the report is away"] = [look("")]
set_state("failed")
know(tracked("parent", "RUNNING", **two), tracked("train", "RUNNING", model="cnn"))
seen["is stopped"] = [look(""), look("/train/model/0")]
know(*killed)
seen["ended"] = [look(""), look("/train/model/0")]
set_state(None)
know(tracked("parent", "RUNNING", **two))
seen["deleted"] = [look(""), look("/train/model/0")]
requests.request = real
seen["mlflow is away"] = [look(""), look("/train/model/0")]
print("RESULT " + json.dumps(seen))
"""
)


@pytest.fixture(scope="module")
def seen(run_airflow: RunAirflow) -> dict[str, list[dict[str, Any]]]:
    """The tabs Report and Training by what has happened."""
    run_airflow("-c", CREATE_DATABASE)
    return answer_of(run_airflow("-c", SCENARIO, MLFLOW_TRACKING_URI="http://127.0.0.1:9"))


@pytest.mark.parametrize(
    "moment", ["not begun", "waits", "is tried again", "is cleared", "is stopped", "mlflow is away"]
)
def test_the_pages_of_a_dag_run_that_goes_on_ask_again(seen: dict[str, list[dict[str, Any]]], moment: str) -> None:
    for page in seen[moment]:
        assert (page["follows"], page["goes on"]) == (True, True)
        assert "It has no report" not in page["text"]
    assert [page["stop"] for page in seen[moment]] == [True, False]


@pytest.mark.parametrize("moment", ["ended", "deleted"])
def test_the_pages_of_a_dag_run_that_has_ended_ask_no_more(seen: dict[str, list[dict[str, Any]]], moment: str) -> None:
    for page in seen[moment]:
        assert (page["follows"], page["goes on"], page["stop"]) == (False, False, False)


def test_a_report_is_shown_until_its_models_are_trained_again(seen: dict[str, list[dict[str, Any]]]) -> None:
    assert [seen[moment][0]["report"] for moment in ("compared", "is cleared")] == [True, False]


def test_a_report_that_cannot_be_read_just_now_is_asked_for_again(seen: dict[str, list[dict[str, Any]]]) -> None:
    [page] = seen["the report is away"]
    assert page["goes on"]
    assert "It has no report" not in page["text"]


def test_the_page_of_a_training_that_has_ended_asks_no_more(seen: dict[str, list[dict[str, Any]]]) -> None:
    assert [page["goes on"] for page in seen["one is trained"]] == [True, False]


def test_the_pages_say_what_is_waited_for(seen: dict[str, list[dict[str, Any]]]) -> None:
    assert "waits for a free slot of the executor gpu" in seen["waits"][1]["text"]
    assert "svm" in seen["waits"][1]["text"]
    assert all("MLflow does not answer (ConnectionError)" in page["text"] for page in seen["mlflow is away"])
