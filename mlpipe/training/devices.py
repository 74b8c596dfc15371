"""Several devices that train one network together, each with a process of its own.

The process that was asked to train is the first of them, and alone has the run, the checkpoints and the decisions. It
starts the others (`mlpipe.training.follower`), which find what they need in a folder, and ends them. They exchange
gradients by gloo or NCCL, over the loopback interface.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from mlpipe.errors import UserError
from mlpipe.training.epochs import CheckpointCallback
from mlpipe.training.fitting import Fit, run_trainer

logger = logging.getLogger(__name__)

FIT_FILE, CODE_FILE, RESUMED_FILE = "fit.pt", "code.txt", "resumed.pt"
"""What a process is given, in the folder of the training."""

START_SECONDS = 300.0
"""Within which the processes must have started."""
END_SECONDS = 60.0
"""Within which they must have ended after the last epoch."""
NOTICE_SECONDS = 5.0
"""How long after an exchange has failed the process that caused it may take to be gone."""
EXCHANGE_TIMEOUT = timedelta(minutes=30)
"""A process waits so long for another. Above what the first may wait for MLflow or object storage between epochs."""


def check_devices(num_devices: int, *, batch_size: int, num_training: int, num_validation: int) -> None:
    """
    Raises:
        UserError: there are fewer devices, or too few images for each of them.
    """
    if num_devices == 1:
        return
    visible = torch.cuda.device_count() if torch.cuda.is_available() else num_devices
    if num_devices > visible:
        raise UserError(
            f"devices: {num_devices} is not allowed where a task sees {visible} (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); give 1 to {visible}, or run it where one task "
            "sees more GPUs"
        )
    allowed = min(min(batch_size, num_training) // 2, num_validation)
    if num_devices > allowed:
        raise UserError(
            f"devices: {num_devices} is not allowed with batches of {batch_size}, {num_training} training and "
            f"{num_validation} validation images, since each device needs 2 images of every batch; "
            f"give 1 to {max(1, allowed)}, or a larger batch_size"
        )


def fit_together(fit: Fit, keeper: CheckpointCallback) -> None:
    """Train on the `num_devices` of the settings; this process is the first.

    Raises:
        RuntimeError: another process has died. None is left behind, whatever happens.
    """
    num_devices = fit.module.train_config.num_devices
    with tempfile.TemporaryDirectory(prefix="mlpipe-devices-") as name, _threads(fit.num_threads), _loopback():
        folder = Path(name)
        torch.save(fit, folder / FIT_FILE)
        (folder / CODE_FILE).write_text(fit.code, encoding="utf-8")
        if keeper.resumed is not None:
            torch.save(keeper.resumed, folder / RESUMED_FILE)
        followers = _Followers(folder, num_devices)
        try:
            store = rendezvous(folder, num_devices)
            followers.wait_until_ready(store)
            with process_group(store, 0, num_devices), followers.watched():
                run_trainer(fit, keeper)
            followers.wait_until_ended()
        except (UserError, ConnectionError):
            raise
        except Exception as error:
            followers.raise_if_dead(error)
            raise
        finally:
            followers.kill()


def rendezvous(folder: Path, num_devices: int) -> distributed.Store:
    """Where the processes find each other: a file, which nobody else can write to, unlike a port."""
    return distributed.FileStore(str(folder / "rendezvous"), num_devices)


def ready_key(rank: int) -> str:
    """What a process sets in the store when only the meeting is left to do."""
    return f"ready {rank}"


@contextmanager
def process_group(store: distributed.Store, rank: int, num_devices: int) -> Iterator[None]:
    """Be one of the processes that exchange gradients."""
    device = torch.device("cuda", rank) if torch.cuda.is_available() else None
    if device is not None:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "gloo" if device is None else "nccl",
        store=store,
        rank=rank,
        world_size=num_devices,
        timeout=EXCHANGE_TIMEOUT,
        device_id=device,
    )
    try:
        yield
    finally:
        if distributed.is_initialized():  # not where it was aborted
            distributed.destroy_process_group()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _loopback() -> Iterator[None]:
    """Let gloo and NCCL listen on the loopback interface alone, in the processes started meanwhile too."""
    name = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    added = (
        [] if name is None else [key for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if key not in os.environ]
    )
    os.environ.update(dict.fromkeys(added, str(name)))
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


class _Followers:
    """The other processes."""

    def __init__(self, folder: Path, num_devices: int) -> None:
        self._logs = {rank: folder / f"{rank}.log" for rank in range(1, num_devices)}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        for rank, log in self._logs.items():
            with log.open("wb") as output:
                self._processes[rank] = subprocess.Popen(
                    # -P: nothing in the working directory hides a library.
                    [sys.executable, "-P", "-m", "mlpipe.training.follower", str(folder), str(rank)],
                    stdin=subprocess.PIPE,  # by its end they see that this process is gone
                    stdout=output,
                    stderr=output,
                )

    def wait_until_ready(self, store: distributed.Store) -> None:
        """
        Raises:
            RuntimeError: one has ended, or they take too long.
        """
        deadline = time.monotonic() + START_SECONDS
        while not store.check([ready_key(rank) for rank in self._processes]):
            if any(process.poll() is not None for process in self._processes.values()):
                raise RuntimeError("a process of this training has ended before it began")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the processes of this training have not started within {START_SECONDS:.0f} s")
            time.sleep(0.05)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """On GPUs, end the exchange when a process is gone: NCCL would wait for it; gloo sees its connection close."""
        group = distributed.group.WORLD
        if not torch.cuda.is_available() or group is None:
            yield
            return
        over = threading.Event()

        def watch() -> None:
            while not over.wait(1.0):
                if self._dead():
                    group.abort()
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def wait_until_ended(self) -> None:
        """All epochs are done; what may still go wrong in another process changes nothing."""
        for rank, process in self._processes.items():
            try:
                code = process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                logger.warning("the process of device %d does not end by itself and is killed", rank)
            else:
                if code:
                    logger.warning("the process of device %d ended with %s: %s", rank, code, self._last_words(rank))

    def raise_if_dead(self, cause: Exception) -> None:
        """
        Raises:
            RuntimeError: one has ended of itself, which says more than the exchange that failed by it.
        """
        deadline = time.monotonic() + NOTICE_SECONDS
        while not (dead := self._dead()) and time.monotonic() < deadline:
            time.sleep(0.05)
        if dead:
            for rank in dead:
                logger.error("output of the process of device %d: %s", rank, self._logs[rank].read_text()[-4000:])
            rank, code = min(dead.items(), key=lambda item: item[1])  # killed by a signal before others
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise RuntimeError(
                f"the process of device {rank} of {1 + len(self._processes)} {how}: {self._last_words(rank)}"
            ) from cause

    def _dead(self) -> dict[int, int]:
        codes = {rank: process.poll() for rank, process in self._processes.items()}
        return {rank: code for rank, code in codes.items() if code}

    def _last_words(self, rank: int) -> str:
        lines = self._logs[rank].read_text(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it has said nothing")

    def kill(self) -> None:
        """They hold nothing that could be lost."""
        for process in self._processes.values():
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
