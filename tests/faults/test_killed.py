"""kill -9: of a training task, and of each component in each stage."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.faults.conftest import EPOCHS, IMAGE_SIZE
from tests.faults.lab import WORD_FOR, Lab, Table, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

SECONDS_AWAY = 30
STORAGE = ("mlflow", "seaweedfs")
NAMES = {"scheduler": "Scheduler", "api-server": "API server", "mlflow": "MLflow", "seaweedfs": "SeaweedFS"}


def test_a_killed_training_goes_on_where_it_was(lab: Lab, unbroken: str, table: Table, tmp_path: Path) -> None:
    run_id = lab.start(models="custom_cnn", epochs=EPOCHS, image_size=IMAGE_SIZE)
    until(lambda: len(lab.steps(run_id, "custom_cnn")) >= 3, "three epochs", 900)
    process = lab.process_of(run_id, "custom_cnn")
    before = lab.child(run_id, "custom_cnn")
    process.kill()
    until(lambda: not process.is_running(), "its end", 30)
    seen = len(lab.steps(run_id, "custom_cnn"))
    assert 3 <= seen < EPOCHS, "it was not in the midst of the training"

    lab.wait(run_id)

    lab.assert_nothing_lost_or_twice(run_id, {"custom_cnn": EPOCHS})
    after = lab.child(run_id, "custom_cnn")
    assert before is not None
    assert after is not None
    assert after.info.run_id == before.info.run_id
    assert lab.tries(run_id)["custom_cnn"] == 2
    (resumed,) = [
        int(m[1]) for e in lab.events(run_id, "custom_cnn") if (m := re.match(r"resuming after epoch (\d+)", e))
    ]
    assert seen <= resumed < EPOCHS
    same = lab.weights_sha256(run_id, "custom_cnn", tmp_path) == lab.weights_sha256(unbroken, "custom_cnn", tmp_path)
    assert same, "the final weights are not those of the unbroken run"
    table.add(
        "Training task, kill -9",
        f"training, epoch {seen + 1} of {EPOCHS}",
        f"The second attempt resumed after epoch {resumed} in the same MLflow run. Complete; the final weights equal "
        "those of an uninterrupted run with the same seed, byte for byte.",
    )


@pytest.mark.parametrize("component", NAMES)
def test_a_component_is_killed_in_each_stage(component: str, lab: Lab, table: Table, slow_archive: Path) -> None:
    """Three times in one DAG run; what holds data is also kept away for half a minute, during training."""
    size = 17 + list(NAMES).index(component)  # a data set of its own: preprocessing has something to do
    models = {"custom_cnn": EPOCHS, "logistic_regression": None}
    form = {"dataset": "images", "data_uri": str(slow_archive), "image_size": size}
    run_id = lab.start(**form, models=",".join(models), epochs=EPOCHS)
    seconds, moments = {}, []
    for stage in WORD_FOR:
        lab.wait_for_stage(run_id, stage)
        began = time.monotonic()
        if component in STORAGE and stage == "train":
            moments.append((stage, lab.take_away(component)))
            time.sleep(SECONDS_AWAY)
            moments.append((stage, time.time()))
            lab.bring_back(component)
        else:
            killed = lab.kill(component)
            moments.append((stage, killed))
            lab.wait_healthy(component, killed)
        seconds[stage] = time.monotonic() - began
    lab.wait(run_id)

    for stage, moment in moments:
        assert lab.was_at_work(run_id, stage, moment), f"{stage} was not at work when {component} was away"
    lab.assert_nothing_lost_or_twice(run_id, models)
    tries = lab.tries(run_id)
    tries["train"] = max(tries[model] for model in models)
    for stage, word in WORD_FOR.items():
        away = component in STORAGE and stage == "train"
        if away:
            for model in (each for each in models if tries[each] > 1):
                # No client asks again whose answer was cut off in the middle, so the task does.
                cut_off = "IncompleteRead" in str(lab.log_of(run_id, model, 1))
                assert cut_off, f"{component} was away for {SECONDS_AWAY} s, and {model} did not wait for it"
        table.add(
            f"{NAMES[component]}, kill -9" + (f", down for {SECONDS_AWAY} s" if away else ""),
            word,
            f"Usable again after {seconds[stage]:.0f} s; the stage ended in attempt {tries[stage]}. Complete.",
        )
