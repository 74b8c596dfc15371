"""Pages about models inside Airflow and behind its login: the tab "Report" of a DAG run and of a training task.

The report itself is `report.html` of the DAG run's MLflow run, which `evaluate` writes. The API server asks MLflow, so
a browser needs no second login and MLflow may stay hidden. Until the report is there, the page shows what each model
has reached, and renews itself. What changes Airflow (stop, run again) the pages ask Airflow's own API for, with the
user's login and rights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any
from urllib.parse import quote

import requests
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.core_api.security import GetUserDep, get_user, requires_access_dag
from airflow.models.dagrun import DagRun
from airflow.plugins_manager import AirflowPlugin
from airflow.utils.session import create_session
from fastapi import Depends, FastAPI, HTTPException, Path, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from markupsafe import Markup
from mlflow_links import mlflow_ui_url
from sqlalchemy import select

from mlpipe import pages
from mlpipe.pages.svg import TRAINING, VALIDATION, line_chart
from mlpipe.stack.mlflow_login import ticket_address

PREFIX = "/mlpipe-report"
TIMEOUT = 20
"""Seconds for one question to MLflow."""
NUM_LISTED = 20
"""DAG runs that are offered for a comparison."""
NUM_ON_CARD = 5

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'self'",
    "Cache-Control": "no-store",
}

MODEL_STAGES = ("train", "reused")
CURVES = tuple(f"{part}/{metric}" for metric in ("loss", "accuracy") for part in ("train", "val"))
STATES = {"RUNNING": "training", "FINISHED": "trained", "FAILED": "failed", "KILLED": "killed"}

app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

READER = [Depends(requires_access_dag("GET", DagAccessEntity.RUN))]
DagId = Annotated[str, Path(max_length=250, pattern=r"^[A-Za-z0-9_.-]+$")]
RunId = Annotated[str, Path(max_length=250, pattern=r"^[^'\"\\%]+$")]


@app.get("/mlflow")
def mlflow(user: GetUserDep) -> HTMLResponse:  # noqa: ARG001 - a login is needed
    """Where the entry "MLflow" of Airflow's navigation leads: it opens MLflow in a tab of its own.

    Airflow 3.3 frames what its navigation leads to, and MLflow refuses that; an entry without a frame does nothing.
    """
    address = mlflow_ui_url()
    url = f"{address}/#/experiments?workflowType=machine_learning" if address else ""
    return HTMLResponse(pages.render("mlflow.html.jinja", url=url), headers=HEADERS)


@app.get("/mlflow-login")
async def mlflow_login(request: Request, to: str = "/") -> RedirectResponse:
    """Log the browser in to the local stack's MLflow, which knows no other login than Airflow's."""
    address, login = mlflow_ui_url(), _login()
    if address is None or login is None:
        raise HTTPException(404, "no MLflow with this login is set")
    try:
        await get_user(request, bearer_credentials=None)
    except HTTPException:
        return RedirectResponse(f"/api/v2/auth/login?next={quote(str(request.url), safe='')}")
    return RedirectResponse(ticket_address(address, login[1], to), headers={"Cache-Control": "no-store"})


@app.get("/card.js")
def card(user: GetUserDep) -> Response:  # noqa: ARG001 - a login is needed
    """The card of Airflow's dashboard."""
    return Response(pages.read("card.js"), media_type="text/javascript")


@app.get("/{dag_id}", dependencies=READER)
def latest(dag_id: DagId) -> JSONResponse:
    """The last DAG runs that compare models, the newest first."""
    parents = _search(f"tags.dag_id = '{dag_id}' and tags.stage = 'parent'", NUM_ON_CARD)
    return JSONResponse([_listed(run) for run in parents])


def _also_without_mlflow(page: Callable[..., HTMLResponse]) -> Callable[..., HTMLResponse]:
    """The page says so while MLflow is away, and renews itself."""

    @wraps(page)
    def answer(**given: Any) -> HTMLResponse:
        try:
            return page(**given)
        except requests.RequestException as error:
            told = f"answers {error.response.status_code}" if error.response is not None else "does not answer"
            text = f"MLflow {told} ({type(error).__name__}); this page asks again."
            values = {"text": text, "is_error": True, "models": [], "open": True}
            dag_id = "" if "task_id" in given else given["dag_id"]
            return _progress_page(values, given["part"], title=given["run_id"], dag_id=dag_id, run_id=given["run_id"])

    return answer


@app.get("/{dag_id}/{run_id}", dependencies=READER)
@_also_without_mlflow
def report(dag_id: DagId, run_id: RunId, part: bool = False) -> HTMLResponse:
    """The report of a DAG run, or its progress.

    Args:
        part: only what changes in the page of the progress.
    """
    state = _state_of_dag_run(dag_id, run_id)
    runs = _of_dag_run(dag_id, run_id)
    parent = _parent(runs)
    # A parent run that goes on again may have the report of what was cleared.
    if parent and parent["status"] == "FINISHED" and (page := _artifact(parent["run_id"], "report.html")):
        return HTMLResponse("" if part else page, headers=HEADERS | {"X-Report": "ready"})
    return _progress_page(_progress(state, runs), part, title=run_id, dag_id=dag_id, run_id=run_id)


@app.get("/{dag_id}/{run_id}/progress", dependencies=READER)
def progress(dag_id: DagId, run_id: RunId) -> JSONResponse:
    """What each model has reached, for the command line."""
    state = _state_of_dag_run(dag_id, run_id)
    models = _progress(state, _of_dag_run(dag_id, run_id), ("val/accuracy",))["models"]
    return JSONResponse([{name: value for name, value in model.items() if name != "curves"} for model in models])


@app.get("/{dag_id}/{run_id}/report.html", dependencies=READER)
def report_file(dag_id: DagId, run_id: RunId) -> Response:
    """The report as a file."""
    parent = _parent(_of_dag_run(dag_id, run_id))
    page = _artifact(parent["run_id"], "report.html") if parent else None
    if page is None:
        raise HTTPException(404, f"the DAG run {run_id} has no report")
    return Response(page, media_type="text/html", headers=HEADERS)


@app.get("/{dag_id}/{run_id}/others", dependencies=READER)
def others(dag_id: DagId, run_id: RunId) -> JSONResponse:
    """Other DAG runs of the same data set, to compare with."""
    parent = _parent(_of_dag_run(dag_id, run_id))
    if parent is None:
        return JSONResponse([])
    dataset = parent["tags"].get("dataset", "").replace("'", "")
    wanted = f"tags.dag_id = '{dag_id}' and tags.stage = 'parent' and tags.dataset = '{dataset}'"
    found = _search(f"{wanted} and attributes.status = 'FINISHED'", NUM_LISTED)
    return JSONResponse([_listed(run) for run in found if run["run_id"] != parent["run_id"]])


@app.get("/{dag_id}/{run_id}/against/{other_id}", dependencies=READER)
def against(dag_id: DagId, run_id: RunId, other_id: RunId) -> HTMLResponse:
    """Two DAG runs side by side: what differed in settings, and what in results."""
    sides = [_of_dag_run(dag_id, each) for each in (run_id, other_id)]
    parents = [_parent(runs) for runs in sides]
    if None in parents:
        raise HTTPException(404, "one of the DAG runs compared no models")
    first, second = (parent["params"] for parent in parents if parent)
    names = sorted(name for name in first | second if first.get(name) != second.get(name))
    digests = {run["tags"].get("data_digest") for runs in sides for run in runs if run["tags"].get("stage") == "data"}
    one, other = (_listed(parent) for parent in parents if parent)
    results = _results(*sides)
    page = pages.render(
        "against.html.jinja",
        back=f"{PREFIX}/{dag_id}/{quote(run_id)}",
        one=one,
        other=other,
        verdict="Both used the same images and splits."
        if len(digests) == 1
        else "They used different images or splits, so their accuracies need not be comparable.",
        results=results,
        settings=[(name, first.get(name, "–"), second.get(name, "–")) for name in names],
    )
    return HTMLResponse(page, headers=HEADERS)


@app.get("/{dag_id}/{run_id}/{task_id}/model/{map_index}", dependencies=READER)
@_also_without_mlflow
def model(dag_id: DagId, run_id: RunId, task_id: str, map_index: int, part: bool = False) -> HTMLResponse:
    """The progress of one training task."""
    state = _state_of_dag_run(dag_id, run_id)
    values = _progress(state, _of_dag_run(dag_id, run_id))
    values["models"] = values["models"][map_index : map_index + 1]  # none of -1, the index of what is not mapped yet
    if task_id != "train":
        values |= {"text": "Only training tasks have a progress.", "models": [], "open": False}
    elif values["models"]:
        is_trained = values["models"][0]["state"].startswith("trained")
        values |= {"text": "", "open": values["open"] and not is_trained}
    return _progress_page(values, part, title=f"{run_id}: training", dag_id="", run_id=run_id)


def _progress_page(values: dict[str, Any], part: bool, **more: str) -> HTMLResponse:
    template = "progress_part.html.jinja" if part else "progress.html.jinja"
    values = values | {"models": [{**model, "charts": _charts(model["curves"])} for model in values["models"]]}
    headers = HEADERS | ({} if values["open"] else {"X-Report": "ended"})
    return HTMLResponse(pages.render(template, **values, **more), headers=headers)


def _state_of_dag_run(dag_id: str, run_id: str) -> str | None:
    """Airflow's state of a DAG run; `None`: it was deleted.

    Asked before MLflow, for what ends meanwhile has its report the next time. The session is given back at once: MLflow
    may take long to answer.
    """
    with create_session(scoped=False) as session:
        return session.scalar(select(DagRun.state).where(DagRun.dag_id == dag_id, DagRun.run_id == run_id))


def _progress(state: str | None, runs: list[dict[str, Any]], wanted_curves: tuple[str, ...] = CURVES) -> dict[str, Any]:
    """What the page of the progress shows.

    The DAG run's state says whether the work goes on, since MLflow's runs end with each attempt. Of one that was
    stopped they end a moment later.

    Args:
        state: Airflow's, of the DAG run.
    """
    parent = _parent(runs)
    is_closing = state is not None and any(run["status"] == "RUNNING" for run in runs)
    is_open = state in ("queued", "running") or is_closing
    tags = parent["tags"] if parent else {}
    errors = [text for tag, text in sorted(tags.items()) if tag.startswith("error")]
    if parent is None:
        text = "No MLflow run yet. Only DAG runs that compare models have a report."
    else:
        text = " ".join(errors) or ("The models are not compared yet." if is_open else "It has no report.")
    trained = {run["tags"].get("model", ""): run for run in runs if run["tags"].get("stage") in MODEL_STAGES}
    names = tags.get("models", "").split(", ")
    has_data = any(run["tags"].get("stage") == "data" and run["status"] == "FINISHED" for run in runs)
    waiting_for = "a free slot of the executor gpu" if has_data else "the data set"
    models = [
        _model(trained[name], wanted_curves)
        if name in trained
        else _not_started(name, waiting_for if is_open else "nothing more", tags.get(f"error/train/{number}", ""))
        for number, name in enumerate(dict.fromkeys([*filter(None, names), *trained]))
    ]
    return {"text": text, "is_error": bool(errors), "models": models, "open": is_open}


def _not_started(name: str, waits_for: str, error: str) -> dict[str, Any]:
    """Of a model without an MLflow run: it waits, or it failed before it had one."""
    nothing = dict.fromkeys(("epoch", "epochs", "rate", "remaining", "url"))
    state = "failed" if error else f"waits for {waits_for}"
    return {**nothing, "name": name, "state": state, "error": error, "curves": {}}


def _model(run: dict[str, Any], wanted_curves: tuple[str, ...]) -> dict[str, Any]:
    wanted = run["params"].get("num_epochs", "")
    epochs = int(wanted) if wanted.isdigit() else None
    known = [name for name in wanted_curves if epochs and name in run["metrics"]]
    curves = {name: _history(run["run_id"], name) for name in known}
    done = curves.get("val/accuracy", [])
    remaining = None
    if run["status"] == "RUNNING" and epochs and len(done) > 1:
        seconds = (done[-1]["timestamp"] - done[0]["timestamp"]) / 1000 / (len(done) - 1)
        remaining = _duration(seconds * (epochs - int(done[-1]["step"])))
    address = mlflow_ui_url()
    where = f"experiments/{run['experiment_id']}/runs/{run['run_id']}?workflowType=machine_learning"
    return {
        "name": run["tags"].get("model", ""),
        "state": _state(run),
        "epoch": int(done[-1]["step"]) if done else 0,
        "epochs": epochs,
        "rate": run["metrics"].get("images_per_second"),
        "remaining": remaining,
        "error": run["tags"].get("error", ""),
        "url": f"{address}/#/{where}" if address else "",
        "curves": curves,
    }


def _charts(curves: dict[str, list[dict[str, Any]]]) -> list[Markup]:
    return [
        Markup(line_chart({"": _lines(curves, metric)}, title=title, unit=unit))  # noqa: S704 - it escapes names
        for title, metric, unit in (("Loss", "loss", ""), ("Accuracy", "accuracy", "%"))
        if curves
    ]


def _state(run: dict[str, Any]) -> str:
    if run["tags"].get("stage") == "reused":
        return f"trained before: {run['tags'].get('model_version', '')}"
    return STATES.get(run["status"], run["status"].lower())


def _lines(curves: dict[str, list[dict[str, Any]]], metric: str) -> dict[str, list[tuple[float, float]]]:
    parts = {TRAINING: f"train/{metric}", VALIDATION: f"val/{metric}"}
    return {
        title: [(float(entry["step"]), float(entry["value"])) for entry in curves.get(name, ())]
        for title, name in parts.items()
    }


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _results(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Model, its accuracy in both DAG runs, and the difference in points."""
    sides = [
        {run["tags"].get("model", ""): run for run in runs if run["tags"].get("stage") in MODEL_STAGES}
        for runs in (first, second)
    ]
    rows = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        texts = [side[name]["tags"].get("test accuracy", "–") if name in side else "–" for side in sides]
        values = [side[name]["metrics"].get("test/accuracy", math.nan) if name in side else math.nan for side in sides]
        difference = values[1] - values[0]
        rows.append((name, *texts, "–" if math.isnan(difference) else f"{100 * difference:+.2f}"))
    return rows


def _parent(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((run for run in runs if run["tags"].get("stage") == "parent"), None)


def _listed(run: dict[str, Any]) -> dict[str, str]:
    tags = run["tags"]
    return {
        "dag_run_id": tags.get("dag_run_id", ""),
        "name": tags.get("mlflow.runName", ""),
        "dataset": tags.get("dataset", ""),
        "state": run["status"].lower(),
    }


def _of_dag_run(dag_id: str, run_id: str) -> list[dict[str, Any]]:
    """Its MLflow runs, without a search's trials."""
    return _search(f"tags.dag_run_id = '{run_id}' and tags.dag_id = '{dag_id}' and tags.stage != 'trial'", 100)


def _search(wanted: str, limit: int) -> list[dict[str, Any]]:
    """MLflow runs of all experiments, the newest first: ids, `status`, `tags`, `params`, and `metrics`."""
    wanted_experiments = {"max_results": 1000, "view_type": "ACTIVE_ONLY"}
    found = _api("POST", "experiments/search", json=wanted_experiments).get("experiments", [])
    ids = [experiment["experiment_id"] for experiment in found]
    body = {
        "experiment_ids": ids,
        "filter": wanted,
        "max_results": limit,
        "order_by": ["attributes.start_time DESC"],
    }
    return [
        {
            "run_id": run["info"]["run_id"],
            "experiment_id": run["info"]["experiment_id"],
            "status": run["info"]["status"],
            "tags": {tag["key"]: tag["value"] for tag in run["data"].get("tags", [])},
            "params": {param["key"]: param["value"] for param in run["data"].get("params", [])},
            "metrics": {metric["key"]: metric["value"] for metric in run["data"].get("metrics", [])},
        }
        for run in _api("POST", "runs/search", json=body).get("runs", [])
    ]


def _history(run_id: str, metric: str) -> list[dict[str, Any]]:
    """Entries `step`, `value`, `timestamp` (ms) of a metric, by step."""
    found = _api("GET", "metrics/get-history", params={"run_id": run_id, "metric_key": metric})
    return sorted(found.get("metrics", []), key=lambda entry: int(entry.get("step", 0)))


def _api(method: str, what: str, **body: Any) -> dict[str, Any]:
    answer = _mlflow(method, f"/api/2.0/mlflow/{what}", **body)
    answer.raise_for_status()
    return dict(answer.json())


def _artifact(run_id: str, path: str) -> str | None:
    """The text of a file at the top of a run's artifacts; `None`: the run has no such file."""
    answer = _mlflow("GET", "/get-artifact", params={"run_uuid": run_id, "path": path})
    if answer.ok:
        return answer.content.decode()
    files = _api("GET", "artifacts/list", params={"run_id": run_id}).get("files", [])
    if any(file["path"] == path for file in files):  # the object store is away
        answer.raise_for_status()
    return None


def _mlflow(method: str, path: str, **body: Any) -> requests.Response:
    address = os.environ.get("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000").rstrip("/")
    return requests.request(method, address + path, auth=_login(), timeout=TIMEOUT, **body)


def _login() -> tuple[str, str] | None:
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    return (user, password) if user and password else None


class ReportPagePlugin(AirflowPlugin):
    """Registers the pages, their tabs, and the card of the dashboard."""

    name = "report_page"
    fastapi_apps = [{"app": app, "url_prefix": PREFIX, "name": "mlpipe report"}]  # noqa: RUF012 - of AirflowPlugin
    external_views = [  # noqa: RUF012 - of AirflowPlugin
        {
            "name": "Report",
            "href": f"{PREFIX}/{{DAG_ID}}/{{RUN_ID}}",
            "destination": "dag_run",
            "url_route": "report",
        },
        {
            "name": "Training",
            "href": f"{PREFIX}/{{DAG_ID}}/{{RUN_ID}}/{{TASK_ID}}/model/{{MAP_INDEX}}",
            "destination": "task_instance",
            "url_route": "training",
        },
        {"name": "MLflow", "href": f"{PREFIX}/mlflow", "destination": "nav", "url_route": "mlflow"},
    ]
    react_apps = [  # noqa: RUF012 - of AirflowPlugin
        {
            "name": "mlpipe results",
            "bundle_url": f"{PREFIX}/card.js",
            "destination": "dashboard",
            "url_route": "mlpipe-results",
        }
    ]
