"""What a person sees: the trigger form, the graph, a task's way to MLflow, the comparison."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import requests
from playwright.sync_api import FrameLocator, Page, expect

from mlpipe.airflow_api import AirflowApi
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
    form.locator("input[name=element_models]").fill("logistic_regression")
    schemas = list(RunParams.json_schema().values())
    for section in dict.fromkeys(schema.get("section") for schema in schemas):
        if section:
            form.get_by_text(section).click()  # which folds the others
        for schema in schemas:
            if schema.get("section") == section:
                expect(form).to_contain_text(schema["title"])
                expect(form.get_by_text(schema["description"])).to_be_visible()
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


def test_each_link_opens_mlflows_view_for_model_training(fresh_page: Callable[[], Page], demo: dict[str, Any]) -> None:
    links = [demo["mlflow_url"], demo["compare_url"], demo["champion"]["url"], demo["models"][0]["run_url"]]
    for link in links:
        page = fresh_page()
        page.goto(link)
        expect(page.get_by_text("Judges")).to_have_count(0)  # of the view for GenAI
        expect(page.get_by_text("Model registry").first).to_be_visible()


def test_the_comparison_shows_the_models_by_accuracy(fresh_page: Callable[[], Page], demo: dict[str, Any]) -> None:
    page = fresh_page()
    page.goto(demo["compare_url"])
    for model in demo["models"]:
        expect(page.get_by_text(model["name"]).first).to_be_visible()
    expect(page.get_by_text("3 matching runs")).to_be_visible()
    expect(page.get_by_text("test/accuracy").first).to_be_visible()


def report_of(page: Page, environment: dict[str, str], run_id: str) -> FrameLocator:
    page.goto(f"{environment['MLPIPE_AIRFLOW_URL']}{DAG}/runs/{run_id}")
    page.get_by_role("link", name="Report").first.click()
    return page.frame_locator("iframe").first


@pytest.mark.parametrize(("scheme", "width"), [("light", 1400), ("dark", 1400), ("light", 390)])
def test_the_report_is_a_tab_of_the_dag_run(
    scheme: str, width: int, fresh_page: Callable[..., Page], environment: dict[str, str], demo: dict[str, Any]
) -> None:
    page = fresh_page(log_in=True, color_scheme=scheme, viewport={"width": width, "height": 900})
    report = report_of(page, environment, demo["dag_run_id"])
    verdict = report.locator(".verdict")
    expect(verdict).to_contain_text(demo["summary"][:60])
    dark = report.locator("body").evaluate("body => getComputedStyle(body).color") == "rgb(255, 255, 255)"
    assert dark is (scheme == "dark")
    assert report.locator("html").evaluate("page => page.scrollWidth <= page.clientWidth")
    names = report.locator("#models tbody td:first-child")
    before = names.all_inner_texts()
    report.get_by_text("Accuracy, %").click()
    report.get_by_text("Accuracy, %").click()
    assert names.all_inner_texts() == before[::-1]
    for picture in report.locator("img").all():
        assert picture.evaluate("image => image.complete && image.naturalWidth > 0")
    with page.context.expect_page() as opened:
        report.get_by_role("link", name="Charts in MLflow").click()
    assert opened.value.url == demo["compare_url"]


def test_the_report_needs_airflows_login(environment: dict[str, str], demo: dict[str, Any]) -> None:
    address = f"{environment['MLPIPE_AIRFLOW_URL']}/mlpipe-report/image_classification/{demo['dag_run_id']}"
    assert requests.get(address, timeout=30).status_code == 401


def test_a_dag_run_that_trains_shows_its_progress_and_then_why_it_failed(
    fresh_page: Callable[..., Page], environment: dict[str, str]
) -> None:
    api = AirflowApi.from_env(environment)
    run_id = api.trigger("image_classification", {"models": "custom_cnn", "epochs": 300, "promotion": "disabled"})
    page = fresh_page(log_in=True)
    report = report_of(page, environment, run_id)
    expect(report.get_by_text(re.compile("[1-9][0-9]* of 300"))).to_be_visible(timeout=60_000)
    api.stop("image_classification", run_id)
    expect(report.get_by_text("killed")).to_be_visible(timeout=60_000)


def test_the_navigation_leads_to_mlflow(fresh_page: Callable[..., Page], environment: dict[str, str]) -> None:
    page = fresh_page(log_in=True)
    with page.context.expect_page() as opened:
        page.get_by_text("MLflow", exact=True).first.click()
    assert opened.value.url.startswith(environment["MLFLOW_TRACKING_URI"])
