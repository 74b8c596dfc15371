"""Light tasks on Airflow's LocalExecutor, as the local stack sets it up."""

from __future__ import annotations

from pathlib import Path

from mlpipe.stack.credentials import Credentials
from mlpipe.stack.local import StackSettings
from mlpipe.stack.service_environment import service_environment

from .conftest import RunScenario

STOPPED_PROCESSES = """
from airflow.executors.local_executor import LocalExecutor

executor = LocalExecutor(parallelism=2)
executor.start()
for pid in executor.workers:
    os.kill(pid, signal.SIGSTOP)
for number in range(int(os.environ["POOL_SLOTS"])):
    light = task(f"preprocess_{number}")
    light.token, light.log_path = "t" * 800, "l" * 600
    light.ti.run_id = "r" * 250
    executor.queue_workload(light, session=None)
signal.alarm(20)  # ends the scenario where the scheduler would wait for ever
while executor.queued_tasks:
    executor.heartbeat()
signal.alarm(0)
for pid in executor.workers:
    kill(pid)
result = {}
"""


def test_all_tasks_of_the_default_pool_fit_into_the_executors_pipe(run_scenario: RunScenario, tmp_path: Path) -> None:
    """Airflow issue 70526: where no process takes a task, LocalExecutor waits for room, and the scheduler with it."""
    settings = StackSettings.load(tmp_path / "state").with_storage_ports()
    settings.create_folders()
    environment = service_environment(settings, Credentials())
    slots = environment["AIRFLOW__CORE__DEFAULT_POOL_TASK_SLOT_COUNT"]
    run_scenario(STOPPED_PROCESSES, {}, POOL_SLOTS=slots)
