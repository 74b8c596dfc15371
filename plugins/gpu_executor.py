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

LocalExecutor hands every queued task to its processes at once. This one keeps count: a workload leaves the queue when a
slot is free, and `slots_available` tells the scheduler how many more may be queued at all, so that waiting tasks stay
`scheduled`. Neither their token nor `[scheduler] task_queued_timeout` runs. An Airflow pool adds a limit across several
schedulers and a place to see who waits; give it at least as many slots as there are here.

Each slot has a worker process of its own with queues of its own. With shared ones a worker killed while it waits holds
the queue's lock for ever, and nothing tells which task died with it. A worker leads a session (setsid): if it is
killed, the tasks it left behind are killed too before its device is leased again; if the scheduler is killed, the
worker ends its session itself, so that the scheduler's successor finds the devices free.

Tasks are forks of their worker, and the workers of this executor and of LocalExecutor are forks of the scheduler: what
it has imported they have too. That saves each task the seconds that mlflow or scikit-learn take. It is done when this
executor is made, since the scheduler makes all of its executors before it starts the first. Nothing that touches CUDA
may be among the modules, for it does not outlive a fork.

One scheduler leases the devices of a machine. For two on one machine, divide them with CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress
from multiprocessing import SimpleQueue
from typing import TYPE_CHECKING, Any

import psutil
from airflow.exceptions import AirflowConfigException
from airflow.executors.local_executor import LocalExecutor, _run_worker
from gpu_slots import Slot, find_devices, make_slots

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.process import BaseProcess

    from airflow.executors.workloads import ExecutorWorkload
    from airflow.executors.workloads.types import WorkloadResultType

logger = logging.getLogger(__name__)

NOT_BEFORE_A_FORK = frozenset({"torch", "torchvision", "lightning", "mlpipe"})
"""CUDA, once touched, does not outlive a fork; code that is being worked on should be read anew by each task."""

PARENT_POLL_SECONDS = 1.0
TERMINATE_TIMEOUT_SECONDS = 10.0


class GpuExecutor(LocalExecutor):
    """LocalExecutor with exclusive leases of devices; see the module's text for its settings."""

    # The executors of two teams would run in one scheduler and lease the same devices twice.
    supports_multi_team = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._leases: list[_Lease] = []
        for name in self._modules_to_preload():
            importlib.import_module(name)

    def start(self) -> None:
        """Count the devices, open the slots and start their workers; `parallelism` becomes the number of slots.

        :raises AirflowConfigException: a setting is out of its range
        """
        slots = make_slots(
            find_devices(),
            slots_per_device=self._setting("slots_per_device", default=1, minimum=1),
            cpu_slots=self._setting("cpu_slots", default=3, minimum=1),
            num_threads=self._setting("threads_per_slot", default=0, minimum=0),
        )
        for slot in slots:
            logger.info("Slot on %s, threads: %d", slot.device or "the CPU", slot.num_threads)
        self.parallelism = len(slots)
        self._leases = [_Lease(slot) for slot in slots]
        self._spawn_workers_with_gc_freeze(len(slots))

    def _modules_to_preload(self) -> list[str]:
        names = [name.strip() for name in self.conf.get("gpu_executor", "preload", fallback="").split(",")]
        for name in names:
            if name.partition(".")[0] in NOT_BEFORE_A_FORK:
                raise AirflowConfigException(f"[gpu_executor] preload: {name} must be imported by each task itself")
        return [name for name in names if name]

    def _setting(self, key: str, default: int, minimum: int) -> int:
        value = self.conf.getint("gpu_executor", key, fallback=default)
        if value < minimum:
            raise AirflowConfigException(f"[gpu_executor] {key}: {value} is too small; give {minimum} or more")
        return value

    def _spawn_worker(self) -> None:
        """Start a worker for the first slot that has none."""
        lease = next(lease for lease in self._leases if lease.worker is None)
        lease.worker = multiprocessing.Process(
            target=_run_slot,
            kwargs={
                "environment": lease.slot.environment,
                "scheduler_pid": os.getpid(),
                "logger_name": logger.name,
                "input": lease.workloads,
                "output": lease.results,
                "unread_messages": lease.unread,
                "team_conf": self.conf,
            },
        )
        lease.worker.start()

    def trigger_connection_tests(self) -> None:
        """Run waiting connection tests in free slots.

        The stock method takes the waiting tests off the slots that are free for them: on one slot none would ever run.
        """
        if self.queued_connection_tests:
            self._process_workloads(list(self.queued_connection_tests.values()))

    def _process_workloads(self, workload_list: Sequence[ExecutorWorkload]) -> None:
        """Hand workloads to free slots, on the least busy device first; the others stay queued."""
        for workload in workload_list:
            free = [lease for lease in self._leases if lease.is_free()]
            if not free:
                break
            lease = min(free, key=self._num_tasks_beside)
            queues: tuple[dict[Any, Any], ...] = (
                self.queued_tasks,
                self.queued_callbacks,
                self.queued_connection_tests,
            )
            for queue in queues:
                queue.pop(workload.key, None)
            lease.hand_over(workload)
            logger.info("Leased %s to %s", lease.slot.device or "a CPU slot", workload.key)
        self._count_running()

    def _num_tasks_beside(self, lease: _Lease) -> int:
        return sum(other.workload is not None for other in self._leases if other.slot.device == lease.slot.device)

    def _count_running(self) -> None:
        """What the scheduler takes `slots_available` from; LocalExecutor leaves it empty."""
        self.running = {lease.workload.key for lease in self._leases if lease.workload}

    def _read_results(self) -> None:
        for lease in self._leases:
            self._read_results_of(lease)
        self._count_running()

    def _read_results_of(self, lease: _Lease) -> None:
        while lease.workload and not lease.results.empty():
            workload = lease.workload
            try:
                _, state, error = lease.results.get()
            except Exception as unreadable:
                # An exception whose class cannot be rebuilt from its arguments must not end the scheduler.
                logger.exception("Cannot read the result of %s", workload.key)
                state, error = workload.failure_state, unreadable
            if state == workload.running_state:
                self.running_state(workload.key)
            else:
                lease.workload = None
                self.change_state(workload.key, state, info=error)

    def _check_workers(self) -> None:
        for lease in self._leases:
            if lease.worker and not lease.worker.is_alive():
                self._return_lease(lease, lease.worker)
        self._count_running()

    def _return_lease(self, lease: _Lease, worker: BaseProcess) -> None:
        """Open a dead worker's slot again; its workload is reported failed, or handed over again if it never began."""
        if worker.pid and _kill_session(worker.pid):
            return  # What it left behind may hold the device until the next heartbeat.
        self._read_results_of(lease)
        logger.warning("Worker %s died (exit code %s); its slot opens again", worker.pid, worker.exitcode)
        workload, never_began = lease.workload, lease.has_unread_workload()
        lease.reopen()
        self._spawn_workers_with_gc_freeze(1)
        if workload and never_began:
            lease.hand_over(workload)
        elif workload:
            self.fail(workload.key, info=f"worker process {worker.pid} died")

    def end(self) -> None:
        """Let running workloads finish, then stop the workers; interrupted (a second signal), it terminates them."""
        logger.info("Shutting down; waiting for running tasks to finish. Signal again if you don't want to wait.")
        try:
            for lease in self._leases:
                lease.workloads.put(None)
            for lease in self._leases:
                if lease.worker:
                    lease.worker.join()
        finally:
            self.terminate()

    def terminate(self) -> None:
        """Kill the workers and whatever runs in their sessions; what they had not finished is reported failed."""
        workers = [lease.worker for lease in self._leases if lease.worker and lease.worker.pid]
        for worker in workers:
            worker.kill()
        give_up = time.monotonic() + TERMINATE_TIMEOUT_SECONDS
        while sum(_kill_session(worker.pid) for worker in workers if worker.pid) and time.monotonic() < give_up:
            time.sleep(0.05)
        for worker in workers:
            worker.join(TERMINATE_TIMEOUT_SECONDS)
        self._read_results()
        for lease in self._leases:
            if lease.workload:
                self.fail(lease.workload.key, info="the executor was shut down")
            lease.close()
        self._leases = []
        self._count_running()


class _Lease:
    """A slot, its worker process and the workload that holds it now."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self._open()

    def _open(self) -> None:
        self.worker: BaseProcess | None = None
        self.workload: ExecutorWorkload | None = None
        self.workloads: SimpleQueue[ExecutorWorkload | None] = SimpleQueue()
        self.results: SimpleQueue[WorkloadResultType] = SimpleQueue()
        self.unread = multiprocessing.Value(ctypes.c_uint)

    def reopen(self) -> None:
        """Forget a dead worker, and its queues: it may have died with their locks."""
        self.close()
        self._open()

    def close(self) -> None:
        self.workloads.close()
        self.results.close()

    def is_free(self) -> bool:
        return self.workload is None and self.worker is not None and self.worker.is_alive()

    def hand_over(self, workload: ExecutorWorkload) -> None:
        self.workload = workload
        with self.unread:
            self.unread.value += 1
        self.workloads.put(workload)

    def has_unread_workload(self) -> bool:
        # Read past the lock, which a dead worker may hold.
        return bool(self.unread.get_obj().value)


def _run_slot(*, environment: dict[str, str], scheduler_pid: int, **worker: Any) -> None:
    """A worker's life: a session and an environment of its own, then Airflow's own worker loop.

    Tasks are forks of the worker: they inherit both. Airflow gives each task a process group, but not a session.
    """
    os.setsid()
    os.environ.update(environment)
    threading.Thread(target=_end_session_with, args=(scheduler_pid,), daemon=True).start()
    _run_worker(**worker)


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
