"""One real stack for all integration and browser tests of a session. A test that breaks it mends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests

from mlpipe.airflow_api import log_in
from mlpipe.stack.local import StackSettings
from mlpipe.stack.temporary import running_stack

COMMIT = "0" * 40
"""As which the stack's code goes, so that a training is known again also where files are not committed."""


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackSettings]:
    """A running stack on free ports, with its state in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLPIPE_GIT_SHA", COMMIT)
        with running_stack(Path(tmp_path_factory.mktemp("stack"))) as settings:
            for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
                patch.setenv(name, settings.client_environment()[name])
            yield settings


@pytest.fixture(scope="session")
def environment(stack: StackSettings) -> dict[str, str]:
    """What a client of the stack needs, as environment variables of another process."""
    return stack.client_environment()


@pytest.fixture(scope="session")
def demo(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Result of one run with an empty form."""
    file = tmp_path_factory.mktemp("demo") / "result.json"
    command = [sys.executable, "-m", "mlpipe.cli", "run", "--json", str(file)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text()) | {"printed": done.stdout}


@pytest.fixture(scope="session")
def airflow_get(environment: dict[str, str]) -> Callable[[str], Any]:
    """Ask Airflow's API; takes the path after /api/v2."""
    return airflow_getter(environment)


def airflow_getter(environment: Mapping[str, str]) -> Callable[[str], Any]:
    """Log in with these variables; what asks Airflow's API for a path after /api/v2."""
    base = environment["MLPIPE_AIRFLOW_URL"]
    session = requests.Session()
    log_in(session, base, environment["MLPIPE_AIRFLOW_USER"], environment["MLPIPE_AIRFLOW_PASSWORD"]).raise_for_status()

    def get(path: str) -> Any:
        answer = session.get(f"{base}/api/v2{path}", timeout=30)
        answer.raise_for_status()
        return answer.json()

    return get


def strangers_champion(environment: Mapping[str, str], home: Path) -> dict[str, Any]:
    """Load the champion of the digits where mlpipe cannot be imported; its `accuracy` and the `columns` it answers.

    Args:
        environment: MLflow's address, and its login where it has one.
        home: an empty folder.
    """
    script = """
import json, sys
sys.modules["mlpipe"] = None
import mlflow, numpy as np
from sklearn.datasets import load_digits
digits = load_digits()
images = np.round(digits.images[:300] / 16 * 255).astype(np.uint8)[..., None]  # (300, 8, 8, 1)
answer = mlflow.pyfunc.load_model("models:/digits-classifier@champion").predict(images)
accuracy = (answer["label"] == digits.target[:300].astype(str)).mean()
print(json.dumps({"accuracy": accuracy, "columns": list(answer.columns)}))
"""
    variables = {name: value for name, value in environment.items() if name.startswith("MLFLOW_TRACKING_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PATH": os.environ["PATH"], "HOME": str(home), "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"} | variables,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
