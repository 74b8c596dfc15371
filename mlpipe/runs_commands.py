"""`mlpipe models`, `recipes`, `runs`, `watch`, `stop`, `report`, `open` and `gc`: what can be run, and what has run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Column, Table

from mlpipe import run_command, tune_command
from mlpipe.addresses import without_login
from mlpipe.airflow_api import AirflowApi, RefusedError
from mlpipe.config import NetworkSettings, RunParams, given
from mlpipe.errors import UserError
from mlpipe.models.architectures import KNOWN, TORCHVISION
from mlpipe.recipes import RECIPES, dataset_name, resolve
from mlpipe.stack.local import StackSettings

DAG_ID = run_command.DAG_ID


@click.command()
def models() -> None:
    """List the models that a run can train."""
    table = Table("model", "kind", "initial weights")
    for entry in KNOWN:
        if entry.name not in TORCHVISION or entry.name == "resnet18":
            weights = ["random"] * (entry.kind == "network") + ["imagenet"] * entry.has_imagenet_weights
            table.add_row(entry.name, entry.kind, ", ".join(weights) or "none")
    console = run_command.new_console()
    console.print(table)
    others = ", ".join(name for name in TORCHVISION if name != "resnet18")
    console.print(
        f"With the same initial weights as resnet18, torchvision's other networks: {others}.", highlight=False
    )
    console.print(
        "Networks of timm: timm/<name>. Your own: /path/mynets.py:TinyNet. With weights: resnet18=s3://bucket/weights.pth.",
        highlight=False,
    )


@click.command()
def recipes() -> None:
    """List the recipes: named settings of a run."""
    table = Table("recipe", "model", "weights", "epochs", "batch", "optimizer", "learning rate")
    for name in RECIPES:
        for model in resolve(RunParams(recipe=name)).models:
            train = model.train
            settings = [""] * 4
            if isinstance(train, NetworkSettings):
                settings = [str(train.num_epochs), str(train.batch_size), train.optimizer, f"{train.learning_rate:g}"]
            table.add_row(name, model.name, model.weights, *settings)
        table.add_section()
    run_command.new_console().print(table)


def _api() -> AirflowApi:
    run_command.use_local_stack("MLPIPE_AIRFLOW_URL")
    return AirflowApi.from_env()


def _dag_of(api: AirflowApi, run_id: str) -> str:
    """The DAG that has a run of this id.

    Raises:
        UserError: none has.
    """
    if not run_id.strip():
        raise UserError("RUN_ID: empty; give the id of a run, as `mlpipe runs` shows it")
    with contextlib.suppress(RefusedError):
        api.dag_run_state(tune_command.DAG_ID, run_id)
        return tune_command.DAG_ID
    api.dag_run_state(DAG_ID, run_id)
    return DAG_ID


def _newest(api: AirflowApi, number: int) -> list[dict[str, Any]]:
    """DAG runs of both DAGs, the newest first."""
    found = [run for dag_id in (DAG_ID, tune_command.DAG_ID) for run in api.dag_runs(dag_id, number)]
    return sorted(found, key=lambda run: str(run["run_after"]), reverse=True)[:number]


@click.command()
@click.option("-n", "--number", default=10, show_default=True, help="How many, the newest first.")
def runs(number: int) -> None:
    """List DAG runs."""
    table = Table(Column("run", overflow="fold"), "state", "data set", Column("models", overflow="fold"))
    for found in _newest(_api(), number):
        form = given(found["conf"] or {})
        data = form.get("name") or form.get("dataset")
        with contextlib.suppress(UserError):
            data = form.get("name") or dataset_name(form.get("dataset", "digits"), form.get("data_uri"))
        chosen = form.get("model") or form.get("models") or form.get("recipe")
        table.add_row(escape(found["dag_run_id"]), found["state"], escape(data or ""), escape(chosen or ""))
    run_command.new_console().print(table)


@click.command()
@click.argument("run_id")
def watch(run_id: str) -> None:
    """Show a DAG run until it ends, as `mlpipe run` does. Ctrl-C ends the display; the DAG run continues."""
    api = _api()
    command = tune_command if _dag_of(api, run_id) == tune_command.DAG_ID else run_command
    command.follow(api, run_id, run_command.new_console())


@click.command()
@click.argument("run_id")
def stop(run_id: str) -> None:
    """Stop a DAG run; its MLflow runs end as KILLED. Models that are already trained stay registered."""
    api = _api()
    api.stop(_dag_of(api, run_id), run_id)
    run_command.new_console().print(f"stopped {run_id}", markup=False, highlight=False)


@click.command()
@click.argument("run_id")
@click.option("-o", "--output", required=True, type=run_command.NewFile(), help="File to write.")
def report(run_id: str, output: Path) -> None:
    """Write the report of a DAG run as one HTML file."""
    api = _api()
    page = api.report(_dag_of(api, run_id), run_id)
    output.write_text(page, encoding="utf-8")
    run_command.new_console().print(f"wrote {output}", markup=False, highlight=False)


@click.command("open")
@click.argument("page", type=click.Choice(["airflow", "mlflow", "report"]), default="report")
def open_page(page: str) -> None:
    """Open Airflow, MLflow or the newest report in a browser; the address is also printed."""
    if page == "mlflow":
        run_command.use_local_stack("MLFLOW_TRACKING_URI")
        address = without_login(os.environ.get("MLFLOW_TRACKING_URI", ""))
        if not address:
            raise UserError("MLFLOW_TRACKING_URI: not set, and no local stack is up; run `mlpipe up`, or set it")
        url = f"{address.rstrip('/')}/#/experiments?workflowType=machine_learning"
    elif page == "report":
        api = _api()
        newest = _newest(api, 1)
        if not newest:
            raise UserError("there is no DAG run yet; start one by `mlpipe run`")
        url = run_command.report_url(api, newest[0]["dag_run_id"], newest[0]["dag_id"])
    else:
        url = _api().url
    run_command.new_console().print(url, soft_wrap=True, highlight=False)
    click.launch(url)


@click.command()
def gc() -> None:
    """Permanently remove what was deleted in MLflow: runs, experiments, models without a registered version, files.

    Checkpoints of deleted runs are removed, too, if MLPIPE_S3_BUCKET names their bucket. If MLflow is not the local
    stack's, this only marks the models; then run `mlflow gc` on its server.
    """
    settings = StackSettings.load()
    run_command.use_local_stack("MLFLOW_TRACKING_URI")
    if os.environ["MLFLOW_TRACKING_URI"] == settings.mlflow_url:  # whoever set it, as `mlpipe env` does
        run_command.use_local_stack("MLPIPE_S3_BUCKET")
    from mlpipe.data.storage.store import ObjectStore
    from mlpipe.tracking.deleted import delete_checkpoints_of_deleted_runs, delete_models_of_deleted_runs

    click.echo(f"models of deleted runs: {delete_models_of_deleted_runs()}")
    if bucket := os.environ.get("MLPIPE_S3_BUCKET"):
        click.echo(f"checkpoints of deleted runs: {delete_checkpoints_of_deleted_runs(ObjectStore(bucket))}")
    else:  # a machine that reaches MLflow alone
        click.echo("checkpoints of deleted runs: not removed, because MLPIPE_S3_BUCKET is not set")
    if os.environ["MLFLOW_TRACKING_URI"] != settings.mlflow_url:
        click.echo("the next `mlflow gc` on the server removes deleted runs and models")
        return
    command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", f"sqlite:///{settings.mlflow_database}"]
    with tempfile.TemporaryDirectory() as folder:  # MLflow makes a database where it runs
        done = subprocess.run(command, cwd=folder, check=False)
    if done.returncode:
        raise UserError("`mlflow gc` failed; what it has not removed goes with the next one")
