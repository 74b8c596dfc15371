"""One stack for all faults, and the table that they fill.

With MLPIPE_RELIABILITY_TABLE=docs/reliability.md the table is written there at the end, if every row was reached.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlpipe.stack.local import StackSettings
from tests.faults.lab import Lab, Table

EPOCHS = 16
"""Enough that a poll sees the training at work, and few enough to be done in seconds at this size."""
IMAGE_SIZE = 16
MISSING_WEIGHTS = "file:///nowhere/weights.safetensors"

HEADER = """# What happens when things break

The rows are written by the tests marked `faults` as they run (`make test-faults`): real processes of the local stack,
killed or taken away while a DAG run on real digits is in the named stage. “Whole” means: the DAG run ends in success
with one MLflow parent run, one run for the data and for each model, all of them finished; one registered version for
each model; no metric step written twice or missing; no checkpoint left behind.

| Fault | During | What happened |
| --- | --- | --- |
"""


@pytest.fixture(scope="session")
def table() -> Iterator[Table]:
    table = Table()
    yield table
    if path := os.environ.get("MLPIPE_RELIABILITY_TABLE"):
        rows = "".join(f"| {' | '.join(row)} |\n" for row in table.rows)
        machine = f"{os.cpu_count()} processors, {platform.system()}, Python {platform.python_version()}"
        Path(path).write_text(f"{HEADER}{rows}\nMachine: {machine}, shared with other work; times are upper bounds.\n")


@pytest.fixture(scope="session")
def lab(stack: StackSettings) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # of these tests' own questions
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        patch.setenv("MLFLOW_TRACKING_URI", stack.mlflow_url)
        yield Lab(stack)


@pytest.fixture(scope="session")
def unbroken(lab: Lab) -> str:
    """A DAG run that nothing disturbs, but one of its three models has no weights to start from."""
    models = f"custom_cnn,logistic_regression,resnet18={MISSING_WEIGHTS}"
    run_id = lab.start(models=models, epochs=EPOCHS, image_size=IMAGE_SIZE)
    lab.wait(run_id)
    return run_id
