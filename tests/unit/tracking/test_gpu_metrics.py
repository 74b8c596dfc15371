"""Which devices MLflow's system metrics watch. NVIDIA's library is replaced: tests run without a device."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from mlpipe.tracking.gpu_metrics import watch_visible_devices

DEVICES = {"GPU-a": 10, "GPU-b": 20, "GPU-c": 30}
"""Per cent of memory in use, by UUID."""


@pytest.fixture
def three_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_uuid(uuid: str) -> str:
        if uuid not in DEVICES:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(DEVICES))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: list(DEVICES)[index])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", by_uuid)
    memory = {uuid: SimpleNamespace(used=used, total=100) for uuid, used in DEVICES.items()}
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", memory.__getitem__)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda _: SimpleNamespace(gpu=50))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lambda _: 1000)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetEnforcedPowerLimit", lambda _: 2000)


@pytest.mark.usefixtures("three_devices")
@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("GPU-b", [20]),
        ("2,GPU-a", [30, 10]),
        ("GPU-b,GPU-x,GPU-a", [20]),
        ("", []),
        (None, [10, 20, 30]),
    ],
    ids=["leased", "two", "unknown", "none", "unset"],
)
def test_only_visible_devices_are_watched(
    visible: str | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    watch_visible_devices()
    metrics = SystemMetricsMonitor("run").collect_metrics()
    used = {name: values[0] for name, values in metrics.items() if name.endswith("memory_usage_percentage")}
    used.pop("system_memory_usage_percentage", None)
    assert used == {f"gpu_{number}_memory_usage_percentage": value for number, value in enumerate(expected)}
