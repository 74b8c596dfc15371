"""MLflow goes down and does not come back by itself."""

from __future__ import annotations

import pytest

from tests.faults.conftest import EPOCHS
from tests.faults.lab import Lab, Table, ended_state, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]


def test_a_training_outlives_the_loss_of_mlflow(lab: Lab, table: Table) -> None:
    run_id = lab.start(models="custom_cnn", epochs=EPOCHS)
    until(lambda: len(lab.steps(run_id, "custom_cnn")) >= 3, "three epochs", 900)
    lab.take_away("mlflow")
    try:
        ended = until(
            lambda: ended_state(lab.api.dag_run_state("image_classification", run_id)), "the end of its attempts", 600
        )
        assert ended == "failed"
        row = lab.task(run_id, "custom_cnn")
        assert row is not None
        told = lab.events(run_id, "custom_cnn", try_number=1)
    finally:
        lab.bring_back("mlflow")
    advice = [event for event in told if event.startswith("MLflow at ")]
    assert len(advice) == 1, told
    for word in ("does not answer", "is kept", "mlpipe up", "clear this task"):
        assert word in advice[0]
    kept = len(lab.steps(run_id, "custom_cnn"))

    lab.clear(run_id)
    lab.wait(run_id)

    lab.assert_nothing_lost_or_twice(run_id, {"custom_cnn": EPOCHS})
    (resumed,) = [
        int(event.split()[3]) for event in lab.events(run_id, "custom_cnn") if event.startswith("resuming after epoch")
    ]
    assert kept <= resumed <= EPOCHS
    table.add(
        "MLflow, kill -9, down for good",
        "training",
        f"The task failed after {row['try_number']} attempts and said what to do. After MLflow returned and the task "
        f"was cleared, it resumed after epoch {resumed} of {EPOCHS}. Complete.",
    )
