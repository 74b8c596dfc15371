"""One stack for all faults, and the table that they fill.

With MLPIPE_RELIABILITY_TABLE=docs/reliability.md the table is written there at the end, if every row was reached.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from mlpipe.stack.local import StackSettings
from tests.faults.lab import Lab, Table, pack_digits

EPOCHS = 16
"""Enough that a poll sees the training at work, and few enough to be done in seconds at this size."""
IMAGE_SIZE = 16
MISSING_WEIGHTS = "file:///nowhere/weights.safetensors"

NUM_ROWS = 26
"""Of the table, when all tests have passed."""

HEADER = """# What happens when things break

`make test-faults` runs the tests marked `faults`, which write this table. In the two rows about a full disk, a test
calls a stage's writing function as the stage does, on a real SeaweedFS with a disk of 100 MB. All other rows are DAG
runs on the digits data set in the local stack; each fault happens while the named stage's own code runs. “Complete”
means: the DAG run succeeds; it has one MLflow parent run, one run for the data and one for each model, all finished;
each model has one registered version; no metric step is missing or written twice; no checkpoint remains.

| Fault | During | What happened |
| --- | --- | --- |
"""


SOAK = """
Memory of each component over hundreds of DAG runs: [a soak](../benchmarks/RESULTS.md).
"""


@pytest.fixture(scope="session")
def table() -> Iterator[Table]:
    table = Table()
    yield table
    if path := os.environ.get("MLPIPE_RELIABILITY_TABLE"):
        if len(table.rows) != NUM_ROWS:
            pytest.fail(f"{path} stays as it was: {len(table.rows)} of its {NUM_ROWS} rows were reached")
        rows = "".join(f"| {' | '.join(row)} |\n" for row in table.rows)
        machine = f"{os.cpu_count()} processors, {platform.system()}, Python {platform.python_version()}"
        Path(path).write_text(f"{HEADER}{rows}\nOne run of all tests on {date.today()}: {machine}.\n{SOAK}")


@pytest.fixture(scope="session")
def lab(stack: StackSettings) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # of these tests' own questions
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        for name, value in stack.client_environment().items():
            if name.startswith("MLFLOW_TRACKING_"):
                patch.setenv(name, value)
        yield Lab(stack)


@pytest.fixture(scope="session")
def unbroken(lab: Lab) -> str:
    """A DAG run that nothing disturbs, but one of its three models has no weights to start from."""
    models = f"custom_cnn,logistic_regression,resnet18={MISSING_WEIGHTS}"
    run_id = lab.start(models=models, epochs=EPOCHS, image_size=IMAGE_SIZE)
    lab.wait(run_id)
    return run_id


@pytest.fixture(scope="session")
def slow_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many digits as the data set of that name has, and large ones: some five seconds of decoding on one core."""
    return pack_digits(tmp_path_factory.mktemp("slow") / "digits.zip", 1797, num_large=200)
