"""kill -9 at random moments, of random components and tasks; the same ones for the same seed."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import EPOCHS, IMAGE_SIZE
from tests.faults.lab import AWAY, Lab, Table, ended_state, until
from tests.faults.test_killed import NAMES

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

NUM_RUNS = int(os.environ.get("MLPIPE_MONKEY_RUNS", "20"))
SEED = int(os.environ.get("MLPIPE_MONKEY_SEED", "0"))
KILLS_OF_A_RUN = 3
LONGEST_PAUSE = 8.0


def test_a_monkey_with_a_gun(lab: Lab, unbroken: str, table: Table, tmp_path: Path) -> None:
    draw = random.Random(SEED)  # noqa: S311 - not for secrets
    expected = lab.weights_sha256(unbroken, "custom_cnn", tmp_path / "unbroken")
    killed: Counter[str] = Counter()
    cleared = 0
    for number in range(NUM_RUNS):
        run_id = lab.start(models="custom_cnn", epochs=EPOCHS, image_size=IMAGE_SIZE)
        for _ in range(KILLS_OF_A_RUN):
            time.sleep(draw.uniform(0.5, LONGEST_PAUSE))
            if victim := _kill_one(lab, run_id, draw):
                killed[victim] += 1
        state = until(
            lambda run_id=run_id: ended_state(lab.api.dag_run_state("image_classification", run_id)), "its end", 900
        )
        if state == "failed":  # a task was killed in all of its attempts
            cleared += 1
            lab.clear(run_id)
            lab.wait(run_id)
        lab.assert_nothing_lost_or_twice(run_id, {"custom_cnn": EPOCHS})
        found = lab.weights_sha256(run_id, "custom_cnn", tmp_path / str(number))
        assert found == expected, f"{run_id}: other weights than those of an unbroken run"
    table.add(
        f"kill -9 at random, {sum(killed.values())} times in {NUM_RUNS} DAG runs (seed {SEED})",
        "all stages",
        f"{', '.join(f'{name} {count}' for name, count in sorted(killed.items()))}. {cleared} DAG runs failed and were "
        "cleared by hand. All complete; the final weights equal those of an uninterrupted run, byte for byte.",
    )


def _kill_one(lab: Lab, run_id: str, draw: random.Random) -> str | None:
    """Kill a component or the process of a running task; what was killed, or `None`: there was nothing to kill."""
    victim = draw.choice([*NAMES, "task", "task"])
    if victim != "task":
        with suppress(AssertionError):  # it is down from the kill before
            lab.kill(victim)
            return victim
        return None
    with suppress(*AWAY, StopIteration, psutil.NoSuchProcess):
        running = [row for row in lab.tasks(run_id) if row["state"] == "running"]
        if running:
            row = draw.choice(running)
            lab.process_of(run_id, str(row.get("rendered_map_index") or row["task_id"])).kill()
            return f"task {row['task_id']}"
    return None
