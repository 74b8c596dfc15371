"""A private Airflow for each test session: settings are read at import, so its code runs in fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RunPython = Callable[..., str]


@pytest.fixture(scope="session")
def airflow_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of an Airflow of its own, on SQLite, with an empty database."""
    home = tmp_path_factory.mktemp("airflow")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "MLFLOW", "MLPIPE"))}
    environment = clean | {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(home / "plugins"),  # entry points name this project's
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "PYTHONPATH": str(ROOT / "dags"),  # as Airflow does for the folder of its DAGs
        "AIRFLOW__CORE__UNIT_TEST_MODE": "false",
    }
    subprocess.run(
        [sys.executable, "-m", "airflow", "db", "migrate"],
        env=environment,
        check=True,
        capture_output=True,
        timeout=240,
    )
    return environment


@pytest.fixture
def run_python(airflow_environment: dict[str, str]) -> RunPython:
    """Run a script in a fresh interpreter with that Airflow; returns what it prints."""

    def run(script: str, timeout: int = 120, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=airflow_environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    return run
