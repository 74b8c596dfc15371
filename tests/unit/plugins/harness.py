"""Drives a real GpuExecutor with its real worker processes; run as a script, in an interpreter of its own.

Only `BaseExecutor.run_workload` is replaced: below it Airflow's supervisor needs an API server and a database, above it
everything is the code that runs in production. In place of a task it does what `executor_config` says and writes down
the environment, the process and the times. It is replaced when this file is loaded, for spawned workers load it too.

Importing Airflow takes seconds, so this runs as a server: each line on its input asks for a script, which a fork of it
runs with the names below; the script leaves what it found in `result`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from airflow.executors.base_executor import BaseExecutor
from airflow.executors.workloads import ExecuteCallback, ExecuteTask
from airflow.executors.workloads.base import BundleInfo
from airflow.executors.workloads.callback import CallbackDTO, CallbackFetchMethod
from airflow.executors.workloads.task import TaskInstanceDTO

VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY")


class CannotBeRebuiltError(Exception):
    """Pickles, but does not unpickle: its constructor takes other arguments than it passes on."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def records_path() -> Path:
    return Path(os.environ["HARNESS_RECORDS"])


def record(**values: Any) -> None:
    with records_path().open("a") as file:  # one short write with O_APPEND: lines of several processes do not mix
        file.write(json.dumps(values) + "\n")


def records(event: str) -> list[dict[str, Any]]:
    lines = records_path().read_text().splitlines() if records_path().exists() else []
    return [line for line in map(json.loads, lines) if line["event"] == event]


def pretend_to_run(workload: Any, **_: Any) -> int:
    config = (workload.ti.executor_config or {}) if isinstance(workload, ExecuteTask) else {}
    name = workload.ti.task_id if isinstance(workload, ExecuteTask) else type(workload).__name__
    child = None
    if config.get("child"):  # as Airflow starts a task: in a process group of its own
        child = subprocess.Popen(["/bin/sleep", "60"], process_group=0)
    record(
        event="start",
        name=name,
        time=time.monotonic(),
        worker=os.getpid(),
        child=child and child.pid,
        environment={variable: os.environ.get(variable) for variable in VARIABLES},
    )
    time.sleep(config.get("seconds", 0.2))
    if "raise" in config:
        raise (
            CannotBeRebuiltError("it", "failed")
            if config["raise"] == "CannotBeRebuiltError"
            else RuntimeError("it failed")
        )
    record(event="end", name=name, time=time.monotonic())
    return 0


BaseExecutor.run_workload = staticmethod(pretend_to_run)  # type: ignore[method-assign]


def task(name: str, priority: int = 1, **config: Any) -> ExecuteTask:
    ti = TaskInstanceDTO(
        id=uuid.uuid4(),
        task_id=name,
        dag_id="dag",
        run_id="run",
        try_number=1,
        dag_version_id=uuid.uuid4(),
        pool_slots=1,
        priority_weight=priority,
        executor_config=config,
    )
    return ExecuteTask(
        ti=ti, token="", dag_rel_path=Path("dag.py"), bundle_info=BundleInfo(name="dags-folder"), log_path=None
    )


def callback() -> ExecuteCallback:
    dto = CallbackDTO(id=str(uuid.uuid4()), fetch_method=CallbackFetchMethod.IMPORT_PATH, data={"path": "a.b"})
    bundle = BundleInfo(name="dags-folder")
    return ExecuteCallback(callback=dto, token="", dag_rel_path=Path("dag.py"), bundle_info=bundle, log_path=None)


class Scheduler:
    """As much of the scheduler as an executor sees: it queues, beats and reads events."""

    def __init__(self) -> None:
        from gpu_executor import GpuExecutor

        self.executor = GpuExecutor()
        self.executor.start()
        self.events: dict[str, list[str]] = {}
        self.most_running = 0

    def queue(self, *workloads: Any) -> None:
        for workload in workloads:
            self.executor.queue_workload(workload, session=None)  # type: ignore[arg-type]

    def beat(self) -> None:
        self.executor.heartbeat()
        self.most_running = max(self.most_running, len(self.executor.running))
        for key, (state, info) in self.executor.get_event_buffer().items():
            name = getattr(key, "task_id", type(key).__name__)
            self.events.setdefault(name, []).append(f"{state.value}: {info}" if info else state.value)

    def beat_until(self, condition: Callable[[], bool], timeout: float = 30) -> None:
        give_up = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > give_up:
                raise TimeoutError(f"events {self.events}, running {self.executor.running}")
            self.beat()
            time.sleep(0.05)

    def beat_until_done(self, timeout: float = 30) -> None:
        """Until nothing waits or runs."""
        self.beat_until(lambda: not self.executor.slots_occupied, timeout)
        self.beat()

    def result(self) -> dict[str, Any]:
        return {
            "starts": records("start"),
            "ends": records("end"),
            "events": self.events,
            "most_running": self.most_running,
            "parallelism": self.executor.parallelism,
        }


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def run(request: dict[str, Any]) -> None:
    """In a fork of the server: run a script; its result goes to a file, as do its output and log."""
    with Path(request["log"]).open("a") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    os.environ.update(request["environment"])
    names = dict(globals())
    exec(request["script"], names)  # noqa: S102 - the test's own text
    Path(request["result"]).write_text(json.dumps(names["result"]))


def serve() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(json.loads(line))
            return  # the interpreter ends as it would elsewhere: it waits for the processes of multiprocessing
        print(pid, flush=True)  # noqa: T201
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)  # noqa: T201


if __name__ == "__main__":
    serve()
