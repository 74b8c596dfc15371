"""`mlpipe run` and `mlpipe predict`."""

from __future__ import annotations

import csv
import json
import os
import re
import secrets
import sys
import tempfile
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.parse import quote

import click
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Column, Table

from mlpipe.addresses import redact_address, redact_text, without_login
from mlpipe.airflow_api import AirflowApi, NoAnswerError, PausedError, TaskInstance
from mlpipe.config import Form, RunParams, given
from mlpipe.errors import UserError
from mlpipe.forms import FORMS
from mlpipe.models.architectures import OWN_FILE
from mlpipe.recipes import RECIPES, parse_models, parse_settings, resolve, write_model
from mlpipe.stack.local import StackSettings

DAG_ID = "image_classification"
SHARED_FILES = "MLPIPE_SHARED_FILES"
"""Set where the workers read this machine's files by the same paths, as those of the local stack do."""
FILES_PER_CALL = 1024
"""Image files that are decoded at once; a bound of memory."""
POLL_SECONDS = 0.5
LONGEST_POLL_SECONDS = 10.0
"""Polling a long training twice a second would take a tenth of a core from it."""
WIDTH_OF_A_FILE = 120
"""Columns if the output is not a terminal."""

WIDTH_FOR_ALL_COLUMNS = 110

DONE = {"success": "[green]✔[/]", "failed": "[red]✘[/]", "upstream_failed": "[yellow]–[/]", "skipped": "[dim]–[/]"}


def form_options(form: type[Form], command: click.Command) -> click.Command:
    """Give the command one option for each form field."""
    hints = get_type_hints(form)
    for name, schema in form.json_schema().items():
        kind: Any = click.Choice(schema["enum"]) if "enum" in schema else _scalar(hints[name])
        option = click.Option(
            [f"--{name.replace('_', '-')}" + (f"/--no-{name.replace('_', '-')}" if kind is bool else "")],
            type=kind,
            default=schema["default"],
            show_default=schema["default"] is not None,
            help=schema["description"],
        )
        command.params.append(option)
    return command


def _scalar(hint: Any) -> type:
    return next(member for member in (get_args(hint) or (hint,)) if member is not type(None))


class NewFile(click.Path):
    """An option's file to be written, in a folder that exists."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Its path."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            self.fail(f"the folder {str(path.parent)!r} does not exist; create it first", param, ctx)
        return path


@partial(form_options, RunParams)
@click.command()
@click.option("--json", "json_path", type=NewFile(), help="Write the result to this file.")
@click.option("--unpause", is_flag=True, help="Unpause the DAG if it is paused.")
@click.option(
    "--tuned",
    metavar="STUDY",
    help="Train the model of this search with the best settings found. `mlpipe tune` prints the complete command.",
)
def run(json_path: Path | None, unpause: bool, tuned: str | None, **values: Any) -> None:
    """Trigger the DAG, show its progress and print the comparison."""
    values["data_uri"], values["models"] = with_local_files(values["data_uri"], values["models"])
    if tuned:
        values |= settings_found_by(tuned, values)
    resolve(RunParams.from_mapping(values))
    console = new_console()
    api = ready_api(DAG_ID, unpause)
    values["data_uri"] = uploaded(values["data_uri"], console)
    params = RunParams.from_mapping(values)
    run_id = api.trigger(DAG_ID, params.to_mapping(), readable_id(resolve(params).data.name, params.recipe))
    console.print(f"Airflow run  {api.url}/dags/{DAG_ID}/runs/{run_id}", soft_wrap=True, highlight=False)
    follow(api, run_id, console, json_path)


def report_url(api: AirflowApi, run_id: str, dag_id: str = DAG_ID) -> str:
    """Address of a DAG run's page Report in Airflow."""
    return f"{api.url}/dags/{dag_id}/runs/{quote(run_id)}/plugin/report"


def ready_api(dag_id: str, unpause: bool) -> AirflowApi:
    """The server, on which the DAG runs when it is triggered.

    Raises:
        UserError: it does not.
    """
    use_local_stack("MLPIPE_AIRFLOW_URL")
    api = AirflowApi.from_env()
    try:
        AirflowApi.from_env(retries=1).check_dag(dag_id)  # whoever forgot `mlpipe up` is told at once
    except PausedError:
        if not unpause:
            raise
        api.unpause(dag_id)
    return api


def settings_found_by(study: str, values: dict[str, Any]) -> dict[str, str]:
    """The fields `models` and `settings` of a run with what a search found; settings that the user gives override it.

    Raises:
        UserError: there is no such search, or `models` has another model than its.
    """
    from mlpipe.tracking.studies import found_by

    use_local_stack("MLFLOW_TRACKING_URI")
    model, settings = found_by(study)
    models = values["models"] or model
    default = RECIPES[values["recipe"]].default_weights
    ((_, searched, weights),) = parse_models(model, default)
    for written, architecture, start in parse_models(models, default):
        if (architecture, redact_address(start)) != (searched, weights):
            raise UserError(
                f"models: {write_model(written, start)} is not the model of the search {study}, whose settings are for "
                f"{model}; leave models out, or give that one alone"
            )
    return {"models": models, "settings": json.dumps({**settings, **parse_settings(values["settings"])})}


def readable_id(*words: str) -> str:
    """Id of a DAG run that says what it is: `digits-quick-20261127-142503-a1f3`."""
    said = re.sub(r"[^a-z0-9_.-]+", "-", "-".join(words).lower())[:80]
    return f"{said}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def follow(api: AirflowApi, run_id: str, console: Console, json_path: Path | None = None) -> None:
    """Show a DAG run until it ends, and print its comparison; exit with 1 where it failed."""
    began = time.monotonic()
    state, tasks = follow_tasks(api, run_id, console)
    result = _result(api, run_id, state, tasks, time.monotonic() - began)
    print_failures(api, DAG_ID, run_id, tasks, console)
    if result["models"]:
        print_comparison(result, console)
    if json_path is not None:
        write_json(json_path, result)
    if state != "success":
        raise SystemExit(1)


def print_failures(api: AirflowApi, dag_id: str, run_id: str, tasks: list[TaskInstance], console: Console) -> None:
    """Say of each failed task why it failed."""
    for item in tasks:
        if item.state == "failed":
            reason = api.last_error(dag_id, run_id, item) or "see its log in Airflow"
            console.print(f"{item.label} failed: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)


def new_console() -> Console:
    """Where to print; wide enough for whole tables where the output is a file."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH_OF_A_FILE)
    return console


def use_local_stack(variable: str) -> None:
    """If the environment names no server, use this folder's stack, and none of its services from elsewhere."""
    if os.environ.get(variable):
        return
    for name, value in StackSettings.load().client_environment().items():
        # Who looks for MLflow alone may have named another Airflow.
        if name not in AirflowApi.VARIABLES or variable in AirflowApi.VARIABLES or not os.environ.get(name):
            os.environ[name] = value


def with_local_files(data_uri: str | None, models: str | None) -> tuple[str | None, str | None]:
    """Both with whole paths where they name files of this machine."""
    path = local_file(data_uri)
    return (str(path) if path else data_uri), _with_whole_paths(models)


def local_file(uri: str | None) -> Path | None:
    """The local file or folder at a path; `None` for an address or no value."""
    if uri is None or not uri.strip() or "://" in uri:
        return None
    path = Path(uri).expanduser().resolve()
    if not path.exists():
        raise UserError(f"data_uri: {str(path)!r} does not exist; give the path of a zip, a tar or a folder, or a URI")
    return path


def _with_whole_paths(models: str | None) -> str | None:
    """The list of models with absolute paths to the user's network files, which the workers read."""
    entries = []
    for entry in (models or "").split(","):
        name, *weights = entry.strip().split("=", 1)
        if match := OWN_FILE.fullmatch(name):
            path = Path(match["path"]).expanduser().resolve()
            if not path.is_file():
                raise UserError(f"models: no file at {str(path)!r}; give the path of a Python file and a class in it")
            name = f"{path}:{match['name']}"
        entries.append("=".join([name, *weights]))
    return ",".join(entries) or None


def uploaded(data_uri: str | None, console: Console) -> str | None:
    """The address at which the workers find what is at a path of this machine, which they may not read."""
    path = local_file(data_uri)
    return data_uri if path is None or os.environ.get(SHARED_FILES) else upload_file(path, console)


def upload_file(path: Path, console: Console) -> str:
    """Upload a file or folder for workers on other machines; returns its address there."""
    if path.is_dir():
        return _upload_folder(path, console)
    from mlpipe.data.storage.store import file_sha256
    from mlpipe.data.storage.uris import check_readable

    check_readable(path, field="data_uri")  # what workers may read does not bind who uploads
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError(
            f"data_uri: the workers cannot read {path}, and no MLflow server is set for the upload; "
            "set MLFLOW_TRACKING_URI, or give an s3:// or https:// address"
        )
    import requests
    from mlflow.exceptions import MlflowException

    from mlpipe.tracking.uploads import upload

    again = "the same command sends what is missing"
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task(f"Uploading {escape(path.name)}", total=path.stat().st_size)
        try:
            return upload(path, file_sha256(path), lambda done: progress.update(bar, completed=done))
        except (MlflowException, requests.RequestException) as error:
            reason = redact_text(str(error).splitlines()[0])[:300]
            raise UserError(
                f"data_uri: {path.name} could not be uploaded to MLflow ({reason}); see its log, then {again}"
            ) from error
        except KeyboardInterrupt:
            raise UserError(f"stopped during the upload of {path.name}; {again}") from None


def _upload_folder(folder: Path, console: Console) -> str:
    from mlpipe.data.archives.folders import pack_folder
    from mlpipe.data.storage.uris import MAX_BYTES

    with tempfile.TemporaryDirectory(prefix="mlpipe-") as temporary:
        packed = Path(temporary) / f"{folder.name}.zip"
        with console.status(f"Packing {folder}"):
            pack_folder(folder, packed, field="data_uri", max_bytes=MAX_BYTES)
        return upload_file(packed, console)


def follow_tasks(
    api: AirflowApi, run_id: str, console: Console, dag_id: str = DAG_ID
) -> tuple[str, list[TaskInstance]]:
    """Show the tasks of a DAG run until it ends; its state, and the tasks.

    Raises:
        UserError: the user or an outage of Airflow ended that; the message says how to go on.
    """
    ways = f"`mlpipe watch {run_id}` shows it again, `mlpipe stop {run_id}` ends it"
    try:
        return _follow_tasks(api, run_id, console, dag_id)
    except KeyboardInterrupt:
        raise UserError(f"stopped watching; the DAG run continues. {ways}") from None
    except NoAnswerError as error:
        raise UserError(f"{error}. The DAG run may continue: {ways}") from error


def _follow_tasks(api: AirflowApi, run_id: str, console: Console, dag_id: str) -> tuple[str, list[TaskInstance]]:
    began = time.monotonic()
    shown: dict[str, str | None] = {}
    with Live(console=console, refresh_per_second=8, transient=False) as live:
        while True:
            state = api.dag_run_state(dag_id, run_id)
            tasks = api.task_instances(dag_id, run_id)
            if console.is_terminal:
                training = any(task.task_id == "train" and task.state == "running" for task in tasks)
                models = api.progress(dag_id, run_id) if training else []
                live.update(_progress(tasks, models, time.monotonic() - began))
            else:
                _print_changes(tasks, shown, console)
            if state in ("success", "failed"):
                return state, tasks
            time.sleep(poll_seconds(time.monotonic() - began))


def poll_seconds(waited: float) -> float:
    """Seconds until the next poll: a hundredth of the time waited so far, within limits."""
    return min(max(POLL_SECONDS, waited / 100), LONGEST_POLL_SECONDS)


def _progress(tasks: list[TaskInstance], models: list[dict[str, Any]], seconds: float) -> Table:
    """The tasks, and the epochs of the models that train."""
    epochs = {f"train [{model['name']}]": model for model in models if model["epochs"] and model["state"] == "training"}
    table = Table.grid(padding=(0, 2))
    for item in tasks:
        mark = DONE.get(item.state or "", Spinner("dots") if item.state == "running" else "[dim]·[/]")
        took = f"{item.seconds:.1f} s" if item.seconds is not None else ""
        row: list[Any] = [mark, escape(item.label), f"[dim]{item.state or 'waiting'}[/]", took]
        if model := epochs.get(item.label):
            left = f", about {model['remaining']} left" if model["remaining"] else ""
            row += [
                ProgressBar(total=model["epochs"], completed=model["epoch"], width=20),
                f"[dim]epoch {model['epoch']} of {model['epochs']}{left}[/]",
            ]
        table.add_row(*row)
    table.add_row("", "", "", f"[dim]{seconds:.0f} s[/]")
    return table


def _print_changes(tasks: list[TaskInstance], shown: dict[str, str | None], console: Console) -> None:
    for item in tasks:
        if item.state and shown.get(item.label) != item.state:
            shown[item.label] = item.state
            took = f" after {item.seconds:.1f} s" if item.state in DONE and item.seconds is not None else ""
            console.print(f"{item.label}: {item.state}{took}", markup=False, highlight=False)


def _result(api: AirflowApi, run_id: str, state: str, tasks: list[TaskInstance], seconds: float) -> dict[str, Any]:
    compared = api.xcom(DAG_ID, run_id, "evaluate") or {}
    return {
        "dag_run_id": run_id,
        "state": state,
        "form": form_of(api, DAG_ID, run_id),
        "parent_run_id": compared.get("parent_run_id"),
        "tracking_uri": without_login(os.environ.get("MLFLOW_TRACKING_URI", ""))
        or (compared.get("parent_url") or "").partition("/#/")[0],
        "wall_seconds": round(seconds, 3),
        "task_seconds": {item.label: item.seconds for item in tasks},
        "dataset": compared.get("dataset")
        or (api.xcom(DAG_ID, run_id, "preprocess") or [{"dataset": None}])[0]["dataset"],
        "models": compared.get("models", []),
        "failed_models": compared.get("failed", {}),
        "champion": compared.get("champion"),
        "summary": compared.get("summary"),
        "airflow_url": f"{api.url}/dags/{DAG_ID}/runs/{run_id}",
        "report_url": report_url(api, run_id),
        "mlflow_url": compared.get("parent_url"),
        "compare_url": compared.get("compare_url"),
    }


def form_of(api: AirflowApi, dag_id: str, run_id: str) -> dict[str, Any]:
    """What a DAG run was started with, to be shown; who calls Airflow's API may leave out what has a default."""
    return given(FORMS[dag_id]().to_mapping() | (api.dag_run(dag_id, run_id)["conf"] or {}))


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result; the file appears when it is whole."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def print_comparison(result: dict[str, Any], console: Console) -> None:
    data = result["dataset"]
    table = Table(
        title=f"{data['name']}: {data['num_test']:,} test images, {len(data['classes'])} classes", title_justify="left"
    )
    # Long names wrap, so numbers are never cut off. A narrow terminal shows two columns less.
    macro = ("precision", "recall", "f1") if console.width >= WIDTH_FOR_ALL_COLUMNS else ("f1",)
    for column in ("model", "weights"):
        table.add_column(column, overflow="fold")
    for column in ("accuracy", "95 % interval", *macro, "training"):
        table.add_column(column, justify="right", no_wrap=True)
    for model in result["models"]:
        metrics = model["metrics"]
        table.add_row(
            model["name"],
            model["weights"],
            f"{metrics['test/accuracy']:.4f}",
            f"{metrics['test/accuracy_ci_low']:.4f} – {metrics['test/accuracy_ci_high']:.4f}",
            *(f"{metrics[f'test/{name}_macro']:.4f}" for name in macro),
            f"{model['train_seconds']:,.1f} s",
        )
    console.print(table)
    if result["summary"]:
        console.print(result["summary"], markup=False, highlight=False)
    for note in data.get("notes", ()):
        console.print(f"Data: {note}", markup=False, highlight=False)
    console.print()
    for label, url in (
        ("Report", result["report_url"]),
        ("MLflow", result["mlflow_url"]),
        ("Compare", result["compare_url"]),
    ):
        console.print(f"{label:<9}{url}", soft_wrap=True, markup=False, highlight=False)
    if champion := result["champion"]:
        address = json.dumps(result["tracking_uri"])
        lines = [
            f"{'Champion':<9}{champion['name']} version {champion['version']}; in any Python that has MLflow and "
            'its login (eval "$(mlpipe env)"):',
            f"import mlflow; mlflow.set_tracking_uri({address}); "
            f'model = mlflow.pyfunc.load_model("models:/{champion["name"]}@champion")',
        ]
        for line in lines:
            console.print(line, soft_wrap=True, markup=False, highlight=False)


@click.command()
@click.argument("given", metavar="[MODEL_URI] IMAGE...", nargs=-1, required=True)
@click.option("--top-k", type=click.IntRange(1), default=1, show_default=True, help="Labels shown for each image.")
@click.option("--csv", "form", flag_value="csv", help="Print CSV.")
@click.option("--json", "form", flag_value="json", help="Print JSON: one object per line and image.")
def predict(given: tuple[str, ...], top_k: int, form: str | None) -> None:
    """Label image files, or all files of folders, with a logged model, e.g. models:/digits-classifier@champion.

    Without MODEL_URI, the champion labels them if the registry has only one.

    The exit status is 2 if a file could not be read; the other files are labelled anyway.
    """
    use_local_stack("MLFLOW_TRACKING_URI")
    import mlflow
    from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR
    from mlflow.exceptions import MlflowException

    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
    named, images = (given[0], given[1:]) if ":/" in given[0] else (None, given)
    if not images:
        raise UserError("IMAGE: none given; name image files or folders")
    model_uri = named or _only_champion()
    try:
        model = mlflow.pyfunc.load_model(model_uri).unwrap_python_model()
    except (MlflowException, OSError) as error:
        reason = redact_text(str(error).splitlines()[0])
        raise UserError(
            f"MODEL_URI: {model_uri!r} cannot be loaded ({reason}); see the Models page of MLflow"
        ) from None
    if getattr(model, "decoder", None) is None:
        raise UserError(
            f"MODEL_URI: {model_uri!r} cannot decode files; name a model that this version of mlpipe logged"
        )
    paths = [path for image in images for path in _files(Path(image))]
    rows: list[dict[str, Any]] = []
    for start in range(0, len(paths), FILES_PER_CALL):
        part = paths[start : start + FILES_PER_CALL]
        for path, row in zip(part, model.predict_files(part).to_dict("records"), strict=True):
            shown = os.fsencode(path).decode(errors="replace")
            rows.append({"image": shown, "error": row["error"], "labels": _best(row, top_k)})
    _print_predictions(rows, form, top_k)
    if num_bad := sum(bool(row["error"]) for row in rows):
        raise UserError(f"IMAGE: {num_bad} of {len(paths)} files could not be read; the table says why")


def _only_champion() -> str:
    """Address of the champion, if one registered model alone has one.

    Raises:
        UserError: none has, or several have.
    """
    import mlflow

    found = [each.name for each in mlflow.search_registered_models() if "champion" in each.aliases]
    if len(found) != 1:
        known = f"; there are models:/{'@champion, models:/'.join(found)}@champion" if found else ""
        raise UserError(f"MODEL_URI: {len(found)} registered models have a champion, so name one{known}")
    return f"models:/{found[0]}@champion"


def _best(row: dict[str, Any], top_k: int) -> list[tuple[str, float]]:
    """Labels and probabilities, the most probable first; none of a file that could not be read."""
    if row["error"]:
        return []
    prefix = "probability_"
    known = [(name.removeprefix(prefix), float(value)) for name, value in row.items() if name.startswith(prefix)]
    return sorted(known, key=lambda entry: -entry[1])[:top_k]


def _print_predictions(rows: list[dict[str, Any]], form: str | None, top_k: int) -> None:
    if form == "json":
        for row in rows:
            labels = [{"label": label, "probability": round(value, 6)} for label, value in row["labels"]]
            click.echo(json.dumps({"image": row["image"], "error": row["error"], "labels": labels}, ensure_ascii=False))
        return
    if form == "csv":
        heads = [name for k in range(1, top_k + 1) for name in (f"label_{k}", f"probability_{k}")]
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["image", *heads, "error"])
        for row in rows:
            cells = [cell for label, value in row["labels"] for cell in (label, f"{value:.6f}")]
            writer.writerow([row["image"], *cells, *[""] * (len(heads) - len(cells)), row["error"]])
        return
    table = Table(Column("image", overflow="fold"), Column("label", overflow="fold"), "confidence")
    for row in rows:
        names = "\n".join(escape(label) for label, _ in row["labels"])
        shares = "\n".join(f"{value:.4f}" for _, value in row["labels"])
        table.add_row(escape(row["image"]), names or f"[red]{escape(row['error'])}[/]", shares)
    new_console().print(table)


def _files(path: Path) -> list[Path]:
    """A file, or those of a folder and of the folders in it."""
    if not path.is_dir():
        return [path]
    found = sorted(each for each in path.rglob("*") if each.is_file() and not each.name.startswith("."))
    if not found:
        raise UserError(f"IMAGE: {str(path)!r} holds no files")
    return found
