"""Saving a checkpoint where this machine's disk has no room for it."""

from __future__ import annotations

import errno
import resource
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mlpipe.errors import ServiceUnavailableError
from mlpipe.services import services_named
from mlpipe.training.checkpoints import CheckpointStore

STATE = {"weights": torch.zeros(2**18), "history": [1.0]}


def test_a_full_disk_is_named(store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "last.pt").symlink_to("/dev/full")
    monkeypatch.setattr("tempfile.TemporaryDirectory", lambda **_: nullcontext(tmp_path))
    with (
        pytest.raises(ServiceUnavailableError, match=r"no space is left for .*last\.pt; .*make room"),
        services_named(),
    ):
        CheckpointStore(store, "run").save(STATE)


@pytest.mark.parametrize("room", [0, 4096, 2**20])
def test_a_disk_that_fills_up_while_it_is_written(room: int, store) -> None:
    checkpoints = CheckpointStore(store, "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match=r"last\.pt") as caught:
            checkpoints.save(STATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert checkpoints.load() is None
