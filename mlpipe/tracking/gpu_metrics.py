"""System metrics of the devices that a task may use; MLflow logs those of all devices of the machine."""

from __future__ import annotations

import os
from typing import Any

import pynvml
from mlflow.system_metrics import system_metrics_monitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor


class VisibleDevicesMonitor(GPUMonitor):
    """Watches the devices and MIG instances in CUDA_VISIBLE_DEVICES, which metrics number from 0 as CUDA does.

    What follows an unknown entry is not watched, as CUDA does not use it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            return
        self.gpu_handles = []
        for entry in filter(None, (part.strip() for part in visible.split(","))):
            try:
                self.gpu_handles.append(_handle(entry))
            except pynvml.NVMLError:
                break
        self.num_gpus = len(self.gpu_handles)


def watch_visible_devices() -> None:
    """From the next run on."""
    system_metrics_monitor.GPUMonitor = VisibleDevicesMonitor  # type: ignore[misc]


def _handle(entry: str) -> Any:
    if entry.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(entry))
    return pynvml.nvmlDeviceGetHandleByUUID(entry)
