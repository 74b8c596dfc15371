"""What a person sees: the trigger form, the graph, a task's way to MLflow, the comparison."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from mlpipe.config import RunParams

pytestmark = [pytest.mark.browser, pytest.mark.integration]

DAG = "/dags/image_classification"


def test_the_form_shows_every_field_and_starts_a_run(
    logged_in: Page, environment: dict[str, str], airflow_get: Callable[[str], Any]
) -> None:
    page = logged_in
    before = airflow_get(f"{DAG}/dagRuns")["total_entries"]
    page.goto(environment["MLPIPE_AIRFLOW_URL"] + DAG)
    page.get_by_role("button", name="Trigger").first.click()
    form = page.get_by_role("dialog")
    expect(form).to_contain_text("Promotion")
    shown = form.inner_text()
    for schema in RunParams.json_schema().values():
        assert schema["title"] in shown
        assert schema["description"] in shown
    form.locator("input[name=element_models]").fill("logistic_regression")
    form.get_by_role("button", name="Trigger").click()
    expect(form).to_be_hidden()
    runs = airflow_get(f"{DAG}/dagRuns?order_by=-run_after")
    assert runs["total_entries"] == before + 1
    assert runs["dag_runs"][0]["conf"]["models"] == "logistic_regression"
    assert runs["dag_runs"][0]["conf"]["dataset"] == "digits"


def test_the_graph_has_the_four_tasks(logged_in: Page, environment: dict[str, str], demo: dict[str, Any]) -> None:
    page = logged_in
    page.goto(f"{environment['MLPIPE_AIRFLOW_URL']}{DAG}/runs/{demo['dag_run_id']}")
    page.get_by_label("Show Graph").first.click()
    for task in ("download", "preprocess", "train", "evaluate"):
        expect(page.locator(".react-flow__node").filter(has_text=task).first).to_be_visible()


def test_a_task_leads_to_its_mlflow_run(logged_in: Page, environment: dict[str, str], demo: dict[str, Any]) -> None:
    page = logged_in
    page.goto(f"{environment['MLPIPE_AIRFLOW_URL']}{DAG}/runs/{demo['dag_run_id']}/tasks/train/mapped/0/details")
    button = page.get_by_role("link", name="MLflow run")
    expect(button).to_be_visible()
    target = button.get_attribute("href") or ""
    assert target in {model["run_url"] for model in demo["models"]}
    page.goto(target)
    expect(page.get_by_text(re.compile("custom_cnn")).first).to_be_visible()


def test_the_compare_page_sets_the_three_runs_side_by_side(logged_in: Page, demo: dict[str, Any]) -> None:
    page = logged_in
    page.goto(demo["compare_url"])
    for model in demo["models"]:
        expect(page.get_by_text(model["name"]).first).to_be_visible()
    expect(page.get_by_text("test/accuracy").first).to_be_visible()
