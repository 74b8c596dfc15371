"""kill -9 of a worker of a search, in the midst of a trial."""

from __future__ import annotations

import pytest

from mlpipe.stack.local import StackSettings
from tests.faults.conftest import IMAGE_SIZE
from tests.faults.lab import Lab, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

TRIALS, EPOCHS = 4, 60


def test_a_killed_worker_resumes_its_own_trial(lab: Lab, stack: StackSettings) -> None:  # noqa: ARG001 - its settings
    search = Lab(stack, "tune")
    form = {"model": "custom_cnn", "trials": TRIALS, "workers": 2, "epochs": EPOCHS, "image_size": IMAGE_SIZE}
    run_id = search.api.trigger("tune", {**form, "pruning": False, "seeds": 1, "study": "killed"})

    def steps(number: int) -> list[int]:
        trial = next(run for run in search.runs(run_id) if run.data.tags.get("trial") == str(number))
        return [entry.step for entry in search.mlflow.get_metric_history(trial.info.run_id, "val/accuracy")]

    until(lambda: min(len(steps(0)), len(steps(1))) >= 3, "three epochs of the first two trials", 900)
    search.process_of(run_id, "worker 0").kill()
    search.wait(run_id)
    workers = {row["map_index"]: row for row in search.tasks(run_id) if row["task_id"] == "search"}
    assert workers[0]["try_number"] == 2
    assert workers[1]["try_number"] == 1
    told = [event for event in search.events(run_id, "worker 0") if event.startswith("resuming")]
    assert told[0].startswith("resuming trial ")
    assert told[1].startswith("resuming after epoch ")
    trials = [run for run in search.runs(run_id) if run.data.tags["stage"] == "trial"]
    assert sorted(int(run.data.tags["trial"]) for run in trials) == list(range(TRIALS))
    assert {run.info.status for run in trials} == {"FINISHED"}
    for number in range(TRIALS):
        assert sorted(steps(number)) == list(range(1, EPOCHS + 1))
