"""How devices are counted and what a slot tells its task."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .conftest import PLUGINS

NvidiaSmi = Callable[..., Path]


@pytest.fixture
def gpu_slots(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PLUGINS))
    import gpu_slots

    return gpu_slots


@pytest.fixture
def on_path(nvidia_smi: NvidiaSmi, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make `nvidia-smi` print these lines."""

    def install(*lines: str, **options: Any) -> None:
        monkeypatch.setenv("PATH", f"{nvidia_smi(*lines, **options)}:/usr/bin:/bin")

    return install


def test_every_device_is_named_by_its_uuid(gpu_slots: ModuleType, on_path: Callable[..., None]) -> None:
    on_path("0, GPU-6f3c0a2e-0000-4c5b-9d1e-1f2e3d4c5b6a", "1, GPU-a1")
    assert gpu_slots.find_devices({}) == ["GPU-6f3c0a2e-0000-4c5b-9d1e-1f2e3d4c5b6a", "GPU-a1"]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1,0", ["1", "0"]),
        ("GPU-b", ["GPU-b"]),
        ("0,0, GPU-aa", ["0"]),
        ("0,7,1", ["0"]),
        ("GPU-", []),
        ("MIG-x,MIG-y", ["MIG-x", "MIG-y"]),
        ("", []),
        ("-1", []),
    ],
)
def test_visible_devices_limit_the_scheduler(
    gpu_slots: ModuleType, on_path: Callable[..., None], visible: str, expected: list[str]
) -> None:
    on_path("0, GPU-aa", "1, GPU-bb")
    assert gpu_slots.find_devices({"CUDA_VISIBLE_DEVICES": visible}) == expected


def test_an_unknown_visible_device_is_named(
    gpu_slots: ModuleType, on_path: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    on_path("0, GPU-aa")
    gpu_slots.find_devices({"CUDA_VISIBLE_DEVICES": "0,5"})
    assert "no device '5'" in caplog.text


def test_without_nvidia_smi_there_is_no_device_and_no_warning(
    gpu_slots: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_slots.find_devices({}) == []
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("lines", "options", "expected", "warning"),
    [
        (["NVIDIA-SMI has failed"], {}, [], "'NVIDIA-SMI has failed' is not 'index, UUID'"),
        (["GPU-aa", "0; GPU-bb", "zero, GPU-cc"], {}, [], "'0; GPU-bb' is not"),
        (["Unable to determine the device handle: GPU is lost", "1, GPU-bb"], {}, ["GPU-bb"], "GPU is lost"),
        (["0, GPU-aa"], {"exit_code": 9, "error": "driver not loaded"}, [], "exit 9), so no GPU is used: driver not"),
        ([], {}, [], None),
    ],
)
def test_what_cannot_be_read_is_left_out_with_a_warning(
    gpu_slots: ModuleType,
    on_path: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    lines: list[str],
    options: dict[str, Any],
    expected: list[str],
    warning: str | None,
) -> None:
    on_path(*lines, **options)
    assert gpu_slots.find_devices({}) == expected
    assert warning in caplog.text if warning else not caplog.records


def test_an_nvidia_smi_that_hangs_is_given_up(
    gpu_slots: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexec sleep 30\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(gpu_slots, "NVIDIA_SMI_TIMEOUT_SECONDS", 0.2)
    assert gpu_slots.find_devices({}) == []
    assert "did not answer" in caplog.text


def test_slots_share_the_cores(gpu_slots: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_slots, "available_cores", lambda: 16)
    on_cpu = gpu_slots.make_slots([], slots_per_device=9, cpu_slots=3, num_threads=0)
    assert [(slot.device, slot.num_threads) for slot in on_cpu] == [(None, 5)] * 3
    on_gpus = gpu_slots.make_slots(["GPU-a", "GPU-b"], slots_per_device=2, cpu_slots=9, num_threads=0)
    assert [(slot.device, slot.num_threads) for slot in on_gpus] == [("GPU-a", 4), ("GPU-b", 4)] * 2


def test_a_slot_has_at_least_one_thread_and_a_setting_goes_first(
    gpu_slots: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_slots, "available_cores", lambda: 2)
    assert [slot.num_threads for slot in gpu_slots.make_slots([], 1, cpu_slots=3, num_threads=0)] == [1, 1, 1]
    assert [slot.num_threads for slot in gpu_slots.make_slots([], 1, cpu_slots=3, num_threads=2)] == [2, 2, 2]


def test_a_cpu_slot_hides_every_device(gpu_slots: ModuleType) -> None:
    environment = gpu_slots.Slot(device=None, num_threads=4).environment
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert {environment[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")} == {"4"}
