"""The process manager (supervisord): its configuration, its start, and talking to it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from configparser import RawConfigParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

import psutil

from mlpipe.errors import UserError
from mlpipe.stack.components import AIRFLOW, Component
from mlpipe.stack.files import read_json, write_private
from mlpipe.stack.local import StackSettings

START_SECONDS = 15
STOP_SECONDS = 40
"""Until the supervisor itself is given up; it kills a component that does not stop within 10."""


@dataclass(frozen=True, kw_only=True)
class ProcessState:
    """What the supervisor says about one component."""

    name: str
    state: str
    """STOPPED, STARTING, RUNNING, BACKOFF, STOPPING, EXITED, FATAL or UNKNOWN."""
    pid: int | None
    uptime: float
    """Seconds since its last start; 0 when it does not run."""

    @property
    def alive(self) -> bool:
        """Whether there is a process. STARTING lasts some seconds: a component counts as started when it stays up."""
        return self.state in ("STARTING", "RUNNING")


class Supervisor:
    """The supervisor of one stack, running or not."""

    def __init__(self, settings: StackSettings) -> None:
        self._settings = settings
        self._config = settings.run / "supervisord.conf"
        self._session_file = settings.run / "session.json"

    def is_up(self) -> bool:
        """Whether it answers."""
        return self._call("getState") is not None

    def start(self, components: Sequence[Component], environment: Mapping[str, str]) -> None:
        """Start the supervisor, and with it all components but Airflow's, which wait for their database.

        Raises:
            UserError: it does not answer in time.
        """
        settings = self._settings
        write_private(self._config, render(settings, components))
        # `launch` kills what is left of the process in such a file; after a reboot, its number may be another one's.
        for stale in (settings.socket, *settings.run.glob("*.pid")):
            stale.unlink(missing_ok=True)
        with (settings.logs / "supervisord.out").open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "supervisor.supervisord", "--configuration", str(self._config)],
                env=dict(environment),
                cwd=settings.home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a session of its own, by which all of its processes are found
            )
        leader = psutil.Process(process.pid)
        times = {"created": leader.create_time(), "boot": psutil.boot_time()}
        session = {"sid": process.pid, "boot_id": boot_id(), **times}
        write_private(self._session_file, json.dumps(session))
        deadline = time.monotonic() + START_SECONDS
        while not self.is_up():
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(
                    f"the supervisor did not start; see {settings.logs}/supervisord.out and supervisord.log"
                )
            time.sleep(0.05)

    def start_components(self, names: Sequence[str]) -> None:
        """Start those that do not run, without waiting for them."""
        states = {state.name: state for state in self.states()}
        for name in names:
            if name in states and not states[name].alive:
                with contextlib.suppress(Fault):  # started by the supervisor in between
                    self._rpc("startProcess", name, False)

    def states(self) -> list[ProcessState]:
        """All components; empty when the supervisor does not run."""
        rows = self._call("getAllProcessInfo") or []
        return [
            ProcessState(
                name=row["name"],
                state=row["statename"],
                pid=row["pid"] or None,
                uptime=float(row["now"] - row["start"]) if row["pid"] else 0.0,
            )
            for row in rows
        ]

    def stop(self) -> list[int]:
        """Stop everything, and kill what stays.

        Returns:
            Ids of processes that outlive this, which needs rights that the user lacks. Normally empty.
        """
        session = self.processes()
        if self.is_up():
            for state in self.states():
                # All of Airflow at once, the object store last: what still writes can do so.
                if state.alive and state.name != "seaweedfs":
                    with contextlib.suppress(Fault):
                        self._rpc("stopProcess", state.name, False)
            with contextlib.suppress(Fault):
                self._rpc("shutdown")
            leader = self._session().get("sid")
            wait_gone([process for process in session if process.pid == leader], STOP_SECONDS)
        left = {process.pid: process for process in [*session, *self.processes()] if living(process)}
        for process in left.values():
            with contextlib.suppress(psutil.Error):
                process.kill()
        alive = wait_gone(list(left.values()), 5)
        if not alive:
            self._socket.unlink(missing_ok=True)
            self._session_file.unlink(missing_ok=True)
            for port in self._settings.storage_ports:  # SeaweedFS leaves these behind when it is killed
                for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108 - its fixed place
                    path.unlink(missing_ok=True)
        return [process.pid for process in alive]

    def processes(self) -> list[psutil.Process]:
        """Every process of the last start that still lives: the supervisor, its session, and their descendants.

        Killed components leave orphans that are nobody's children any more; they keep the session.
        """
        sid = self._session().get("sid")
        if sid is None:
            return []
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if os.getsid(process.pid) == sid and living(process):
                    found |= {other.pid: other for other in (process, *process.children(recursive=True))}
        return list(found.values())

    @property
    def _socket(self) -> Path:
        """Where the recorded session's supervisor listens, wherever a new one would."""
        config = RawConfigParser()
        if self._session():
            config.read(self._config)
        return Path(config.get("unix_http_server", "file", fallback=self._settings.socket))

    def _session(self) -> dict[str, Any]:
        """The recorded session; empty when its number can by now belong to somebody else."""
        try:
            session = read_json(self._session_file)
        except ValueError:
            return {}
        if not session:
            return {}
        moved = psutil.boot_time() - session["boot"]
        if session.get("boot_id"):
            ours = session["boot_id"] == boot_id()
        else:
            ours, moved = abs(moved) <= 60, 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            # Linux gives both times by the wall clock of the moment, and that of the boot in whole seconds.
            created = psutil.Process(session["sid"]).create_time() - moved
            ours = ours and abs(created - session["created"]) <= 2
        return session if ours else {}

    def _call(self, method: str) -> Any:
        try:
            return self._rpc(method)
        except (OSError, Fault):
            return None

    def _rpc(self, method: str, *arguments: Any) -> Any:
        with self._proxy() as proxy:
            return getattr(proxy.supervisor, method)(*arguments)

    @contextlib.contextmanager
    def _proxy(self) -> Iterator[Any]:
        from supervisor.xmlrpc import SupervisorTransport  # type: ignore[import-untyped]

        transport = SupervisorTransport(None, None, serverurl=f"unix://{self._socket}")
        try:
            yield ServerProxy("http://127.0.0.1", transport=transport)
        finally:
            transport.close()


def boot_id() -> str:
    """What Linux calls the time since its last boot; empty on other systems."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def living(process: psutil.Process) -> bool:
    """Whether it still runs; one that only waits to be collected by its parent does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_gone(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait until none lives; returns those that still do after that time."""
    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if living(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def render(settings: StackSettings, components: Sequence[Component]) -> str:
    """supervisord's configuration."""
    sections = [
        _section(
            "supervisord",
            nodaemon="true",
            silent="true",
            umask="077",
            pidfile=settings.run / "supervisord.pid",
            logfile=settings.logs / "supervisord.log",
            logfile_maxbytes="5MB",
            logfile_backups=2,
            childlogdir=settings.logs,
        ),
        _section("unix_http_server", file=settings.socket, chmod="0700"),
        _section(
            "rpcinterface:supervisor",
            **{"supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"},
        ),
    ]
    for priority, component in enumerate(components):
        launch = [sys.executable, "-m", "mlpipe.stack.launch", str(settings.run / f"{component.name}.pid")]
        sections.append(
            _section(
                f"program:{component.name}",
                command=shlex.join([*launch, *component.command]),
                directory=settings.home,
                environment=",".join(f'{name}="{value}"' for name, value in component.environment.items()),
                priority=priority,
                autostart=str(component.name not in AIRFLOW).lower(),
                autorestart="true",
                startsecs=5,
                startretries=10,
                stopsignal="TERM",
                stopwaitsecs=component.stop_seconds,
                stopasgroup="true",
                killasgroup="true",
                redirect_stderr="true",
                stdout_logfile=component.log,
                stdout_logfile_maxbytes="10MB",
                stdout_logfile_backups=3,
            )
        )
    return "\n".join(sections)


def _section(name: str, **options: object) -> str:
    lines = [f"{key} = {str(value).replace('%', '%%')}" for key, value in options.items()]
    return "\n".join([f"[{name}]", *lines, ""])
