"""What a slot is: a device of its own, or a share of the CPU, as environment variables; and how devices are counted.

Devices are counted with `nvidia-smi`, never with torch: the scheduler forks its workers, and CUDA does not survive a
fork. Only the standard library is imported.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

log = logging.getLogger(__name__)

NVIDIA_SMI = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
NVIDIA_SMI_TIMEOUT_SECONDS = 30
DEVICE_LINE = re.compile(r"\s*(\d+)\s*,\s*(GPU-[\w-]+)\s*")
HIDE_ALL = frozenset({"", "-1", "NoDevFiles"})
"""Values of CUDA_VISIBLE_DEVICES by which a user hides every device."""


@dataclass(frozen=True)
class Slot:
    """Room for one task at a time."""

    device: str | None
    """As CUDA_VISIBLE_DEVICES names it: a UUID or an index. `None`: the task runs on the CPU."""
    num_threads: int
    """Threads of the numerical libraries: this slot's share of the cores."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables that confine a task to this slot; they must be set before torch or numpy are imported."""
        threads = str(self.num_threads)
        return {
            "CUDA_VISIBLE_DEVICES": self.device or "",
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            # Threads that wait by spinning take the cores from the tasks beside them: three trainings of two threads
            # each on two cores did 240 images/s together spinning, 2,430 sleeping.
            "OMP_WAIT_POLICY": "PASSIVE",
        }


def make_slots(devices: list[str], slots_per_device: int, cpu_slots: int, num_threads: int) -> list[Slot]:
    """`slots_per_device` slots on each device, or `cpu_slots` slots where there is none.

    `num_threads` 0 shares this process's cores equally between the slots, at least one thread each. The share does
    not depend on how many slots are busy, so that a repeated run adds its floating-point numbers in the same order.
    """
    leased: list[str | None] = [*devices] * slots_per_device if devices else [None] * cpu_slots
    threads = num_threads or max(1, available_cores() // len(leased))
    return [Slot(device, threads) for device in leased]


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_devices(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Names of the devices that this process may use, each fit to be a value of CUDA_VISIBLE_DEVICES.

    A CUDA_VISIBLE_DEVICES that is already set limits the devices and keeps its spelling; as in CUDA, what follows an
    unknown entry is ignored. MIG instances are used if they are listed there (`MIG-<uuid>,…`), each as a device.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in HIDE_ALL:
        return []
    installed = _query_devices()
    if visible is None:
        return list(installed.values())
    devices: dict[str, str] = {}
    for entry in (part.strip() for part in visible.split(",")):
        identity = _identify(entry, installed)
        if identity is None:
            log.warning("CUDA_VISIBLE_DEVICES: no device %r; it and the entries after it are ignored", entry)
            break
        devices.setdefault(identity, entry)
    return list(devices.values())


def _identify(entry: str, installed: dict[str, str]) -> str | None:
    """The UUID that an entry of CUDA_VISIBLE_DEVICES means, or `None` if there is no such device."""
    if entry in installed:
        return installed[entry]
    if entry.startswith("MIG-"):
        return entry if installed else None
    matches = [uuid for uuid in installed.values() if entry.startswith("GPU-") and uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _query_devices() -> dict[str, str]:
    """UUIDs by index, as `nvidia-smi` lists them; what cannot be read is left out with a warning."""
    try:
        done = subprocess.run(
            NVIDIA_SMI, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_SECONDS, check=False
        )
    except FileNotFoundError:
        return {}
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("nvidia-smi did not answer, so no GPU is used: %s", error)
        return {}
    if done.returncode != 0:
        log.warning("nvidia-smi failed (exit %d), so no GPU is used: %s", done.returncode, _first_line(done))
        return {}
    devices = {}
    for line in done.stdout.splitlines():
        if match := DEVICE_LINE.fullmatch(line):
            devices[match[1]] = match[2]
        elif line.strip():
            log.warning("nvidia-smi: %r is not 'index, UUID', so no device is read from it", line[:200])
    return devices


def _first_line(done: subprocess.CompletedProcess[str]) -> str:
    return next(iter((done.stderr or done.stdout).strip().splitlines()), "no output")[:200]
