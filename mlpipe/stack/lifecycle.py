"""Starting and stopping the stack."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

from mlpipe.errors import UserError
from mlpipe.stack.components import AIRFLOW, NAMES, components, program
from mlpipe.stack.credentials import Credentials
from mlpipe.stack.health import Health
from mlpipe.stack.local import StackSettings
from mlpipe.stack.ports import check_ports_free
from mlpipe.stack.service_environment import service_environment
from mlpipe.stack.supervisor import Supervisor

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 180.0
"""Seconds that a start may take; some 30 are normal."""

Report = Callable[[str, float], None]
"""Told the name of what became ready, and after how many seconds."""


class StackNotReadyError(UserError):
    """A component did not come up.

    Attributes:
        log: its last lines.
    """

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


def up(settings: StackSettings, report: Report, timeout: float = DEFAULT_TIMEOUT) -> tuple[StackSettings, bool]:
    """Start what does not run, and wait until all of it can be used.

    Returns:
        The settings with every port, and whether all of it had been up before.

    Raises:
        UserError: a port is taken, or the running stack has other ports (before anything starts).
        StackNotReadyError: a component does not become healthy in time.
    """
    for name in ("weed", "airflow"):
        program(name)
    settings.create_folders()
    with _only_one(settings.run / "up.lock"):
        supervisor = Supervisor(settings)
        if not supervisor.is_up():
            return _start(settings, report, timeout), False
        _check_same_ports(settings)
        already = {state.name for state in supervisor.states() if state.alive} == set(NAMES)
        credentials = Credentials.load(settings.credentials_path)
        # An interrupted first start leaves a supervisor, but no finished database.
        migrate_airflow(settings, service_environment(settings, credentials), timeout)
        supervisor.start_components(NAMES)
        health = Health(settings, credentials)
        _wait(settings, supervisor, health, report, timeout, lambda: True)
        return settings, already


def _start(settings: StackSettings, report: Report, timeout: float) -> StackSettings:
    began = time.time()
    Supervisor(settings).stop()  # of a supervisor that was killed, processes may be left
    check_ports_free({f"MLPIPE_{name.upper()}": port for name, port in settings.public_ports.items()})
    settings = settings.with_storage_ports()
    credentials = Credentials.load_or_create(settings.credentials_path)
    settings.remember()
    environment = service_environment(settings, credentials)
    supervisor = Supervisor(settings)
    supervisor.start(components(settings), environment)

    def start_airflow() -> None:
        migrate_airflow(settings, environment, timeout)
        supervisor.start_components(AIRFLOW)

    with ThreadPoolExecutor(max_workers=1) as pool:
        # The other components start, and are looked at, while Airflow's database is made.
        airflow = pool.submit(start_airflow)
        health = Health(settings, credentials, since=began)
        _wait(settings, supervisor, health, report, timeout, lambda: airflow.done() and airflow.result() is None)
    return settings


def is_running(settings: StackSettings) -> bool:
    """Whether any process of the stack lives, be it one that its supervisor left behind."""
    return settings.run.is_dir() and bool(Supervisor(settings).processes())


def down(settings: StackSettings) -> list[int]:
    """Stop everything.

    Returns:
        Ids of processes that could not be killed; normally empty.
    """
    if not settings.run.is_dir():
        return []
    return Supervisor(settings).stop()


def migrate_airflow(settings: StackSettings, environment: Mapping[str, str], timeout: float) -> None:
    """Bring Airflow's database to the installed version; nothing to do when this version did it before.

    Raises:
        StackNotReadyError: the migration failed.
    """
    version = importlib.metadata.version("apache-airflow-core")
    done = settings.airflow_home / "migrated-to"
    if settings.airflow_database.exists() and done.exists() and done.read_text() == version:
        return
    log = settings.logs / "airflow-migration.log"
    try:
        with log.open("w") as output:
            subprocess.run(
                [program("airflow"), "db", "migrate"],
                env=dict(environment),
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=True,
            )
    except subprocess.SubprocessError as error:
        raise StackNotReadyError(f"airflow db migrate failed ({error}); see {log}", tail(log, 15)) from None
    # In this mode a reader never waits for a writer. It is kept in the file.
    with contextlib.closing(sqlite3.connect(settings.airflow_database)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    done.write_text(version)


def tail(path: Path, count: int) -> str:
    """Last lines of a log."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 512 * count))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(lines[-count:])


def _wait(
    settings: StackSettings,
    supervisor: Supervisor,
    health: Health,
    report: Report,
    timeout: float,
    airflow_started: Callable[[], bool],
) -> None:
    began = time.monotonic()
    pending: dict[str, Callable[[], str | None]] = {name: _question(health, name) for name in NAMES}
    pending["DAG"] = health.dag_problem
    while pending:
        started = airflow_started()
        fatal = {state.name for state in supervisor.states() if state.state == "FATAL"}
        for name, question in list(pending.items()):
            if (name in AIRFLOW and not started) or (name == "DAG" and "api-server" in pending):
                continue
            problem = question()
            if problem is None:
                report(name, time.monotonic() - began)
                del pending[name]
                continue
            if name in fatal or time.monotonic() - began > timeout or "cannot be imported" in problem:
                source = "dag-processor" if name == "DAG" else name
                how = "was given up after several starts" if name in fatal else problem
                raise StackNotReadyError(
                    f"{name}: {how}, {time.monotonic() - began:.0f} s after the start; "
                    f"see `mlpipe logs {source}`; `mlpipe down` stops the rest",
                    tail(settings.logs / f"{source}.log", 15),
                )
        time.sleep(0.25)


def _question(health: Health, name: str) -> Callable[[], str | None]:
    return lambda: health.problem(name)


def _check_same_ports(settings: StackSettings) -> None:
    running = settings.remembered()
    for name, port in settings.public_ports.items():
        if running.get(name, port) != port:
            raise UserError(
                f"MLPIPE_{name.upper()}: {port} is asked for, but the running stack uses {running[name]}; "
                "run `mlpipe down` first"
            )


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    try:
        with FileLock(path, blocking=False):
            yield
    except Timeout:
        raise UserError("another `mlpipe up` of this stack is at work; wait for it") from None
