"""The main job on the real stack: triggered from the command line, looked at from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from mlpipe.config import RunParams
from mlpipe.recipes import resolve
from mlpipe.stack.local import StackSettings
from tests.stack_fixtures import strangers_champion

pytestmark = pytest.mark.integration

MODELS = {"custom_cnn", "logistic_regression", "resnet18"}


def mlpipe(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlpipe.cli", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.fixture
def client(environment: dict[str, str]) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(environment["MLFLOW_TRACKING_URI"])


def test_the_result_file_says_everything(demo: dict[str, Any]) -> None:
    assert demo["state"] == "success"
    assert resolve(RunParams.from_mapping(demo["form"])) == resolve(RunParams())
    assert {model["name"] for model in demo["models"]} == MODELS
    assert demo["dataset"]["classes"] == [str(digit) for digit in range(10)]
    sizes = [demo["dataset"][f"num_{part}"] for part in ("train", "val", "test")]
    assert sum(sizes) == 1797
    assert demo["champion"]["name"] == "digits-classifier"
    assert demo["champion"]["version"] == demo["models"][0]["version"]
    assert demo["task_seconds"].keys() == {"download", "preprocess", "evaluate"} | {f"train [{m}]" for m in MODELS}
    assert 0 < max(demo["task_seconds"].values()) < demo["wall_seconds"]
    for model in demo["models"]:
        assert model["weights"] == ("none" if model["name"] == "logistic_regression" else "random")
        assert model["train_seconds"] > 0
        assert model["images_per_second"] > 0
        metrics = model["metrics"]
        assert metrics["test/accuracy"] > 0.90
        assert metrics["test/accuracy_ci_low"] < metrics["test/accuracy"] < metrics["test/accuracy_ci_high"]
        assert {"val/accuracy", "test/precision_macro", "test/recall_macro", "test/f1_macro"} <= metrics.keys()


def test_mlflow_has_one_parent_and_one_child_for_the_data_and_each_model(
    demo: dict[str, Any], client: mlflow.MlflowClient
) -> None:
    parent = client.get_run(demo["parent_run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["airflow_url"] == demo["airflow_url"]
    assert demo["summary"] in parent.data.tags["mlflow.note.content"]
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'", order_by=["start_time"]
    )
    assert {run.info.run_name for run in children} == {
        "data · digits",
        "custom_cnn (random weights)",
        "logistic_regression",
        "resnet18 (random weights)",
    }
    names = {frozenset(run.data.params) for run in children if run.data.tags["stage"] == "train"}
    common = frozenset.intersection(*names)
    assert {"architecture", "weights", "seed", "learning_rate", "data_digest", "recipe"} <= common
    for run in children:
        assert run.info.status == "FINISHED"
        assert run.data.tags["dag_run_id"] == demo["dag_run_id"]
        assert run.data.tags["data_digest"] == demo["dataset"]["digest"]
        assert run.inputs.dataset_inputs[0].dataset.digest == demo["dataset"]["digest"]


def test_each_model_run_has_its_curves_pictures_and_version(demo: dict[str, Any], client: mlflow.MlflowClient) -> None:
    for model in demo["models"]:
        artifacts = {file.path for file in client.list_artifacts(model["run_id"])}
        assert {"confusion_matrix.png", "confusion_matrix.csv", "worst_mistakes.png", "calibration.png"} <= artifacts
        steps = [metric.step for metric in client.get_metric_history(model["run_id"], "val/accuracy")]
        assert steps == list(range(1, len(steps) + 1))
        assert len(client.get_metric_history(model["run_id"], "test/accuracy")) == 1
        version = client.get_model_version("digits-classifier", model["version"])
        assert version.run_id == model["run_id"]
        assert version.tags["weights"] == model["weights"]
    network = next(model for model in demo["models"] if model["name"] == "resnet18")
    assert any(name.startswith("system/") for name in client.get_run(network["run_id"]).data.metrics)
    aliases = client.get_registered_model("digits-classifier").aliases
    assert aliases.keys() == MODELS | {"champion"}


def test_training_tasks_ran_side_by_side(demo: dict[str, Any], airflow_get: Callable[[str], Any]) -> None:
    tasks = f"/dags/image_classification/dagRuns/{demo['dag_run_id']}/taskInstances"
    mapped = [row for row in airflow_get(tasks)["task_instances"] if row["task_id"] == "train"]
    assert {row["rendered_map_index"] for row in mapped} == MODELS
    assert {row["executor"] for row in mapped} == {"gpu"}
    # Their first attempts: another test clears one of them.
    rows = [airflow_get(f"{tasks}/train/{row['map_index']}/tries")["task_instances"][0] for row in mapped]
    spans = [(datetime.fromisoformat(row["start_date"]), datetime.fromisoformat(row["end_date"])) for row in rows]
    # Not all three: the fit to digits may be over before the last task's process has begun.
    assert max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans) >= 2


def test_the_data_set_and_the_champion_are_announced(demo: dict[str, Any], airflow_get: Callable[[str], Any]) -> None:
    events = airflow_get("/assets/events?limit=100")["asset_events"]
    mine = {event["name"]: event["extra"] for event in events if event["source_run_id"] == demo["dag_run_id"]}
    assert mine["digits"]["digest"] == demo["dataset"]["digest"]
    assert mine["digits-classifier"]["version"] == demo["champion"]["version"]


def test_no_secret_is_written_down(demo: dict[str, Any], stack: StackSettings) -> None:
    assert demo
    secrets = [value for value in json.loads(stack.credentials_path.read_text()).values() if len(value) > 8]
    meant_for_it = {stack.credentials_path, stack.home / "airflow" / "passwords.json"}
    for path in stack.home.rglob("*"):
        if not path.is_file() or path in meant_for_it:
            continue
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path


def test_a_stranger_loads_the_champion(demo: dict[str, Any], environment: dict[str, str], tmp_path: Path) -> None:
    found = strangers_champion(environment, tmp_path)
    assert found["columns"] == ["label", "confidence", *(f"probability_{n}" for n in range(10))]
    assert found["accuracy"] > 0.9
    assert demo["champion"]


def test_the_last_lines_load_the_champion_as_printed(
    demo: dict[str, Any], environment: dict[str, str], tmp_path: Path
) -> None:
    before, line = demo["printed"].splitlines()[-2:]
    login = before[before.index("eval ") : before.index("):")]
    code = f"{line}; import numpy; print(len(model.predict(numpy.full((2, 8, 8, 3), 9, numpy.uint8))))"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/bash", "-c", f'{login}; exec python -c "$CODE"'],
        env={"PATH": path, "HOME": str(tmp_path), "MLPIPE_HOME": environment["MLPIPE_HOME"], "CODE": code},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "2", done.stderr


def test_predict_labels_files(demo: dict[str, Any], environment: dict[str, str], tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "black.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    done = mlpipe(environment, "predict", demo["champion"]["model_uri"], str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "black.png" in done.stdout.replace("\n", "").replace(" ", "").replace("│", "")
    (tmp_path / "a_page.png").write_text("<html>")
    some = mlpipe(environment, "predict", demo["champion"]["model_uri"], str(tmp_path))
    assert some.returncode == 2
    assert "is not an image" in some.stdout
    assert "black.png" in some.stdout.replace("\n", "").replace(" ", "").replace("│", "")
    assert "1 of 2 files could not be read" in some.stderr
    rows = mlpipe(
        environment, "predict", "--json", "--top-k", "2", str(tmp_path)
    ).stdout.splitlines()  # the only champion
    by_file = {Path(row["image"]).name: row for row in map(json.loads, rows)}
    assert len(by_file["black.png"]["labels"]) == 2
    assert by_file["a_page.png"]["error"]
    missing = mlpipe(environment, "predict", "models:/nothing@champion", str(path))
    assert missing.returncode == 2
    assert "models:/nothing@champion" in missing.stderr
    assert "Traceback" not in missing.stderr


def one_class_zip(folder: Path) -> Path:
    from PIL import Image

    path = folder / "one.zip"
    picture = folder / "x.png"
    Image.new("RGB", (8, 8)).save(picture)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(20):
            archive.write(picture, f"train/cat/{number}.png")
            archive.write(picture, f"test/cat/{number}.png")
    return path


def corrupt_zip(folder: Path) -> Path:
    path = folder / "corrupt.zip"
    path.write_bytes(b"PK\x03\x04 this is no archive")
    return path


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dataset", "images", "--data-uri", "{corrupt}"], "corrupt.zip"),
        (["--dataset", "images", "--data-uri", "{one_class}"], "class"),
        (["--dataset", "images", "--data-uri", "http://127.0.0.1:9/x.zip"], "127.0.0.1:9"),
        (["--models", "resnet18=imagenet"], "resnet18"),
    ],
    ids=["corrupt archive", "one class", "unreachable address", "unreachable weights"],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str],
    complaint: str,
    demo: dict[str, Any],  # noqa: ARG001 - the registry is not empty
    environment: dict[str, str],
    client: mlflow.MlflowClient,
    tmp_path: Path,
) -> None:
    if "resnet18=imagenet" in arguments and os.environ.get("MLPIPE_TEST_ONLINE"):
        pytest.skip("the weights can be downloaded here")
    made = {"{corrupt}": corrupt_zip, "{one_class}": one_class_zip}
    words = [str(made[word](tmp_path)) if word in made else word for word in arguments]
    versions = len(client.search_model_versions())
    done = mlpipe(environment, "run", *words, "--json", str(tmp_path / "result.json"))
    assert done.returncode == 1, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["state"] == "failed"
    told = [line for line in done.stdout.splitlines() if "failed:" in line]
    assert len(told) == 1, done.stdout
    assert complaint in told[0]
    assert len(client.search_model_versions()) == versions
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    mine = f"tags.dag_run_id = '{result['dag_run_id']}'"
    deadline = time.monotonic() + 60  # Airflow calls back a while after the DAG run has ended
    while client.search_runs(experiments, f"{mine} and attributes.status = 'RUNNING'"):
        assert time.monotonic() < deadline
        time.sleep(1)
    for run in client.search_runs(experiments, f"{mine} and tags.stage = 'parent'"):
        assert run.info.status == "FAILED"
        assert any(complaint in text for tag, text in run.data.tags.items() if tag.startswith("error"))


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--epochs", "0", "epochs: 0 is not allowed; give a whole number from 1 to 1000, or nothing"),
        ("--models", "resnet99", "models: 'resnet99' is unknown; did you mean"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_triggered(
    environment: dict[str, str], option: str, value: str, complaint: str
) -> None:
    done = mlpipe(environment, "run", option, value)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr


def test_the_same_data_is_prepared_once(
    demo: dict[str, Any], environment: dict[str, str], client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    file = tmp_path / "again.json"
    words = ["--models", "logistic_regression", "--retrain", "--folds", "3", "--promotion", "dry_run"]
    done = mlpipe(environment, "run", *words, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    again = json.loads(file.read_text())
    assert again["dataset"]["digest"] == demo["dataset"]["digest"]
    assert again["champion"]["version"] == demo["champion"]["version"]
    assert again["parent_run_id"] != demo["parent_run_id"]
    first = next(model for model in demo["models"] if model["name"] == "logistic_regression")
    assert again["models"][0]["metrics"]["test/accuracy"] == first["metrics"]["test/accuracy"]
    assert again["models"][0]["version"] != first["version"]
    assert again["models"][0]["metrics"]["folds/mean_accuracy"] > 0.9
    note = client.get_run(again["parent_run_id"]).data.tags["mlflow.note.content"]
    assert "| Cross-validation, % |" in note


def test_what_was_trained_before_is_compared_again(
    demo: dict[str, Any], environment: dict[str, str], client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    file = tmp_path / "again.json"
    words = ["--models", "custom_cnn,hog_logistic_regression", "--promotion", "dry_run"]
    done = mlpipe(environment, "run", *words, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    again = {model["name"]: model for model in json.loads(file.read_text())["models"]}
    before = {model["name"]: model for model in demo["models"]}
    assert again["custom_cnn"]["model_uri"] == before["custom_cnn"]["model_uri"]
    assert again["custom_cnn"]["metrics"] == before["custom_cnn"]["metrics"]
    assert again["hog_logistic_regression"]["version"] not in {model["version"] for model in before.values()}
    assert "Not trained again" in " ".join(done.stdout.split())
    shown, trained = (client.get_run(each["custom_cnn"]["run_id"]) for each in (again, before))
    assert (shown.data.tags["stage"], shown.info.status) == ("reused", "FINISHED")
    course = [
        [(entry.step, entry.value) for entry in client.get_metric_history(run.info.run_id, "val/accuracy")]
        for run in (shown, trained)
    ]
    assert course[0] == course[1]


def test_a_folder_of_ones_own_has_its_name_its_champion_and_one_damaged_image(
    environment: dict[str, str], client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "Pets" / name).mkdir(parents=True)
        for number in range(60):
            pixels = rng.integers(0, 200, (16, 16, 3), np.uint8)
            pixels[..., label] = 250
            Image.fromarray(pixels).save(tmp_path / "Pets" / name / f"{number}.png")
    (tmp_path / "Pets" / "dog" / "empty.png").touch()
    file = tmp_path / "result.json"
    words = ["--dataset", "images", "--data-uri", str(tmp_path / "Pets"), "--models", "logistic_regression"]
    done = mlpipe(environment, "run", *words, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(file.read_text())
    assert result["dataset"]["name"] == "pets"
    assert result["champion"]["name"] == "pets-classifier"
    experiment = client.get_experiment_by_name("image-classification-pets")
    (data_run,) = client.search_runs([experiment.experiment_id], "tags.stage = 'data'")
    assert data_run.data.metrics["data/num_left_out"] == 1
    left_out = json.loads(Path(client.download_artifacts(data_run.info.run_id, "left_out.json")).read_text())
    assert left_out["data"] == [["dog/empty.png", "is empty (0 bytes)"]]
    printed = " ".join(done.stdout.split())
    assert "Data: 1 of 121 images cannot be used: 'dog/empty.png' is empty (0 bytes); left out" in printed
    assert "1 of 121 images could not be used and were left out." in result["summary"]
    note = client.get_run(result["parent_run_id"]).data.tags["mlflow.note.content"]
    assert "- Data: 1 of 121 images cannot be used" in note
