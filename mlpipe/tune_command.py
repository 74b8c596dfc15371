"""`mlpipe tune`: trigger a search, show its trials as they end, and print what it found."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Column, Table

from mlpipe import run_command
from mlpipe.airflow_api import AirflowApi
from mlpipe.search.form import TuneParams, resolve_search

DAG_ID = "tune"


@partial(run_command.form_options, TuneParams)
@click.command()
@click.option("--json", "json_path", type=run_command.NewFile(), help="Write the result to this file.")
@click.option("--unpause", is_flag=True, help="Unpause the DAG if it is paused.")
def tune(json_path: Path | None, unpause: bool, **values: Any) -> None:
    """Search for the settings with the best validation accuracy, train the model with them, test and register it."""
    values["data_uri"], values["model"] = run_command.with_local_files(values["data_uri"], values["model"])
    params = TuneParams.from_mapping(values)
    resolve_search(params, "")
    console = run_command.new_console()
    api = run_command.ready_api(DAG_ID, unpause)
    params = TuneParams.from_mapping(values | {"data_uri": run_command.uploaded(values["data_uri"], console)})
    run_id = api.trigger(DAG_ID, params.to_mapping(), run_command.readable_id("tune", params.model.partition("=")[0]))
    console.print(f"Airflow run  {api.url}/dags/{DAG_ID}/runs/{run_id}", soft_wrap=True, highlight=False)
    follow(api, run_id, console, json_path)


def follow(api: AirflowApi, run_id: str, console: Console, json_path: Path | None = None) -> None:
    """Show a search until it ends, and print what it found; exit with 1 where it failed."""
    began = time.monotonic()
    state, tasks = run_command.follow_tasks(api, run_id, console, DAG_ID)
    found = api.xcom(DAG_ID, run_id, "conclude", key="search")
    run_command.print_failures(api, DAG_ID, run_id, tasks, console)
    compared = api.xcom(DAG_ID, run_id, "evaluate") or {"dataset": None, "models": [], "summary": None}
    result = {
        "dag_run_id": run_id,
        "form": run_command.form_of(api, DAG_ID, run_id),
        **_result(found, compared, state, time.monotonic() - began),
    }
    if found:
        _print(result, compared, console, api, run_id)
    if json_path is not None:
        run_command.write_json(json_path, result)
    if state != "success":
        raise SystemExit(1)


def _result(found: dict[str, Any] | None, compared: dict[str, Any], state: str, seconds: float) -> dict[str, Any]:
    """
    Args:
        found: by the search; `None`: it ended before.
    """
    final = compared["models"][0] if compared["models"] else {}
    default = found and found["default"]
    return {
        "study": found and found["study"],
        "state": state,
        "wall_seconds": round(seconds, 3),
        "trials": found["trials"] if found else [],
        "default": {name: default[name] for name in ("value", "params")} if default else None,
        "best": found
        and {
            "number": found["best"]["number"],
            "value": found["best"]["value"],
            "params": found["settings"],
            "model_uri": final.get("model_uri"),
            "metrics": final.get("metrics", {}),
        },
        "dataset": compared["dataset"],
        "models": compared["models"],
        "summary": compared["summary"],
    }


def _print(result: dict[str, Any], compared: dict[str, Any], console: Console, api: AirflowApi, run_id: str) -> None:
    table = Table(
        "trial", "state", "epochs", "val/accuracy", Column("settings", overflow="fold"), title=result["study"]
    )
    for trial in sorted(result["trials"], key=lambda each: -(each["value"] or 0)):
        value = "" if trial["value"] is None else f"{trial['value']:.4f}"
        settings = ", ".join(f"{name} {_short(value)}" for name, value in trial["params"].items())
        table.add_row(str(trial["number"]), trial["state"], str(trial["epochs"]), value, settings)
    console.print(table)
    for model in compared["models"]:
        text = f"{model['name']}: test accuracy {model['metrics']['test/accuracy']:.4f}"
        console.print(text, markup=False, highlight=False)
    if result["summary"]:
        console.print(result["summary"], markup=False, highlight=False)
    settings = json.dumps(result["best"]["params"])
    for line in (
        f"Best settings  {settings}",
        f"Use them       {command_to_use(result['form'], result['study'])}",
        f"Report         {api.url}/dags/{DAG_ID}/runs/{run_id}/plugin/report",
    ):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def command_to_use(form: Mapping[str, Any], study: str) -> str:
    """What trains the model of the search with the settings that it found."""
    shared = [name for name in TuneParams.fields_of_run() if name in form and name != "seed"]  # which is the search's
    options = {name: form[name] for name in shared} | {"models": form["model"], "tuned": study}
    words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
    return shlex.join(["mlpipe", "run", *(part for pair in words for part in pair)])


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
