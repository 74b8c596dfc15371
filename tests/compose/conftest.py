"""The stack of docker-compose.yml, built and started for one session of tests, and taken down with its volumes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlpipe.stack.ports import free_block
from tests.stack_fixtures import airflow_getter

ROOT = Path(__file__).parents[2]
UP_SECONDS = 600
BUILD_SECONDS = 3600

FOREIGN = ("AIRFLOW", "AWS_", "MLFLOW_", "MLPIPE_", "POSTGRES_", "REDIS_", "S3_", "COMPOSE_", "GIT_SHA")
"""Variables of the caller that would go over the generated file."""


@dataclass(frozen=True, kw_only=True)
class ComposeStack:
    """A running project."""

    command: tuple[str, ...]
    """`docker compose` with its files, project and settings."""
    environment: dict[str, str]
    """What a client needs, as variables of another process."""
    settings: dict[str, str]
    """The .env file, and the commit that the images are made of."""
    up_seconds: float

    def compose(self, *arguments: str, timeout: float = 120) -> str:
        """Run a subcommand; its standard output."""
        return run([*self.command, *arguments], timeout)

    def containers(self) -> dict[str, dict[str, Any]]:
        """By service, what `docker inspect` shows."""
        ids = self.compose("ps", "-a", "-q").split()
        rows = json.loads(run(["docker", "inspect", *ids], 60))
        return {row["Config"]["Labels"]["com.docker.compose.service"]: row for row in rows}

    def memory(self) -> dict[str, float]:
        """By service, MiB in use."""
        names = {row["Id"]: service for service, row in self.containers().items() if row["State"]["Running"]}
        shown = run(["docker", "stats", "--no-stream", "--no-trunc", "--format", "{{.ID}} {{.MemUsage}}", *names], 120)
        return {names[line.split()[0]]: mebibytes(line.split()[1]) for line in shown.splitlines()}


def mebibytes(text: str) -> float:
    """Docker's `1.5GiB`, in MiB."""
    for unit, factor in (("GiB", 1024.0), ("MiB", 1.0), ("KiB", 1 / 1024), ("kB", 1 / 1024), ("B", 1 / 2**20)):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    raise ValueError(text)


def run(command: list[str], timeout: float) -> str:
    """Standard output of a command that must succeed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def compose_program() -> list[str]:
    """`docker compose`, or the older docker-compose where that plugin is missing."""
    docker = shutil.which("docker")
    if docker is None:
        pytest.fail("docker is not installed: these tests build images and start containers", pytrace=False)
    plugin = subprocess.run([docker, "compose", "version"], capture_output=True, check=False)
    return [docker, "compose"] if plugin.returncode == 0 else ["docker-compose"]


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposeStack]:
    """The project under a name, ports and secrets of its own. An uncommitted override file is used if there is one."""
    file = tmp_path_factory.mktemp("compose") / "env"
    run([sys.executable, "docker/generate_env.py", str(file)], 30)
    assert file.stat().st_mode & 0o777 == 0o600
    airflow_port, mlflow_port, _ = free_block(2)
    ports = {
        "MLPIPE_AIRFLOW_PORT=8080": f"MLPIPE_AIRFLOW_PORT={airflow_port}",
        "=http://localhost:8080": f"=http://localhost:{airflow_port}",
        "MLPIPE_MLFLOW_PORT=5000": f"MLPIPE_MLFLOW_PORT={mlflow_port}",
        "=http://localhost:5000": f"=http://localhost:{mlflow_port}",
    }
    text = file.read_text()
    for given, chosen in ports.items():
        assert given in text
        text = text.replace(given, chosen)
    commit = run(["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"], 30)
    file.write_text(f"{text}GIT_SHA={commit}")
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    settings = dict(line.split("=", 1) for line in lines)
    override = ROOT / "docker-compose.override.yml"
    files = ["-f", "docker-compose.yml", *(["-f", override.name] if override.exists() else [])]
    command = [*compose_program(), "--env-file", str(file), "-p", f"mlpipe-test-{os.getpid()}", *files]
    run([*command, "build"], BUILD_SECONDS)
    began = time.monotonic()
    try:
        run([*command, "up", "-d"], UP_SECONDS)
        client = {name: value for name, value in settings.items() if name.startswith(("MLPIPE_", "MLFLOW_TRACKING_"))}
        stack = ComposeStack(
            command=tuple(command), environment=client, settings=settings, up_seconds=wait_healthy(command, began)
        )
        yield stack
    finally:
        logs = subprocess.run(
            [*command, "logs", "--no-color", "--tail", "200"], cwd=ROOT, capture_output=True, check=False
        )
        (file.parent / "logs.txt").write_bytes(logs.stdout)
        run([*command, "down", "--volumes", "--remove-orphans", "--timeout", "20"], 300)


def wait_healthy(command: list[str], began: float) -> float:
    """Wait until each service that has a check passes it; seconds since the start."""
    while True:
        rows = json.loads(run(["docker", "inspect", *run([*command, "ps", "-a", "-q"], 60).split()], 60))
        states = {
            row["Config"]["Labels"]["com.docker.compose.service"]: row["State"]["Health"]["Status"]
            for row in rows
            if "Health" in row["State"]
        }
        if set(states.values()) == {"healthy"}:
            return time.monotonic() - began
        assert time.monotonic() - began < UP_SECONDS, states
        time.sleep(1)


@pytest.fixture(scope="session")
def mlpipe(stack: ComposeStack, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Run `mlpipe run` as a user of this machine does; takes its options, returns its result."""

    def run_dag(*options: str, timeout: float = 900) -> dict[str, Any]:
        file = tmp_path_factory.mktemp("run") / "result.json"
        clean = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        done = subprocess.run(
            [sys.executable, "-m", "mlpipe.cli", "run", "--json", str(file), *options],
            env=clean | stack.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(file.read_text())

    return run_dag


@pytest.fixture(scope="session")
def airflow_get(stack: ComposeStack) -> Callable[[str], Any]:
    """Ask Airflow's API; takes the path after /api/v2."""
    return airflow_getter(stack.environment)
