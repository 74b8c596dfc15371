"""A search on the real stack: its trials, what it found, and how its result is used."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import mlflow
import pytest

from mlpipe.config import RunParams
from mlpipe.recipes import resolve
from tests.integration.test_main_job import mlpipe

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

TRIALS, SEEDS = 6, 2


@pytest.fixture(scope="module")
def found(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("tune") / "tune.json"
    form = ["--trials", str(TRIALS), "--workers", "2", "--epochs", "2", "--seeds", str(SEEDS), "--study", "digits-cnn"]
    done = mlpipe(environment, "tune", *form, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text()) | {"printed": done.stdout}


def test_each_trial_is_made_once_and_the_recipe_is_the_first(found: dict[str, Any]) -> None:
    assert [trial["number"] for trial in found["trials"]] == list(range(TRIALS))
    assert {trial["state"] for trial in found["trials"]} <= {"complete", "pruned"}
    assert found["trials"][0]["state"] == "complete"
    assert found["trials"][0]["params"] == found["default"]["params"]
    assert found["best"]["value"] >= found["default"]["value"]


def test_each_trial_is_a_run_below_the_searchs(found: dict[str, Any], environment: dict[str, str]) -> None:
    client = mlflow.MlflowClient(environment["MLFLOW_TRACKING_URI"])
    parents = set()
    for trial in found["trials"]:
        run = client.get_run(trial["run_id"])
        assert run.data.tags["state"] == trial["state"]
        assert float(run.data.params["learning_rate"]) == trial["params"]["learning_rate"]
        assert "why" in run.data.tags or trial["state"] == "complete"
        assert not [name for name in run.data.metrics if name.startswith("test/")]
        parents.add(run.data.tags["mlflow.parentRunId"])
    (parent,) = parents
    files = {file.path for file in client.list_artifacts(parent)}
    assert {"search_history.png", "best_settings.json", "trials.json", "report.html"} <= files
    assert client.get_run(parent).info.status == "FINISHED"


def test_the_best_settings_are_trained_on_fresh_seeds_and_tested(found: dict[str, Any]) -> None:
    assert {model["name"] for model in found["models"]} == {f"custom_cnn_seed_{seed}" for seed in range(1, SEEDS + 1)}
    assert found["best"]["model_uri"].startswith("models:/digits-classifier/")
    assert found["best"]["metrics"]["test/accuracy"] > 0.5


def test_a_run_uses_what_the_search_found(found: dict[str, Any], environment: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    printed = next(line for line in found["printed"].splitlines() if line.startswith("Use them"))
    command = shlex.split(printed.removeprefix("Use them"))[1:]
    assert command[0] == "run"
    more = ["--epochs", "1", "--promotion", "disabled", "--compare-with", found["best"]["model_uri"]]
    done = mlpipe(environment, *command, *more, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    (model,) = json.loads(file.read_text())["models"]  # the other one was not trained
    params = mlflow.MlflowClient(environment["MLFLOW_TRACKING_URI"]).get_run(model["run_id"]).data.params
    assert float(params["learning_rate"]) == pytest.approx(found["best"]["params"]["learning_rate"])
    assert (model["name"], params["recipe"]) == ("custom_cnn", "quick")
    other = mlpipe(environment, "run", "--tuned", found["study"], "--models", "custom_cnn,resnet18")
    assert other.returncode == 2
    assert "whose settings are for custom_cnn=random" in other.stderr.replace("\n", " ")
    unknown = mlpipe(environment, "run", "--tuned", "no-such-study")
    assert unknown.returncode == 2
    assert "no-such-study" in unknown.stderr


def test_the_command_line_shows_a_search_as_any_other_run(
    found: dict[str, Any], environment: dict[str, str], tmp_path: Path
) -> None:
    run_id, page = found["dag_run_id"], tmp_path / "report.html"
    assert run_id in mlpipe(environment, "runs").stdout
    assert found["study"] in mlpipe(environment, "watch", run_id).stdout
    mlpipe(environment, "report", run_id, "-o", str(page))
    report = page.read_text()
    assert "custom_cnn_seed_1" in report
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', report, re.DOTALL)[1])
    again = resolve(RunParams.from_mapping(data["settings"]))  # what its button “With these settings” sends
    (model,) = again.models
    assert (data["dag"], model.name) == ("image_classification", "custom_cnn")
    assert model.train.learning_rate == pytest.approx(found["best"]["params"]["learning_rate"])
