"""DAG runs that are stopped, that meet, and that lose one of their models."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from tests.faults.lab import WORD_FOR, Lab, Table, ended_state, pack_digits, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

NUM_AT_ONCE = 10
PUBLISHED = re.compile(r"published [\d,]+ images as data set ")
"""What `prepare_dataset` logs, unless it found the data set published."""


@pytest.mark.parametrize("stage", WORD_FOR)
def test_a_stopped_dag_run_leaves_killed_mlflow_runs(stage: str, lab: Lab, table: Table, slow_archive: Path) -> None:
    source = {"dataset": "images", "data_uri": str(slow_archive)} if stage == "preprocess" else {}
    source["name"] = f"stopped-{stage}"
    size = 24 + list(WORD_FOR).index(stage)
    run_id = lab.start(**source, models="custom_cnn,logistic_regression", epochs=100, image_size=size, early_stopping=3)
    lab.wait_for_stage(run_id, stage)
    if stage == "train":  # with one model ready, evaluation could begin
        until(lambda: (lab.task(run_id, "logistic_regression") or {}).get("state") == "success", "one model", 300)
    moment = time.time()
    lab.cancel(run_id)

    until(lambda: not [run for run in lab.runs(run_id) if run.info.status == "RUNNING"], "the end of its runs", 60)
    until(lambda: not [row for row in lab.tasks(run_id) if row["state"] == "running"], "the end of its tasks", 60)

    assert lab.was_at_work(run_id, stage, moment), f"{stage} was not at work when the DAG run was stopped"
    # Airflow's scheduler, at work on the DAG run at that moment, may write "success" over "failed", since the last task
    # was skipped; so the task is asked, and MLflow.
    ended = ended_state(lab.api.dag_run_state("image_classification", run_id))
    assert ended
    evaluation = lab.task(run_id, "evaluate")
    assert evaluation is not None
    assert evaluation["state"] in ("skipped", "failed")
    assert lab.parent(run_id).info.status == "KILLED"
    states = {run.data.tags.get("model", run.data.tags["stage"]): run.info.status for run in lab.runs(run_id)}
    if stage == "train":  # the other stages may be done before Airflow tells them to end
        assert states["custom_cnn"] == "KILLED"
    assert set(states.values()) <= {"KILLED", "FINISHED"}
    models = lab.mlflow.search_registered_models(f"name = 'stopped-{stage}-classifier'")
    assert len(models) == (stage != "preprocess")
    if stage != "evaluate":  # which may have been done
        assert not [alias for model in models for alias in model.aliases]
    table.add(
        "User stops the DAG run",
        WORD_FOR[stage],
        "Its open MLflow runs ended as KILLED; finished ones stay FINISHED. Airflow's own state of the DAG run was "
        f"{ended}; it may be success if the scheduler was processing the run at that moment."
        f"{'' if stage == 'evaluate' else ' No alias moved.'}",
    )


def test_ten_dag_runs_at_once_on_one_new_data_set(lab: Lab, table: Table, tmp_path: Path) -> None:
    """With other seeds and numbers of epochs, so that the ten models differ in quality.

    Nobody has seen the data set before, and the registered model has no champion yet.
    """
    archive = pack_digits(tmp_path / "digits.zip", 900)
    common = {"dataset": "images", "data_uri": str(archive), "name": "ten", "image_size": 12, "models": "custom_cnn"}
    forms = [{**common, "epochs": 1 + number % 3, "seed": number} for number in range(NUM_AT_ONCE)]
    run_ids = [lab.start(**form) for form in forms]
    for run_id in run_ids:
        lab.wait(run_id, seconds=1500)

    logs = [lab.events_of_all_tries(run_id, "preprocess") for run_id in run_ids]
    published = [line for log in logs for event in log if PUBLISHED.match(line := str(event.get("event")))]
    assert len(published) == 1, published
    digests = set()
    accuracy_of = {}
    for run_id, form in zip(run_ids, forms, strict=True):
        lab.assert_nothing_lost_or_twice(run_id, {"custom_cnn": form["epochs"]})
        child = lab.child(run_id, "custom_cnn")
        assert child is not None
        digests.add(child.data.tags["data_digest"])
        accuracy_of[lab.versions(run_id)["custom_cnn"]] = child.data.metrics["test/accuracy"]
    assert len(digests) == 1
    assert len(accuracy_of) == NUM_AT_ONCE
    assert len(set(accuracy_of.values())) > 1
    for alias in ("champion", "custom_cnn"):
        holders = [str(lab.mlflow.get_model_version_by_alias("ten-classifier", alias).version)]
        for run_id in run_ids:
            path = lab.mlflow.download_artifacts(lab.parent(run_id).info.run_id, "promotion.json", str(tmp_path))
            decision = json.loads(Path(path).read_text())[alias]
            if decision["moved"] and decision["holder"]:
                candidate = lab.versions(run_id)["custom_cnn"]
                holders.append(candidate)
                assert accuracy_of[candidate] > accuracy_of[decision["holder"]], "a worse model took the alias"
        assert set(holders) <= set(accuracy_of)
    most = max(max(lab.tries(run_id).values()) for run_id in run_ids)
    table.add(
        f"{NUM_AT_ONCE} DAG runs at once",
        "all stages",
        f"All complete, attempts per task at most {most}; {NUM_AT_ONCE} versions, no alias moved to a worse one.",
    )
    table.add(
        f"{NUM_AT_ONCE} DAG runs at once on one new data set",
        "preprocessing",
        "The data set was published once, and all runs used it.",
    )


def test_one_of_three_models_fails(lab: Lab, unbroken: str, table: Table, tmp_path: Path) -> None:
    states = {name: row["state"] for row in lab.tasks(unbroken) if (name := row.get("rendered_map_index"))}
    assert states == {"custom_cnn": "success", "logistic_regression": "success", "resnet18": "failed"}
    told = [event for event in lab.events(unbroken, "resnet18") if event.startswith("models: ")]
    assert len(told) == 1
    assert "/nowhere/weights.safetensors does not exist" in told[0]
    parent = lab.parent(unbroken)
    report = Path(lab.mlflow.download_artifacts(parent.info.run_id, "comparison.md", str(tmp_path))).read_text()
    for text in (report, parent.data.tags["mlflow.note.content"]):
        assert "custom_cnn" in text
        assert "logistic_regression" in text
        assert "resnet18" in text
        assert "failed" in text
    assert parent.data.metrics["num_models"] == 2
    assert parent.data.metrics["num_failed_models"] == 1
    assert lab.versions(unbroken).keys() == {"custom_cnn", "logistic_regression"}
    assert ended_state(lab.api.dag_run_state("image_classification", unbroken)) == "success"
    table.add(
        "One of three models cannot be trained",
        "training",
        "The other two were compared and registered. The report names the failed one; its task is red in the DAG run, "
        "and its log gives the reason in one line.",
    )
