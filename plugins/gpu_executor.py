"""An executor that leases one GPU, or one share of the CPU, to each task on this machine.

    [core]
    executor = LocalExecutor,gpu:gpu_executor.GpuExecutor

    [gpu_executor]
    slots_per_device = 1   # tasks that share one GPU; its memory is not divided between them
    cpu_slots = 3          # tasks at a time on a machine without a GPU
    threads_per_slot = 0   # threads of OpenMP, MKL and OpenBLAS in a task; 0: the slots share the cores equally
    preload =              # modules that the scheduler imports, comma-separated, so that its tasks need not;
                           # for its environment alone: the API server makes an executor, too, to read a log

Each also as an environment variable: AIRFLOW__GPU_EXECUTOR__SLOTS_PER_DEVICE, … A task asks for it by
`executor="gpu"` and sees its device as the only one (CUDA_VISIBLE_DEVICES). A lone task on the CPU gets the threads of
its slot, not all cores: where tasks mostly run alone, set `threads_per_slot` to the number of cores.

A workload leaves the queue when a slot is free, and `slots_available` tells the scheduler how many more may be queued
at all, so that waiting tasks stay `scheduled`. Neither their token nor `[scheduler] task_queued_timeout` runs. An
Airflow pool adds a limit across several schedulers and a place to see who waits; give it at least as many slots as
there are here.

Each workload has a worker process of its own, which leads a session (setsid) and calls `BaseExecutor.run_workload`. If
the worker is killed, the processes that it left behind are killed too before its device is leased again; if the
scheduler is killed, the worker ends its session itself, so that the scheduler's successor finds the devices free.

Workers are forks of the scheduler: what it has imported they have too. That saves each task the seconds that mlflow or
scikit-learn take. It is imported when this executor is made, since the scheduler makes all of its executors before it
starts the first: the workers of LocalExecutor profit as well. Nothing that touches CUDA may be among the modules, for
CUDA does not outlive a fork.

One scheduler leases the devices of a machine. For two on one machine, divide them with CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import gc
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
from airflow.exceptions import AirflowConfigException
from airflow.executors.base_executor import BaseExecutor
from gpu_slots import Slot, find_devices, make_slots

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from airflow.executors.workloads import ExecutorWorkload

logger = logging.getLogger(__name__)

NOT_BEFORE_A_FORK = frozenset({"torch", "torchvision", "lightning", "mlpipe"})
"""CUDA, once touched, does not outlive a fork; each task reads anew the code that is being worked on."""

PARENT_POLL_SECONDS = 1.0
TERMINATE_TIMEOUT_SECONDS = 10.0
MAX_REASON = 2000
"""Characters of an exception's text that the scheduler is told."""


class GpuExecutor(BaseExecutor):
    """An executor with exclusive leases of devices; see the module's text for its settings."""

    is_local = True
    serve_logs = True
    supports_callbacks = True
    # The executors of two teams would run in one scheduler and lease the same devices twice.
    supports_multi_team = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._slots: list[Slot] = []
        self._leases: dict[int, _Lease] = {}  # by position of the slot
        for name in self._modules_to_preload():
            importlib.import_module(name)

    def start(self) -> None:
        """Count the devices and open the slots; `parallelism` becomes the number of slots.

        :raises AirflowConfigException: a setting is out of its range
        """
        self._slots = make_slots(
            find_devices(),
            slots_per_device=self._setting("slots_per_device", default=1, minimum=1),
            cpu_slots=self._setting("cpu_slots", default=3, minimum=1),
            num_threads=self._setting("threads_per_slot", default=0, minimum=0),
        )
        for slot in self._slots:
            logger.info("Slot on %s, threads: %d", slot.device or "the CPU", slot.num_threads)
        self.parallelism = len(self._slots)

    def _modules_to_preload(self) -> list[str]:
        names = [name.strip() for name in (self.conf.get("gpu_executor", "preload", fallback="") or "").split(",")]
        for name in names:
            if name.partition(".")[0] in NOT_BEFORE_A_FORK:
                raise AirflowConfigException(f"[gpu_executor] preload: {name} must be imported by each task itself")
        return [name for name in names if name]

    def _setting(self, key: str, default: int, minimum: int) -> int:
        value: int = self.conf.getint("gpu_executor", key, fallback=default)
        if value < minimum:
            raise AirflowConfigException(f"[gpu_executor] {key}: {value} is too small; give {minimum} or more")
        return value

    def _process_workloads(self, workload_items: Sequence[ExecutorWorkload]) -> None:
        """Start workloads in free slots, on the least busy device first; the others stay queued."""
        for workload in workload_items:
            free = [position for position in range(len(self._slots)) if position not in self._leases]
            if not free:
                break
            position = min(free, key=self._num_tasks_beside)
            # Airflow 3.4 has one dictionary of queues in place of the three attributes.
            queues: Iterable[dict[Any, Any]] = (self.queued_tasks, self.queued_callbacks)
            for queue in getattr(self, "executor_queues", {}).values() or queues:
                queue.pop(workload.key, None)
            self._leases[position] = _start_worker(workload, self._slots[position])
            self.running.add(workload.key)
            if workload.running_state is not None:
                self.running_state(workload.key)
            logger.info("Leased %s to %s", self._slots[position].device or "a CPU slot", workload.key)

    def _num_tasks_beside(self, position: int) -> int:
        return sum(self._slots[other].device == self._slots[position].device for other in self._leases)

    def sync(self) -> None:
        """Report workloads that have ended, and return their leases."""
        for position, lease in list(self._leases.items()):
            if lease.worker.is_alive() or _kill_session(lease.pid):
                continue  # What a worker left behind may hold the device until the next heartbeat.
            del self._leases[position]
            lease.worker.join()
            if lease.worker.exitcode == 0:
                self.success(lease.workload.key)
                continue
            reason = lease.reason() or f"worker process {lease.pid} died (exit code {lease.worker.exitcode})"
            logger.warning("%s: %s", lease.workload.key, reason)
            self.fail(lease.workload.key, info=reason)

    def end(self) -> None:
        """Let running workloads finish; interrupted (a second signal), terminate them."""
        logger.info("Shutting down; waiting for running tasks to finish. Signal again if you don't want to wait.")
        try:
            for lease in self._leases.values():
                lease.worker.join()
            give_up = time.monotonic() + TERMINATE_TIMEOUT_SECONDS
            while self._leases and time.monotonic() < give_up:  # until what the workers left behind is gone
                self.sync()
        finally:
            self.terminate()

    def terminate(self) -> None:
        """Kill the workers and whatever runs in their sessions; their workloads are reported failed."""
        leases = list(self._leases.values())
        for lease in leases:
            lease.worker.kill()
        give_up = time.monotonic() + TERMINATE_TIMEOUT_SECONDS
        while sum(_kill_session(lease.pid) for lease in leases) and time.monotonic() < give_up:
            time.sleep(0.05)
        for lease in leases:
            lease.worker.join(TERMINATE_TIMEOUT_SECONDS)
            self.fail(lease.workload.key, info="the executor was shut down")
        self._leases.clear()


@dataclass(frozen=True)
class _Lease:
    """A workload and the worker process that runs it in a slot."""

    workload: ExecutorWorkload
    worker: BaseProcess
    pid: int
    reasons: Connection
    """Where the worker says why it failed."""

    def reason(self) -> str | None:
        """Why the workload failed; `None`: its worker could not say it."""
        with suppress(EOFError, OSError):
            if self.reasons.poll():
                return str(self.reasons.recv_bytes(), errors="replace")
        return None


def _start_worker(workload: ExecutorWorkload, slot: Slot) -> _Lease:
    reasons, reason = multiprocessing.Pipe(duplex=False)
    worker = multiprocessing.Process(target=_run, args=(workload, slot, os.getpid(), reason))
    gc.freeze()  # else the worker's first collection would copy the scheduler's memory
    try:
        worker.start()
    finally:
        gc.unfreeze()
    reason.close()
    return _Lease(workload, worker, int(worker.pid or 0), reasons)


def _run(workload: ExecutorWorkload, slot: Slot, scheduler_pid: int, reason: Connection) -> None:
    """A worker's life: a session and an environment of its own, then Airflow's supervisor of the workload.

    Tasks are forks of the worker: they inherit both. Airflow gives each task a process group, but not a session.
    """
    os.setsid()
    for each in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(each, signal.SIG_DFL)  # the scheduler's handlers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(slot.environment)
    threading.Thread(target=_end_session_with, args=(scheduler_pid,), daemon=True).start()
    try:
        BaseExecutor.run_workload(workload, subprocess_logs_to_stdout=True)
    except Exception as error:
        logger.exception("%s failed", workload.key)
        reason.send_bytes(str(error)[:MAX_REASON].encode())
        sys.exit(1)


def _end_session_with(scheduler_pid: int) -> None:
    """Wait for the scheduler's end, then kill this session."""
    with suppress(psutil.NoSuchProcess):
        scheduler = psutil.Process(scheduler_pid)
        while scheduler.is_running() and scheduler.status() != psutil.STATUS_ZOMBIE:
            time.sleep(PARENT_POLL_SECONDS)
    own_pid = os.getpid()
    while _kill_session(own_pid, spare=own_pid):
        time.sleep(0.05)
    os.kill(own_pid, signal.SIGKILL)


def _kill_session(session: int, spare: int | None = None) -> bool:
    """Send SIGKILL to each process of a session; whether there was one."""
    members = [pid for pid in psutil.pids() if pid != spare and _lives_in(session, pid)]
    for pid in members:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(members)


def _lives_in(session: int, pid: int) -> bool:
    with suppress(OSError, psutil.NoSuchProcess):
        return os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
