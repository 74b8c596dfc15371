"""The device of a training and its arithmetic."""

from __future__ import annotations

from typing import Literal

import torch

from mlpipe.training.cpu.processor import cpu_computes_bfloat16, cpu_name


def device_name() -> str:
    """Of the GPU where there is one, else of the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()


def choose_precision(wanted: Literal["auto", "32-true", "bf16-mixed"]) -> Literal["32-true", "bf16-mixed"]:
    """`auto` becomes bfloat16 where the processor computes with it in hardware."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        in_hardware = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        in_hardware = cpu_computes_bfloat16()
    return "bf16-mixed" if in_hardware else "32-true"
