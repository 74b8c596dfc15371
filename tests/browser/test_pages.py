"""What a person sees: the trigger form, the graph, a task's way to MLflow, the comparison."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

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


def test_each_link_opens_mlflows_view_for_model_training(fresh_page: Callable[..., Page], demo: dict[str, Any]) -> None:
    board = demo["compare_url"].split("?")[0] + "?workflowType=machine_learning&viewStateShareKey=mlpipe-leaderboard"
    links = [demo["mlflow_url"], demo["compare_url"], demo["champion"]["url"], demo["models"][0]["run_url"], board]
    for link in links:
        page = fresh_page(log_in=True)
        page.goto(link)
        expect(page.get_by_text("Judges")).to_have_count(0)  # of the view for GenAI
        expect(page.get_by_text("Model registry").first).to_be_visible()


def test_the_comparison_shows_the_models_by_accuracy(fresh_page: Callable[..., Page], demo: dict[str, Any]) -> None:
    page = fresh_page(log_in=True)
    page.goto(demo["compare_url"])
    for model in demo["models"]:
        expect(page.get_by_text(model["name"]).first).to_be_visible()
    expect(page.get_by_text("3 matching runs")).to_be_visible()
    expect(page.get_by_text("test/accuracy").first).to_be_visible()


def test_the_leaderboard_has_the_models_alone_by_accuracy(
    fresh_page: Callable[..., Page], demo: dict[str, Any]
) -> None:
    page = fresh_page(log_in=True)
    page.goto(demo["compare_url"].split("?")[0] + "?workflowType=machine_learning&viewStateShareKey=mlpipe-leaderboard")
    expect(page.get_by_text("Sort: test/accuracy")).to_be_visible()
    for model in demo["models"]:
        expect(page.get_by_role("link", name=re.compile(f"^{model['name']}")).first).to_be_visible()
    expect(page.get_by_text(re.compile("^data · "))).to_have_count(0)


def report_of(page: Page, environment: dict[str, str], run_id: str) -> FrameLocator:
    page.goto(f"{environment['MLPIPE_AIRFLOW_URL']}{DAG}/runs/{run_id}")
    page.get_by_role("link", name="Report").first.click()
    return page.frame_locator("iframe").first


def test_the_form_refuses_what_is_not_allowed(fresh_page: Callable[..., Page], environment: dict[str, str]) -> None:
    page = fresh_page(log_in=True)
    page.goto(environment["MLPIPE_AIRFLOW_URL"] + DAG)
    page.get_by_role("button", name="Trigger").first.click()
    form = page.get_by_role("dialog")
    form.locator("input[name=element_name]").fill("No Name!")
    form.get_by_role("button", name="Trigger").click()
    expect(page.get_by_text("Failed to Trigger").first).to_be_visible()
    expect(form).to_be_visible()


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
    column = [each.split(",")[0] for each in report.locator("#models thead th").all_inner_texts()].index("Accuracy")
    accuracies = report.locator(f"#models tbody td:nth-child({column + 1})")

    def shown() -> list[float]:
        return [float(each.split()[0]) for each in accuracies.all_inner_texts()]

    best_first = sorted(shown(), reverse=True)
    report.get_by_text("Accuracy, %").click()
    first_click = shown()
    report.get_by_text("Accuracy, %").click()
    assert sorted((first_click, shown())) == [best_first[::-1], best_first]
    for picture in report.locator("img").all():
        picture.scroll_into_view_if_needed()  # pictures are loaded when they come into view
        picture.evaluate("image => image.decode()")
    with page.context.expect_page() as opened:
        report.get_by_role("link", name="Charts in MLflow").click()
    assert opened.value.url == demo["compare_url"]


def test_the_report_needs_airflows_login(environment: dict[str, str], demo: dict[str, Any]) -> None:
    pages = f"{environment['MLPIPE_AIRFLOW_URL']}/mlpipe-report"
    run = f"{pages}/image_classification/{demo['dag_run_id']}"
    for address in (
        run,
        f"{run}/others",
        f"{run}/progress",
        f"{run}/report.html",
        f"{run}/train/model/0",
        f"{run}/against/x",
    ):
        assert requests.get(address, timeout=30).status_code == 401
    for address in ("image_classification", "card.js", "mlflow"):
        assert requests.get(f"{pages}/{address}", timeout=30).status_code == 401


def test_a_cell_of_the_confusion_matrix_shows_its_images(
    fresh_page: Callable[..., Page], environment: dict[str, str], demo: dict[str, Any]
) -> None:
    report = report_of(fresh_page(log_in=True), environment, demo["dag_run_id"])
    report.get_by_role("button", name="logistic_regression").click()
    cell = report.locator(".confusion button").first
    count = int(cell.inner_text())
    cell.click()
    pictures = report.locator("#cell img")
    expect(pictures).to_have_count(min(count, 8))
    pictures.first.evaluate("image => image.decode()")
    expect(report.locator(".card").first).to_contain_text("given")


def test_settings_of_a_report_start_another_dag_run_and_both_are_compared(
    fresh_page: Callable[..., Page], environment: dict[str, str], demo: dict[str, Any]
) -> None:
    api = AirflowApi.from_env(environment)
    report = report_of(fresh_page(log_in=True), environment, demo["dag_run_id"])
    settings = report.get_by_role("textbox", name="Settings of the new run")
    conf = json.loads(settings.input_value())
    report.get_by_role("button", name="Start from the best network").click()
    assert "=models:/digits-classifier/" in json.loads(settings.input_value())["models"]
    settings.fill("{")
    report.get_by_role("button", name="Start the DAG run").click()
    expect(report.get_by_role("status")).to_contain_text("not JSON")
    settings.fill(json.dumps(conf | {"models": "logistic_regression", "seed": 5, "promotion": "disabled"}))
    report.get_by_role("button", name="Start the DAG run").click()
    started = report.get_by_role("status").locator("a")
    expect(started).to_contain_text("Started: ")
    run_id = started.inner_text().removeprefix("Started: ")
    wait_for_end(api, run_id)
    page = fresh_page(log_in=True)
    page.goto(
        f"{environment['MLPIPE_AIRFLOW_URL']}/mlpipe-report/image_classification/{demo['dag_run_id']}/against/{run_id}"
    )
    expect(page.get_by_text("Both used the same images and splits.")).to_be_visible()
    expect(page.get_by_role("row", name=re.compile("seed"))).to_contain_text("5")
    expect(page.get_by_role("row", name=re.compile("^logistic_regression"))).to_contain_text("%")


def wait_for_end(api: AirflowApi, run_id: str) -> None:
    for _ in range(240):
        if api.dag_run_state("image_classification", run_id) in ("success", "failed"):
            return
        time.sleep(0.5)
    raise AssertionError(f"{run_id} does not end")


def test_a_dag_run_that_trains_shows_its_curves_and_stops_on_a_click(
    fresh_page: Callable[..., Page], environment: dict[str, str]
) -> None:
    api = AirflowApi.from_env(environment)
    form = {"models": "custom_cnn,resnet18=file:///no/such.safetensors", "epochs": 300, "promotion": "disabled"}
    run_id = api.trigger("image_classification", form)
    page = fresh_page(log_in=True)
    report = report_of(page, environment, run_id)
    failed = report.locator(".model", has=report.get_by_role("heading", name="resnet18"))
    expect(failed.locator(".error")).to_contain_text("such.safetensors", timeout=60_000)
    expect(report.get_by_text(re.compile("epoch [1-9][0-9]* of 300, .* images/s, about .* left"))).to_be_visible(
        timeout=60_000
    )
    line = report.locator(".line").first
    before = len((line.get_attribute("points") or "").split())
    expect(line).not_to_have_attribute("points", line.get_attribute("points") or "")  # it grows without a reload
    assert len((line.get_attribute("points") or "").split()) > before
    report.get_by_role("button", name="Stop the DAG run").click()
    expect(report.get_by_text("killed")).to_be_visible(timeout=60_000)


def test_a_training_task_has_its_own_page(
    fresh_page: Callable[..., Page], environment: dict[str, str], demo: dict[str, Any]
) -> None:
    page = fresh_page(log_in=True)
    page.goto(f"{environment['MLPIPE_AIRFLOW_URL']}{DAG}/runs/{demo['dag_run_id']}/tasks/train/mapped/0")
    page.get_by_role("link", name="Training").click()
    frame = page.frame_locator("iframe").first
    expect(frame.get_by_role("heading", name="custom_cnn")).to_be_visible()
    expect(frame.locator(".chart")).to_have_count(2)


def test_the_dashboard_lists_the_latest_comparisons(
    fresh_page: Callable[..., Page],
    environment: dict[str, str],
    demo: dict[str, Any],  # noqa: ARG001
) -> None:
    page = fresh_page(log_in=True)
    page.goto(environment["MLPIPE_AIRFLOW_URL"])
    card = page.get_by_role("region", name="Latest comparisons")
    expect(card.get_by_role("link").first).to_be_visible()


def test_the_note_of_a_dag_run_is_its_verdict(airflow_get: Callable[[str], Any], demo: dict[str, Any]) -> None:
    assert airflow_get(f"{DAG}/dagRuns/{demo['dag_run_id']}")["note"].startswith(demo["summary"][:100])


def test_a_link_to_mlflow_leads_through_airflows_login_and_back(
    fresh_page: Callable[..., Page], environment: dict[str, str], demo: dict[str, Any]
) -> None:
    page = fresh_page()
    page.goto(demo["models"][0]["run_url"])
    page.fill("input[name=username]", environment["MLPIPE_AIRFLOW_USER"])
    page.fill("input[name=password]", environment["MLPIPE_AIRFLOW_PASSWORD"])
    page.keyboard.press("Enter")
    page.wait_for_url(demo["models"][0]["run_url"])
    expect(page.get_by_text(demo["models"][0]["name"]).first).to_be_visible()


def test_an_old_ticket_leads_to_mlflow_all_the_same(
    fresh_page: Callable[..., Page], environment: dict[str, str]
) -> None:
    page = fresh_page(log_in=True)
    for _ in range(2):  # with no session of MLflow's, and with one
        page.goto(f"{environment['MLFLOW_TRACKING_URI']}/mlpipe-login?ticket=old&to=/%23/experiments")
        expect(page.get_by_role("heading", name="Experiments")).to_be_visible()


def test_mlflow_sends_nobody_elsewhere(fresh_page: Callable[..., Page], environment: dict[str, str]) -> None:
    page = fresh_page(log_in=True)
    for elsewhere in ("//elsewhere.example/", "https://elsewhere.example/", "/\\elsewhere.example/"):
        page.goto(f"{environment['MLPIPE_AIRFLOW_URL']}/mlpipe-report/mlflow-login?to={quote(elsewhere, safe='')}")
        assert page.url.startswith(environment["MLFLOW_TRACKING_URI"])


def test_the_navigation_leads_to_mlflow(fresh_page: Callable[..., Page], environment: dict[str, str]) -> None:
    page = fresh_page(log_in=True)
    with page.context.expect_page() as opened:
        page.get_by_text("MLflow", exact=True).first.click()
    assert opened.value.url.startswith(environment["MLFLOW_TRACKING_URI"])
