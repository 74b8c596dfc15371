"""What only seems dead: a stopped task, an API server that is away for long, a machine that sleeps."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import IMAGE_SIZE
from tests.faults.lab import Lab, Table, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2400)]

LONG = 300
"""Epochs that take longer than a second attempt takes to begin."""
SECONDS_API_SERVER_AWAY = 240
SECONDS_ASLEEP = 660
"""Longer than a task's token lives by Airflow's default."""


def test_a_task_that_was_believed_dead_leaves_its_run_to_the_next_attempt(
    lab: Lab, table: Table, tmp_path: Path
) -> None:
    form = {"models": "custom_cnn", "epochs": LONG, "image_size": IMAGE_SIZE, "promotion": "disabled"}
    run_id = lab.start(**form)
    until(lambda: len(lab.steps(run_id, "custom_cnn")) >= 3, "three epochs", 900)
    elder = lab.process_of(run_id, "custom_cnn")
    watcher = elder.parent()
    assert watcher is not None
    for process in (watcher, elder):
        process.suspend()
    stopped = time.monotonic()
    seen = len(lab.steps(run_id, "custom_cnn"))
    until(lambda: lab.tries(run_id)["custom_cnn"] == 2, "the second attempt", 900)
    until(lambda: len(lab.steps(run_id, "custom_cnn")) > seen + 3, "its epochs", 300)
    believed_dead = time.monotonic() - stopped
    for process in (elder, watcher):
        process.resume()
    until(lambda: not elder.is_running(), "the end of the first attempt", 120)
    assert len(lab.steps(run_id, "custom_cnn")) < LONG, "the second attempt was not at work"
    lab.wait(run_id)
    lab.assert_nothing_lost_or_twice(run_id, {"custom_cnn": LONG})
    unbroken = lab.start(**form)
    lab.wait(unbroken)
    hashes = [lab.weights_sha256(each, "custom_cnn", tmp_path) for each in (run_id, unbroken)]
    assert hashes[0] == hashes[1], "the final weights are not those of an unbroken run"
    table.add(
        "Training task stopped (SIGSTOP), believed dead, continued",
        "training",
        f"The second attempt began after {believed_dead:.0f} s. Once continued, the first one ended and wrote nothing "
        "more. Complete; the final weights equal those of an uninterrupted run, byte for byte.",
    )


def test_the_api_server_is_away_for_minutes(lab: Lab, table: Table) -> None:
    run_id = lab.start(models="custom_cnn", epochs=900, image_size=32, promotion="disabled")
    until(lambda: len(lab.steps(run_id, "custom_cnn")) >= 3, "three epochs", 900)
    lab.take_away("api-server")
    try:
        time.sleep(SECONDS_API_SERVER_AWAY)
        assert len(lab.steps(run_id, "custom_cnn")) < 900, "it ended while the API server was away"
    finally:
        lab.bring_back("api-server")
    lab.wait(run_id, seconds=1500)
    lab.assert_nothing_lost_or_twice(run_id, {"custom_cnn": 900})
    assert lab.tries(run_id)["custom_cnn"] == 1
    table.add(f"API server, kill -9, down for {SECONDS_API_SERVER_AWAY} s", "training", "The task went on. Complete.")


def test_the_machine_sleeps(lab: Lab, table: Table) -> None:
    """All processes of the stack are stopped at once; their clocks go on, as after a sleep."""
    run_id = lab.start(models="custom_cnn", epochs=LONG, image_size=IMAGE_SIZE, promotion="disabled")
    until(lambda: len(lab.steps(run_id, "custom_cnn")) >= 3, "three epochs", 900)
    processes: list[psutil.Process] = list(lab.supervisor.processes())
    for process in processes:
        process.suspend()
    time.sleep(SECONDS_ASLEEP)
    for process in processes:
        process.resume()
    lab.wait(run_id)
    lab.assert_nothing_lost_or_twice(run_id, {"custom_cnn": LONG})
    table.add(
        f"Machine asleep for {SECONDS_ASLEEP // 60} minutes (all processes stopped)",
        "training",
        f"It went on by itself, in attempt {lab.tries(run_id)['custom_cnn']}. Complete.",
    )
