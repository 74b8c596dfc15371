"""A stack for as long as a block of code runs: for tests and measurements."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mlpipe.stack.lifecycle import down, up
from mlpipe.stack.local import StackSettings
from mlpipe.stack.ports import free_block


@contextlib.contextmanager
def running_stack(home: Path, timeout: float = 240.0) -> Iterator[StackSettings]:
    """Start a stack of its own on free ports, and stop it at the end; its state stays in `home`.

    Raises:
        UserError: it did not start.
        RuntimeError: at the end processes are left.
    """
    airflow_port, mlflow_port, s3_port, _ = free_block(3)
    settings = StackSettings.load(home, airflow_port=airflow_port, mlflow_port=mlflow_port, s3_port=s3_port)
    try:
        settings, _ = up(settings, lambda *_: None, timeout)
        yield settings
    finally:
        if left := down(settings):
            raise RuntimeError(f"processes {left} could not be stopped")
