"""The processes that train one network together, as each of them sees the others; alone where there is no group."""

from __future__ import annotations

import torch
from torch import distributed


def rank() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def as_the_first(decision: bool, device: torch.device) -> bool:
    """What the first process has decided, in each of them; all must call it."""
    if size() == 1:
        return decision
    flag = torch.tensor(int(decision), device=device)
    distributed.broadcast(flag, src=0)
    return bool(flag)
