"""GpuExecutor with its real worker processes and pretended devices; see `harness.py` for what is replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from .conftest import Harness, RunScenario

FIVE_TASKS = """
scheduler = Scheduler()
scheduler.queue(*[task(f"task_{number}", seconds=0.3) for number in range(5)])
scheduler.beat_until_done()
scheduler.executor.end()
result = scheduler.result()
"""


def intervals(result: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Device, begin and end (seconds) of each task, in the order in which they began."""
    ends = {line["name"]: line["time"] for line in result["ends"]}
    begun = [(line["environment"]["CUDA_VISIBLE_DEVICES"], line["time"], line["name"]) for line in result["starts"]]
    return sorted(((device, begin, ends[name]) for device, begin, name in begun), key=lambda line: line[1])


def most_at_once(spans: list[tuple[str, float, float]]) -> int:
    return max(sum(begin <= moment < end for _, begin, end in spans) for _, moment, _ in spans)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_five_tasks_wait_for_two_devices(
    run_scenario: RunScenario, two_gpus: dict[str, str], start_method: str
) -> None:
    script = f"import multiprocessing; multiprocessing.set_start_method({start_method!r}, force=True)\n{FIVE_TASKS}"
    result = run_scenario(script, two_gpus)
    spans = intervals(result)
    assert result["events"] == {f"task_{number}": ["success"] for number in range(5)}
    assert result["most_running"] == result["parallelism"] == 2
    assert {device for device, _, _ in spans} == {"GPU-a", "GPU-b"}
    for name in ("GPU-a", "GPU-b"):
        assert most_at_once([span for span in spans if span[0] == name]) == 1
    assert most_at_once(spans) <= 2


def test_the_scheduler_is_told_of_free_slots_only(run_scenario: RunScenario, two_gpus: dict[str, str]) -> None:
    """What the scheduler does not queue needs no token and meets no `task_queued_timeout`."""
    result = run_scenario(
        """
scheduler = Scheduler()
executor = scheduler.executor
free = [executor.slots_available]
first, second, third = task("first", seconds=1), task("second", seconds=1), task("third", priority=9)
scheduler.queue(first, second)
scheduler.beat()
free.append(executor.slots_available)
scheduler.queue(third, task("fourth"))
scheduler.beat()
waiting = [workload.ti.task_id for workload in executor.queued_tasks.values()]
known = [executor.has_task(workload.ti) for workload in (first, third)]
scheduler.beat_until_done()
free.append(executor.slots_available)
executor.end()
result = scheduler.result() | {"free": free, "waiting": waiting, "known": known}
""",
        two_gpus,
    )
    assert result["free"] == [2, 0, 2]
    assert result["waiting"] == ["third", "fourth"]
    assert result["known"] == [True, True]
    assert len(result["ends"]) == 4


def test_the_more_urgent_task_goes_first(run_scenario: RunScenario, two_gpus: dict[str, str]) -> None:
    result = run_scenario(
        """
scheduler = Scheduler()
scheduler.queue(task("low", priority=1), task("high", priority=9), task("middle", priority=5))
scheduler.beat_until_done()
scheduler.executor.end()
result = scheduler.result()
""",
        two_gpus | {"CUDA_VISIBLE_DEVICES": "1"},
    )
    assert [line["name"] for line in result["starts"]] == ["high", "middle", "low"]
    assert {line["environment"]["CUDA_VISIBLE_DEVICES"] for line in result["starts"]} == {"1"}


def test_slots_per_device_is_a_setting_and_tasks_spread(run_scenario: RunScenario, two_gpus: dict[str, str]) -> None:
    """The fourth task goes to the device with one task, though a slot of the other comes first."""
    result = run_scenario(
        """
scheduler = Scheduler()
scheduler.queue(task("on_a", seconds=0.2), task("on_b", seconds=3))
scheduler.beat_until(lambda: records("end"))
scheduler.queue(task("third", seconds=3), task("fourth", seconds=3), task("fifth", seconds=3))
scheduler.beat_until_done()
scheduler.executor.end()
result = scheduler.result()
""",
        two_gpus,
        AIRFLOW__GPU_EXECUTOR__SLOTS_PER_DEVICE="2",
    )
    devices = {line["name"]: line["environment"]["CUDA_VISIBLE_DEVICES"] for line in result["starts"]}
    assert result["parallelism"] == result["most_running"] == 4
    assert (devices["on_a"], devices["on_b"], devices["third"]) == ("GPU-a", "GPU-b", "GPU-a")
    assert sorted(devices.values()).count("GPU-a") == 3
    spans = intervals(result)
    assert max(most_at_once([span for span in spans if span[0] == name]) for name in ("GPU-a", "GPU-b")) == 2


def test_without_a_device_tasks_share_the_cores(run_scenario: RunScenario, no_gpu: dict[str, str]) -> None:
    result = run_scenario(FIVE_TASKS, no_gpu)
    share = str(max(1, len(os.sched_getaffinity(0)) // 3))
    assert result["parallelism"] == result["most_running"] == 3
    for line in result["starts"]:
        assert line["environment"] == {
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": share,
            "MKL_NUM_THREADS": share,
            "OPENBLAS_NUM_THREADS": share,
            "OMP_WAIT_POLICY": "PASSIVE",
        }
    assert "no GPU is used: No devices were found" in result["log"]


def test_cpu_slots_and_threads_are_settings(run_scenario: RunScenario, no_gpu: dict[str, str]) -> None:
    settings = {"AIRFLOW__GPU_EXECUTOR__CPU_SLOTS": "1", "AIRFLOW__GPU_EXECUTOR__THREADS_PER_SLOT": "7"}
    result = run_scenario(FIVE_TASKS, no_gpu, **settings)
    assert result["parallelism"] == result["most_running"] == 1
    assert {line["environment"]["OMP_NUM_THREADS"] for line in result["starts"]} == {"7"}


def test_modules_are_loaded_before_any_executor_starts(run_scenario: RunScenario, no_gpu: dict[str, str]) -> None:
    """LocalExecutor, whose workers profit as well, is started first."""
    script = """
import sys
from gpu_executor import GpuExecutor
before = "nturl2path" in sys.modules
GpuExecutor()
result = {"loaded": [before, "nturl2path" in sys.modules]}
"""
    settings = {"AIRFLOW__GPU_EXECUTOR__PRELOAD": "json, nturl2path"}
    assert run_scenario(script, no_gpu, **settings)["loaded"] == [False, True]


def test_what_may_touch_cuda_is_not_loaded_before_a_fork(run_scenario: RunScenario, no_gpu: dict[str, str]) -> None:
    script = """
from airflow.exceptions import AirflowConfigException
try:
    Scheduler()
except AirflowConfigException as error:
    result = {"error": str(error)}
"""
    result = run_scenario(script, no_gpu, AIRFLOW__GPU_EXECUTOR__PRELOAD="json,torch.nn")
    assert result["error"] == "[gpu_executor] preload: torch.nn must be imported by each task itself"


def test_a_setting_out_of_range_is_named(run_scenario: RunScenario, no_gpu: dict[str, str]) -> None:
    script = """
from airflow.exceptions import AirflowConfigException
try:
    Scheduler()
except AirflowConfigException as error:
    result = {"error": str(error)}
"""
    result = run_scenario(script, no_gpu, AIRFLOW__GPU_EXECUTOR__CPU_SLOTS="0")
    assert result["error"] == "[gpu_executor] cpu_slots: 0 is too small; give 1 or more"


def test_a_killed_worker_fails_its_task_and_returns_its_device(
    run_scenario: RunScenario, two_gpus: dict[str, str]
) -> None:
    """The task it leaves behind, in a process group of its own, dies before the device has its next one."""
    result = run_scenario(
        """
import psutil
scheduler = Scheduler()
scheduler.queue(task("victim", seconds=60, child=True), task("next", seconds=0.3))
scheduler.beat_until(lambda: records("start"))
begun = records("start")[0]
kill(begun["worker"])
scheduler.beat_until(lambda: len(records("start")) == 2)
left_behind = psutil.pid_exists(begun["child"]) and psutil.Process(begun["child"]).status() != psutil.STATUS_ZOMBIE
scheduler.beat_until_done()
scheduler.executor.end()
result = scheduler.result() | {"left_behind": left_behind}
""",
        two_gpus | {"CUDA_VISIBLE_DEVICES": "GPU-b"},
    )
    (victim,) = result["events"]["victim"]
    assert victim.startswith("failed: worker process")
    assert result["events"]["next"] == ["success"]
    assert not result["left_behind"]
    assert {line["environment"]["CUDA_VISIBLE_DEVICES"] for line in result["starts"]} == {"GPU-b"}


def test_a_failure_is_reported_even_if_it_cannot_be_unpickled(
    run_scenario: RunScenario, two_gpus: dict[str, str]
) -> None:
    result = run_scenario(
        """
scheduler = Scheduler()
scheduler.queue(task("plain", **{"raise": "plain"}), task("odd", **{"raise": "odd"}), task("good"))
scheduler.beat_until_done()
scheduler.executor.end()
result = scheduler.result()
""",
        two_gpus,
    )
    assert result["events"]["plain"] == ["failed: it failed"]
    assert result["events"]["odd"][0].startswith("failed: ")
    assert result["events"]["good"] == ["success"]


def test_callbacks_run_in_slots(run_scenario: RunScenario, two_gpus: dict[str, str]) -> None:
    result = run_scenario(
        """
scheduler = Scheduler()
scheduler.queue(callback(), task("task"))
scheduler.beat_until_done()
scheduler.executor.end()
result = scheduler.result()
""",
        two_gpus | {"CUDA_VISIBLE_DEVICES": "0"},
    )
    assert result["parallelism"] == result["most_running"] == 1
    for kind in ("CallbackKey", "task"):
        assert result["events"][kind][-1] == "success"
    assert len(result["ends"]) == 2


def test_end_lets_tasks_finish_and_leaves_no_process(run_scenario: RunScenario, two_gpus: dict[str, str]) -> None:
    result = run_scenario(
        """
import psutil
scheduler = Scheduler()
scheduler.queue(task("long", seconds=1, child=True))
scheduler.beat_until(lambda: records("start"))
scheduler.executor.end()
scheduler.beat()
result = scheduler.result() | {"children": [child.pid for child in psutil.Process().children(recursive=True)]}
""",
        two_gpus,
    )
    assert result["events"] == {"long": ["success"]}
    assert result["children"] == []
    assert not is_alive(result["starts"][0]["child"])


@pytest.mark.parametrize("stop", ["terminate", "interrupted end"])
def test_terminate_kills_what_runs(run_scenario: RunScenario, two_gpus: dict[str, str], stop: str) -> None:
    """Also when a second signal interrupts the wait of `end`, as the scheduler's log promises."""
    stops = {
        "terminate": "scheduler.executor.terminate()",
        "interrupted end": """
import signal
signal.signal(signal.SIGALRM, lambda *_: sys.exit(0))
signal.alarm(1)
try:
    scheduler.executor.end()
except SystemExit:
    pass
""",
    }
    result = run_scenario(
        f"""
import psutil
scheduler = Scheduler()
scheduler.queue(task("long", seconds=60, child=True))
scheduler.beat_until(lambda: records("start"))
{stops[stop]}
scheduler.beat()
result = scheduler.result() | {{"children": [child.pid for child in psutil.Process().children(recursive=True)]}}
""",
        two_gpus,
    )
    assert result["events"] == {"long": ["failed: the executor was shut down"]}
    assert result["children"] == []
    assert not is_alive(result["starts"][0]["child"])


def test_workers_and_tasks_end_with_a_killed_scheduler(
    tmp_path: Path, harness: Harness, two_gpus: dict[str, str]
) -> None:
    script = """
scheduler = Scheduler()
scheduler.queue(task("orphan", seconds=60, child=True))
scheduler.beat_until(lambda: False)
"""
    records = tmp_path / "records"
    scheduler = harness.begin(tmp_path, script, two_gpus)
    try:
        wait_until(lambda: records.exists() and '"start"' in records.read_text(), timeout=60)
        family = psutil.Process(scheduler).children(recursive=True)
        assert len(family) == 2  # a worker and its task
    finally:
        os.kill(scheduler, signal.SIGKILL)
        assert harness.wait() == -signal.SIGKILL
    wait_until(lambda: not any(is_alive(member.pid) for member in family), timeout=10)


def test_the_executor_loads_nothing_that_trains(airflow_environment: dict[str, str], no_gpu: dict[str, str]) -> None:
    script = """
import sys
from airflow.executors.executor_loader import ExecutorLoader
executors = ExecutorLoader.init_executors()
gpu = executors[1]
assert (type(gpu).__name__, gpu.name.alias, gpu.is_local, gpu.serve_logs) == ("GpuExecutor", "gpu", True, True), gpu
gpu.start()
heavy = {"torch", "lightning", "sklearn", "mlflow", "numpy", "pandas", "mlpipe"} & set(sys.modules)
gpu.end()
assert not heavy, heavy
"""
    check(script, airflow_environment | no_gpu)


def test_the_executor_stands_on_airflows_public_interface(airflow_environment: dict[str, str]) -> None:
    """It defines no method of its own making that Airflow could call, and knows no other executor."""
    script = """
import gpu_executor
from airflow.executors.base_executor import BaseExecutor
own = {name for name, value in vars(gpu_executor.GpuExecutor).items() if callable(value) and not name.startswith("__")}
assert {name for name in own if not name.startswith("_")} <= set(dir(BaseExecutor)), own
assert gpu_executor.GpuExecutor.__mro__[1] is BaseExecutor
assert not {"LocalExecutor", "CeleryExecutor"} & set(vars(gpu_executor))
"""
    check(script, airflow_environment)


def test_a_team_cannot_lease_the_same_devices_again(airflow_environment: dict[str, str]) -> None:
    check("from gpu_executor import GpuExecutor; assert not GpuExecutor.supports_multi_team", airflow_environment)


def test_airflow_does_not_load_the_executor_as_a_plugin(airflow_environment: dict[str, str]) -> None:
    """It would replace the module, and a spawned worker's function could no longer be pickled."""
    script = """
import gpu_executor, sys
from airflow import plugins_manager
plugins_manager.ensure_plugins_loaded()
assert not plugins_manager._get_plugins()[1]
assert sys.modules["gpu_executor"] is gpu_executor
"""
    check(script, airflow_environment)


def check(script: str, environment: dict[str, str]) -> None:
    executor = {"AIRFLOW__CORE__EXECUTOR": "LocalExecutor,gpu:gpu_executor.GpuExecutor"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | executor,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], timeout: float) -> None:
    give_up = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < give_up, "it did not happen in time"
        time.sleep(0.1)
