"""What `mlpipe run` prints and refuses before anything is triggered."""

from __future__ import annotations

import io
import os
import shlex
from pathlib import Path
from typing import Any

import mlflow
import pytest
from click import Command
from click.testing import CliRunner
from rich.console import Console

from mlpipe import run_command, runs_commands, tune_command
from mlpipe.airflow_api import AirflowApi
from mlpipe.config import RunParams, given
from mlpipe.errors import UserError
from mlpipe.recipes import resolve
from mlpipe.search.form import TuneParams
from mlpipe.stack.credentials import Credentials
from mlpipe.stack.local import StackSettings
from mlpipe.tracking import studies

SCORES = {
    "test/accuracy": 0.5889,
    "test/accuracy_ci_low": 0.4889,
    "test/accuracy_ci_high": 0.7012,
    "test/precision_macro": 0.6276,
    "test/recall_macro": 0.5888,
    "test/f1_macro": 0.5974,
}


CHECKSUM = f"#sha256={'ab' * 32}"


def result() -> dict[str, Any]:
    model = {
        "name": "resnet18_cifar10_classifier_champion",
        "weights": "models:/cifar10-classifier@champion",
        "metrics": SCORES,
        "train_seconds": 1019.73,
    }
    return {
        "dataset": {"name": "images", "num_test": 90, "classes": ["cat", "dog"]},
        "models": [model],
        "summary": None,
        "report_url": "http://a",
        "mlflow_url": "http://m",
        "compare_url": "http://c",
        "champion": None,
    }


@pytest.mark.parametrize(("width", "all_columns"), [(80, False), (120, True)])
def test_no_number_of_the_table_is_cut_off(width: int, all_columns: bool) -> None:
    printed = io.StringIO()
    run_command.print_comparison(result(), Console(file=printed, width=width))
    for number in ("0.5889", "0.4889 – 0.7012", "0.5974", "1,019.7 s"):
        assert number in printed.getvalue()
    assert ("0.6276" in printed.getvalue()) == all_columns
    assert "…" not in printed.getvalue()


@pytest.mark.parametrize(("waited", "pause"), [(0, 0.5), (50, 0.5), (300, 3), (10_000, 10)])
def test_a_long_run_is_asked_after_less_often(waited: float, pause: float) -> None:
    assert run_command.poll_seconds(waited) == pause


def test_every_field_of_the_form_is_an_option() -> None:
    options = {option.name for option in run_command.run.params}
    assert options == {*RunParams.json_schema(), "json_path", "unpause", "tuned"}


def test_every_field_of_a_search_is_an_option() -> None:
    options = {option.name for option in tune_command.tune.params}
    assert options == {*TuneParams.json_schema(), "json_path", "unpause"}


def test_the_printed_command_prepares_the_same_images() -> None:
    choices = {"dataset": "digits", "image_size": 16, "validation_fraction": 0.2, "small_classes": "leave_out"}
    weights = f"resnet18=https://joe:pw@host/w.pth{CHECKSUM}"
    form = given(TuneParams.from_mapping({**choices, "model": weights}).to_mapping())
    command = run_command.run.make_context("run", shlex.split(tune_command.command_to_use(form, "pets"))[2:])
    assert {name: command.params[name] for name in choices} == choices
    assert command.params["models"] == f"resnet18=https://host/w.pth{CHECKSUM}"
    assert command.params["tuned"] == "pets"


@pytest.mark.parametrize("command", [run_command.run, tune_command.tune])
@pytest.mark.parametrize(("path", "why"), [("", "is a directory"), ("none/a.json", "does not exist; create it first")])
def test_a_result_that_cannot_be_written_is_refused_before_anything_runs(
    command: Command, path: str, why: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(command, ["--json", str(tmp_path / path)])
    assert result.exit_code == 2
    assert why in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("searched", "models", "recipe", "trained"),
    [
        ("custom_cnn=random", None, "quick", "custom_cnn=random"),
        ("custom_cnn=random", "custom_cnn", "quick", "custom_cnn"),
        ("logistic_regression", None, "quick", "logistic_regression"),
        ("resnet18=random", None, "report", "resnet18=random"),  # whose weights are others
        (f"resnet18=https://b/w.pth{CHECKSUM}", None, "quick", f"resnet18=https://b/w.pth{CHECKSUM}"),
        ("resnet18=s3://b/w.pth?…", "resnet18=s3://b/w.pth?key=1", "quick", "resnet18=s3://b/w.pth?key=1"),
        ("/nets/mine.py:Net=random", None, "quick", "/nets/mine.py:Net=random"),
        ("custom_cnn=random", "custom_cnn,resnet18", "quick", "models: resnet18=random is not the model of the search"),
        ("custom_cnn=random", "logistic_regression", "quick", "models: logistic_regression is not the model of the"),
        ("resnet18=random", "resnet18", "report", "models: resnet18=imagenet is not the model of the search pets"),
    ],
)
def test_what_a_search_found_is_for_its_model_alone(
    searched: str, models: str | None, recipe: str, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(
        studies, "found_by", lambda _: (searched, {"class_weights": "balanced", "augmentation": "flip"})
    )
    form = {"models": models, "settings": '{"augmentation": "none"}', "recipe": recipe}
    if trained.startswith("models: "):
        with pytest.raises(UserError, match=f"^{trained}.*, whose settings are for {searched}; "):
            run_command.settings_found_by("pets", form)
        return
    found = run_command.settings_found_by("pets", form)
    assert found == {"models": trained, "settings": '{"class_weights": "balanced", "augmentation": "none"}'}
    resolve(RunParams.from_mapping({**form, **found}))


def test_a_path_is_made_absolute_and_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.zip").touch()
    assert run_command.local_file("a.zip") == tmp_path / "a.zip"
    assert run_command.local_file("s3://bucket/a.zip") is None
    assert run_command.local_file(None) is None
    with pytest.raises(UserError, match="data_uri: .* does not exist"):
        run_command.local_file("b.zip")


def test_the_file_of_a_network_is_named_by_its_whole_path_and_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLPIPE_AIRFLOW_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("MLPIPE_AIRFLOW_USER", "admin")
    monkeypatch.setenv("MLPIPE_AIRFLOW_PASSWORD", "secret")
    monkeypatch.setattr(run_command.AirflowApi, "check_dag", lambda *_: None)  # no server is there
    triggered: list[dict[str, Any]] = []
    monkeypatch.setattr(
        run_command.AirflowApi, "trigger", lambda _self, _dag, form, _id: triggered.append(form) or 1 / 0
    )
    command = ["--models", "resnet18=s3://b/w.pth?a=b, mynets.py:TinyNet=models:/a/1"]
    missing = CliRunner().invoke(run_command.run, command).exception
    assert isinstance(missing, UserError)
    assert str(missing).startswith(f"models: no file at '{tmp_path}/mynets.py'")
    (tmp_path / "mynets.py").touch()
    CliRunner().invoke(run_command.run, command)
    assert triggered[0]["models"] == f"resnet18=s3://b/w.pth?a=b,{tmp_path}/mynets.py:TinyNet=models:/a/1"


def test_a_file_that_the_workers_cannot_read_needs_a_server_to_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(b"PK")
    monkeypatch.setenv("MLPIPE_AIRFLOW_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(run_command.AirflowApi, "check_dag", lambda *_: None)  # no server is there
    impatient = run_command.AirflowApi("http://127.0.0.1:9", "admin", "secret", retries=0)
    monkeypatch.setattr(run_command.AirflowApi, "from_env", lambda **_: impatient)
    monkeypatch.delenv(run_command.SHARED_FILES, raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    command = ["--dataset", "images", "--data-uri", str(path)]
    answer = CliRunner().invoke(run_command.run, command)
    assert isinstance(answer.exception, UserError)
    assert str(answer.exception).startswith(f"data_uri: the workers cannot read {path}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    answer = CliRunner().invoke(run_command.run, command)
    assert isinstance(answer.exception, UserError)
    assert str(answer.exception).startswith("data_uri: a.zip could not be uploaded to MLflow")
    # With files in common nothing is uploaded: what fails is Airflow.
    monkeypatch.setenv(run_command.SHARED_FILES, "true")
    answer = CliRunner().invoke(run_command.run, command)
    assert str(answer.exception).startswith("Airflow at http://127.0.0.1:9 does not answer")


def test_the_local_stack_is_reached_without_the_users_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Credentials.load_or_create(StackSettings.load(tmp_path).credentials_path)
    # A copy, as many more variables are set.
    monkeypatch.setattr(os, "environ", {"MLPIPE_HOME": str(tmp_path), "no_proxy": "a.org", "AWS_ENDPOINT_URL_S3": "x"})

    run_command.use_local_stack("MLPIPE_AIRFLOW_URL")

    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "a.org,127.0.0.1,localhost"
    assert os.environ["AWS_ENDPOINT_URL_S3"] == "http://127.0.0.1:8333", "else `mlpipe gc` deletes in another store"
    assert os.environ["MLPIPE_AIRFLOW_URL"] == "http://127.0.0.1:8080"


@pytest.mark.parametrize(
    ("command", "options"),
    [(runs_commands.watch, []), (runs_commands.stop, []), (runs_commands.report, ["--output", "report.html"])],
)
def test_an_empty_id_of_a_run_is_said(command: Command, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in AirflowApi.VARIABLES:
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    result = CliRunner().invoke(command, ["", *options])

    assert str(result.exception).startswith("RUN_ID: empty; ")


def test_what_workers_may_read_does_not_bind_who_uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (archive := tmp_path / "pets.zip").write_bytes(b"PK")
    monkeypatch.setenv("MLPIPE_ALLOWED_FILES", "/data")  # as whoever reads docker-compose's .env has it
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLPIPE_SHARED_FILES", raising=False)
    with pytest.raises(UserError, match="no MLflow server is set for the upload"):
        run_command.upload_file(archive, Console())


def test_the_only_champion_is_found_in_a_registry_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    client = mlflow.MlflowClient()
    for number in range(101):  # one more than MLflow lists at once
        client.create_registered_model(f"model-{number:03}")
    client.create_model_version("model-100", source=str(tmp_path))
    client.set_registered_model_alias("model-100", "champion", "1")

    result = CliRunner().invoke(run_command.predict, ["image.png"])

    assert str(result.exception).startswith("MODEL_URI: 'models:/model-100@champion' cannot be loaded")
