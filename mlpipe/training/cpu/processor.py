"""What the processor is, and what it can."""

from __future__ import annotations

import torch


def cpu_name() -> str:
    """As the processor calls itself; CPU where it does not say."""
    return str(torch.cpu.get_capabilities().get("cpu_name", "CPU"))


def cpu_computes_bfloat16() -> bool:
    """Whether in hardware; elsewhere it is slower than float32, some products of matrices twenty times."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
