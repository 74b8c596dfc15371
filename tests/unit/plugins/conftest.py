"""A private Airflow and a machine with the devices that a test asks for. Airflow reads its settings at import, and an
executor forks: each scenario runs in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PLUGINS = ROOT / "plugins"
HARNESS = Path(__file__).with_name("harness.py")

NvidiaSmi = Callable[..., Path]
RunScenario = Callable[..., dict[str, Any]]
RunAirflow = Callable[..., str]

CREATE_DATABASE = "from airflow.utils import db, session\nwith session.create_session() as s: db.initdb(session=s)"


@pytest.fixture
def nvidia_smi(tmp_path: Path) -> NvidiaSmi:
    """Write a program `nvidia-smi` that prints these lines; returns its folder."""

    def write(*lines: str, exit_code: int = 0, error: str = "") -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "answer").write_text("".join(f"{line}\n" for line in lines))
        program = folder / "nvidia-smi"
        program.write_text(
            '#!/bin/sh\n[ "$*" = "--query-gpu=index,uuid --format=csv,noheader" ] || exit 64\n'
            f"cat {folder}/answer\necho '{error}' >&2\nexit {exit_code}\n"
        )
        program.chmod(0o755)
        return folder

    return write


@pytest.fixture
def two_gpus(nvidia_smi: NvidiaSmi) -> dict[str, str]:
    """Environment of a machine with the devices GPU-a and GPU-b."""
    return {"PATH": f"{nvidia_smi('0, GPU-a', '1, GPU-b')}:{os.environ['PATH']}"}


@pytest.fixture
def no_gpu(nvidia_smi: NvidiaSmi) -> dict[str, str]:
    """Environment of a machine whose `nvidia-smi` finds no device, wherever the tests run."""
    return {"PATH": f"{nvidia_smi(exit_code=6, error='No devices were found')}:{os.environ['PATH']}"}


@pytest.fixture(scope="session")
def airflow_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of an Airflow of its own; without a database, which an executor does not need."""
    foreign = ("AIRFLOW", "MLFLOW", "MLPIPE", "CUDA", "OMP", "MKL", "OPENBLAS")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return clean | {
        "AIRFLOW_HOME": str(tmp_path_factory.mktemp("airflow")),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(tmp_path_factory.mktemp("plugins")),  # entry points name them
        "AIRFLOW__API_AUTH__JWT_SECRET": "not-a-secret",
        # NEXT_AIRFLOW: a folder with another release of Airflow, which `make test-next-airflow` fills.
        "PYTHONPATH": os.pathsep.join([str(PLUGINS), *filter(None, [os.environ.get("NEXT_AIRFLOW")])]),
    }


class Harness:
    """The server that runs scenarios, one at a time."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HARNESS)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def begin(self, folder: Path, script: str, environment: dict[str, str]) -> int:
        """Start a scenario; returns the process that runs it."""
        request = {
            "script": script,
            "environment": environment | {"HARNESS_RECORDS": str(folder / "records")},
            "result": str(folder / "result"),
            "log": str(folder / "log"),
        }
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read_number()

    def wait(self) -> int:
        """Exit code of the scenario, negative for a signal."""
        return self._read_number()

    def _read_number(self) -> int:
        assert self.process.stdout
        # Airflow's import may print, too.
        return int(next(line for line in self.process.stdout if line.strip().removeprefix("-").isdigit()))


@pytest.fixture(scope="session")
def harness(airflow_environment: dict[str, str]) -> Iterator[Harness]:
    server = Harness(airflow_environment)
    yield server
    server.process.communicate(timeout=10)


@pytest.fixture
def run_scenario(tmp_path: Path, harness: Harness) -> RunScenario:
    """Run a script in the harness; returns its `result`, with the log as `log`."""

    def run(script: str, environment: dict[str, str], **settings: str) -> dict[str, Any]:
        harness.begin(tmp_path, script, environment | settings)
        exit_code = harness.wait()
        log = (tmp_path / "log").read_text()
        assert exit_code == 0, log[-6000:]
        return json.loads((tmp_path / "result").read_text()) | {"log": log}

    return run


@pytest.fixture(scope="session")
def run_airflow(airflow_environment: dict[str, str]) -> RunAirflow:
    """Run a Python program with the private Airflow; returns what it prints."""

    def run(*arguments: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=airflow_environment | environment,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        return done.stdout + done.stderr

    return run


def answer_of(output: str) -> Any:
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))
