"""The page "Report" of a DAG run: its result, or how far it is, inside Airflow and behind Airflow's login.

The report itself is `report.html` of the DAG run's MLflow run, which `evaluate` writes. The API server fetches it, so a
browser needs no second login and MLflow may stay hidden. Until it is there, the page shows what each model has reached
and reloads itself.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import jinja2
import requests
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.core_api.security import GetUserDep, requires_access_dag
from airflow.plugins_manager import AirflowPlugin
from fastapi import Depends, FastAPI, Path
from fastapi.responses import HTMLResponse
from mlflow_links import mlflow_ui_url

PREFIX = "/mlpipe-report"
TIMEOUT = 20
"""Seconds for one question to MLflow."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; frame-ancestors 'self'",
    "Cache-Control": "no-store",
}

PROGRESS = jinja2.Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
{% if open %}<meta http-equiv="refresh" content="3">{% endif %}
<title>{{ title }}</title>
<style>:root { color-scheme: light dark; } table { border-collapse: collapse; } progress { width: 160px; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 900px; padding: 16px; }
th, td { padding: 5px 12px; text-align: right; } th:first-child, td:first-child, .error { text-align: left; }</style>
<h1>{{ title }}</h1><p>{{ text }}</p>
{% if models %}<table>
<tr><th>Model</th><th>State</th><th>Epoch</th><th></th><th>Validation accuracy, %</th><th>Images/s</th></tr>
{% for model in models %}<tr><td>{{ model.name }}</td><td>{{ model.state }}</td>
<td>{{ model.epoch }}{{ " of " ~ model.epochs if model.epochs }}</td>
<td>{% if model.epochs %}<progress max="{{ model.epochs }}" value="{{ model.epoch }}"></progress>{% endif %}</td>
<td>{{ "%.2f" | format(100 * model.accuracy) if model.accuracy is not none else "" }}</td>
<td>{{ "%.0f" | format(model.rate) if model.rate is not none else "" }}</td></tr>
{% if model.error %}<tr><td></td><td class="error" colspan="5">{{ model.error }}</td></tr>{% endif %}
{% endfor %}</table>{% endif %}
</html>""")

TO_MLFLOW = jinja2.Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>MLflow</title>
<style>:root { color-scheme: light dark; } body { font: 15px/1.5 system-ui, sans-serif; padding: 16px; }</style>
{% if url %}<p><a id="mlflow" href="{{ url }}">Open MLflow</a> in a tab of its own.</p>
<script>
  const link = document.getElementById("mlflow"), open = () => window.parent.open(link.href);
  link.addEventListener("click", (event) => { event.preventDefault(); open(); });
  open();
</script>{% else %}<p>No address of MLflow is set (MLPIPE_MLFLOW_UI_URL).</p>{% endif %}</html>""")

app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


@app.get("/{dag_id}/{run_id}", dependencies=[Depends(requires_access_dag("GET", DagAccessEntity.RUN))])
def report(
    dag_id: Annotated[str, Path(max_length=250, pattern=r"^[A-Za-z0-9_.-]+$")],
    run_id: Annotated[str, Path(max_length=250, pattern=r"^[^'\"\\%]+$")],
) -> HTMLResponse:
    """The report of a DAG run, or its progress."""
    try:
        runs = _mlflow_runs(dag_id, run_id)
        parent = next((run for run in runs if run["tags"].get("stage") == "parent"), None)
        if parent and (page := _artifact(parent["run_id"], "report.html")):
            return HTMLResponse(page, headers=HEADERS)
    except requests.RequestException as error:
        text = f"MLflow does not answer ({type(error).__name__}); this page asks again."
        return HTMLResponse(PROGRESS.render(title=run_id, text=text, models=[], open=True), headers=HEADERS)
    is_open = parent is None or parent["status"] == "RUNNING"
    if parent is None:
        text = "No MLflow run yet. Only DAG runs that compare models have a report."
    else:
        text = parent["tags"].get("error") or ("The models are not compared yet." if is_open else "It has no report.")
    models = [_progress(run) for run in runs if run["tags"].get("stage") == "train"]
    return HTMLResponse(PROGRESS.render(title=run_id, text=text, models=models, open=is_open), headers=HEADERS)


@app.get("/mlflow")
def mlflow(user: GetUserDep) -> HTMLResponse:  # noqa: ARG001 - a login is needed
    """Where the entry "MLflow" of Airflow's navigation leads: it opens MLflow in a tab of its own.

    Airflow 3.3 frames what its navigation leads to, and MLflow refuses that; an entry without a frame does nothing.
    """
    address = mlflow_ui_url()
    page = TO_MLFLOW.render(url=f"{address.rstrip('/')}/#/experiments?workflowType=machine_learning" if address else "")
    return HTMLResponse(page, headers=HEADERS)


def _progress(run: dict[str, Any]) -> dict[str, Any]:
    accuracy, rate = run["metrics"].get("val/accuracy"), run["metrics"].get("images_per_second")
    epochs = run["params"].get("num_epochs", "")
    return {
        "name": run["tags"].get("model", ""),
        "state": run["status"].lower(),
        "epoch": accuracy[1] if accuracy else 0,
        "epochs": int(epochs) if epochs.isdigit() else None,
        "accuracy": accuracy[0] if accuracy else None,
        "rate": rate[0] if rate else None,
        "error": run["tags"].get("error", ""),
    }


def _mlflow_runs(dag_id: str, run_id: str) -> list[dict[str, Any]]:
    """All MLflow runs of a DAG run: `run_id`, `status`, `tags`, `params`, and `metrics` as value and step."""
    found = _ask("experiments/search", {"max_results": 1000, "view_type": "ACTIVE_ONLY"}).get("experiments", [])
    wanted = f"tags.dag_run_id = '{run_id}' and tags.dag_id = '{dag_id}'"
    ids = [experiment["experiment_id"] for experiment in found]
    runs = _ask("runs/search", {"experiment_ids": ids, "filter": wanted, "max_results": 100}).get("runs", [])
    return [
        {
            "run_id": run["info"]["run_id"],
            "status": run["info"]["status"],
            "tags": {tag["key"]: tag["value"] for tag in run["data"].get("tags", [])},
            "params": {param["key"]: param["value"] for param in run["data"].get("params", [])},
            "metrics": {m["key"]: (m["value"], int(m["step"])) for m in run["data"].get("metrics", [])},
        }
        for run in runs
    ]


def _ask(what: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = requests.post(f"{_address()}/api/2.0/mlflow/{what}", json=body, auth=_login(), timeout=TIMEOUT)
    answer.raise_for_status()
    return dict(answer.json())


def _artifact(run_id: str, path: str) -> str | None:
    where = {"run_uuid": run_id, "path": path}
    answer = requests.get(f"{_address()}/get-artifact", params=where, auth=_login(), timeout=TIMEOUT)
    return answer.content.decode() if answer.ok else None


def _address() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000").rstrip("/")


def _login() -> tuple[str, str] | None:
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    return (user, password) if user and password else None


class ReportPagePlugin(AirflowPlugin):
    """Registers the page and the tab on DAG runs."""

    name = "report_page"
    fastapi_apps = [{"app": app, "url_prefix": PREFIX, "name": "mlpipe report"}]  # noqa: RUF012 - of AirflowPlugin
    external_views = [  # noqa: RUF012 - of AirflowPlugin
        {
            "name": "Report",
            "href": f"{PREFIX}/{{DAG_ID}}/{{RUN_ID}}",
            "destination": "dag_run",
            "url_route": "report",
        },
        {"name": "MLflow", "href": f"{PREFIX}/mlflow", "destination": "nav", "url_route": "mlflow"},
    ]
