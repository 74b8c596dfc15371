"""Calls to Airflow, whose API server may be away for a moment."""

from __future__ import annotations

from mlpipe.airflow_api import AirflowApi
from tests.web import web_server


def test_a_question_is_asked_again() -> None:
    login, busy, told = (201, {}, b'{"access_token": "t"}'), (503, {}, b""), (200, {}, b'{"state": "running"}')
    with web_server(login, busy, told) as (address, _):
        assert AirflowApi(address, "u", "p").dag_run_state("image_classification", "r") == "running"
