"""Calls to Airflow, whose API server may be away for a moment."""

from __future__ import annotations

import pytest

from mlpipe.airflow_api import AirflowApi, NoAnswerError
from mlpipe.errors import UserError
from tests.web import web_server


def test_a_question_is_asked_again() -> None:
    login, busy, told = (201, {}, b'{"access_token": "t"}'), (503, {}, b""), (200, {}, b'{"state": "running"}')
    with web_server(login, busy, told) as (address, _):
        assert AirflowApi(address, "u", "p").dag_run_state("image_classification", "r") == "running"


def test_a_dag_run_that_has_ended_is_not_stopped() -> None:
    answers = (201, {}, b'{"access_token": "t"}'), (200, {}, b'{"state": "success"}')
    ended = pytest.raises(UserError, match=r"^RUN_ID: the DAG run r has ended \(success\)")
    with web_server(*answers) as (address, asked), ended:
        AirflowApi(address, "u", "p").stop("image_classification", "r")
    assert [request.partition(" ")[0] for request in asked] == ["POST", "GET"]


def test_a_server_that_fails_may_have_done_it_all_the_same() -> None:
    login, failed = (201, {}, b'{"access_token": "t"}'), (500, {}, b'{"detail": "the database is locked"}')
    with web_server(login, failed) as (address, _), pytest.raises(NoAnswerError, match="fails: 500 the database is"):
        AirflowApi(address, "u", "p", retries=0).dag_run_state("image_classification", "r")


def test_a_busy_server_does_not_blame_the_password() -> None:
    with web_server((503, {}, b"")) as (address, _), pytest.raises(UserError, match="answers 503") as told:
        AirflowApi(address, "u", "p", retries=0).dag_run_state("image_classification", "r")
    assert "PASSWORD" not in str(told.value)


@pytest.mark.parametrize(
    ("host", "by_the_proxy"), [("127.0.0.1", False), ("localhost", False), ("127.0.0.1.example", True)]
)
def test_the_proxy_is_not_told_the_password_of_this_machines_airflow(
    host: str, by_the_proxy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = (201, {}, b'{"access_token": "t"}'), (200, {}, b'{"state": "running"}')
    with web_server(*answers) as (airflow, direct), web_server(*answers) as (proxy, asked):
        for name, value in {"http_proxy": proxy, "no_proxy": ""}.items():
            monkeypatch.setenv(name, value)
            monkeypatch.setenv(name.upper(), value)
        api = AirflowApi(airflow.replace("127.0.0.1", host), "u", "p")
        assert api.dag_run_state("image_classification", "r") == "running"
        assert (len(direct), len(asked)) == ((0, 2) if by_the_proxy else (2, 0))
