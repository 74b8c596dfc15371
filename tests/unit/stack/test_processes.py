"""Processes that are left behind, with small real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from mlpipe.errors import UserError
from mlpipe.stack import commands, lifecycle
from mlpipe.stack.components import NAMES
from mlpipe.stack.credentials import Credentials
from mlpipe.stack.health import Health
from mlpipe.stack.local import StackSettings
from mlpipe.stack.supervisor import Supervisor, boot_id, living

COMPONENT = 'bash "$0/worker.sh" "$0" & wait'
WORKER = 'set -m; sleep 100 & echo "$! $$" > "$1/orphans"; wait'  # with -m, the task gets a process group of its own
SUPERVISOR = """
import pathlib, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
component = subprocess.Popen(["bash", "-c", sys.argv[2], str(folder)], process_group=0)
while not (folder / "orphans").exists() or not (folder / "orphans").read_text():
    time.sleep(0.02)
component.kill()
component.wait()
(folder / "component.pid").write_text(str(component.pid))
other = subprocess.Popen(["sleep", "100"], process_group=0)
launch = [sys.executable, "-m", "mlpipe.stack.launch", str(folder / "component.pid"), "/bin/sleep", "100"]
successor = subprocess.Popen(launch, process_group=0)
(folder / "kept").write_text(f"{other.pid} {successor.pid}")
successor.wait()
"""


def test_a_restarted_component_clears_up_what_its_killed_predecessor_left(tmp_path):
    (tmp_path / "worker.sh").write_text(WORKER)
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(tmp_path), COMPONENT], start_new_session=True)
    try:
        kept = _pids(tmp_path / "kept")
        orphans = _pids(tmp_path / "orphans")
        _until(lambda: not any(map(_lives, orphans)))
        _until(lambda: psutil.Process(kept[1]).name() == "sleep")
        assert all(map(_lives, kept))
        assert (tmp_path / "component.pid").read_text() == str(kept[1])
    finally:
        for process in [*psutil.Process(supervisor.pid).children(recursive=True), supervisor]:
            process.kill()
        supervisor.wait()


def test_stopping_finds_orphans_by_their_session(settings):
    settings.create_folders()
    leader = subprocess.Popen(
        ["/bin/bash", "-c", "set -m; sleep 100 > /dev/null & echo; wait"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert leader.stdout is not None
    leader.stdout.readline()
    orphan = psutil.Process(leader.pid).children()[0]
    created = psutil.Process(leader.pid).create_time()
    (settings.run / "session.json").write_text(
        f'{{"sid": {leader.pid}, "created": {created}, "boot": {psutil.boot_time()}}}'
    )
    leader.kill()
    leader.wait()
    assert living(orphan)

    assert Supervisor(settings).stop() == []

    assert not living(orphan)
    assert Supervisor(settings).processes() == []


@pytest.mark.parametrize(
    "change", [{"created": 1.0}, {"boot": 1.0}, {"boot_id": "other"}, {"boot_id": boot_id(), "created": 1.0}]
)
def test_a_session_number_that_belongs_to_somebody_else_is_left_alone(settings, change):
    settings.create_folders()
    other = subprocess.Popen(["/bin/sleep", "100"], start_new_session=True)
    try:
        session = {"sid": other.pid, "created": psutil.Process(other.pid).create_time(), "boot": psutil.boot_time()}
        (settings.run / "session.json").write_text(str(session | change).replace("'", '"'))

        assert Supervisor(settings).stop() == []

        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.fixture
def supervisor(settings) -> Iterator[Supervisor]:
    """A real one, of no components."""
    settings.create_folders()
    (settings.run / "mlflow.pid").write_text("1")  # of an earlier start
    supervisor = Supervisor(settings)
    supervisor.start([], os.environ)
    yield supervisor
    assert supervisor.stop() == []


@pytest.mark.usefixtures("supervisor")
def test_process_numbers_of_an_earlier_start_are_forgotten(settings):
    assert [path.name for path in settings.run.glob("*.pid")] == ["supervisord.pid"]


def test_a_stack_is_still_known_when_the_clock_was_set(supervisor, settings):
    if not boot_id():
        pytest.skip("only Linux tells one boot from another")
    file = settings.run / "session.json"
    session = json.loads(file.read_text())
    file.write_text(json.dumps(session | {name: session[name] - 3600 for name in ("created", "boot")}))

    assert [process.pid for process in supervisor.processes()] == [session["sid"]]


@pytest.mark.usefixtures("supervisor")
def test_a_running_supervisor_is_found_though_a_new_one_would_listen_elsewhere(settings, monkeypatch):
    monkeypatch.setattr(StackSettings, "socket", Path("/nonexistent/s.sock"))

    assert Supervisor(StackSettings.load(settings.home)).is_up()


@pytest.mark.usefixtures("supervisor")
def test_after_an_interrupted_start_airflows_database_is_made_before_airflow_starts(settings, tmp_path, monkeypatch):
    Credentials.load_or_create(settings.credentials_path)
    settings.remember()
    done = tmp_path / "done"
    airflow = tmp_path / "airflow"
    airflow.write_text(f'#!/bin/sh\necho "$@" >> {done}\n')
    airflow.chmod(0o700)
    monkeypatch.setattr(lifecycle, "program", lambda _: str(airflow))
    monkeypatch.setattr(
        Supervisor, "start_components", lambda _, names: done.write_text(f"{done.read_text()}start {names[-1]}\n")
    )
    monkeypatch.setattr(Health, "problem", lambda *_: None)
    monkeypatch.setattr(Health, "dag_problem", lambda _: None)

    lifecycle.up(settings, lambda *_: None)

    assert done.read_text() == "db migrate\nstart triggerer\n"


def test_stopping_what_never_ran_does_nothing(settings):
    assert lifecycle.down(settings) == []
    assert not settings.home.exists()


def test_stopping_names_the_stack_that_does_not_run(settings, monkeypatch):
    monkeypatch.setenv("MLPIPE_HOME", str(settings.home))

    result = CliRunner().invoke(commands.down)

    assert result.exit_code == 0
    assert "is not running" in " ".join(result.output.split())


def test_status_of_what_does_not_run_is_a_failure(settings, monkeypatch):
    monkeypatch.setenv("MLPIPE_HOME", str(settings.home))

    result = CliRunner().invoke(commands.status)

    assert result.exit_code == 1
    assert result.output.count("stopped") == len(NAMES)


def test_logs_before_the_first_start_say_so(settings, monkeypatch):
    monkeypatch.setenv("MLPIPE_HOME", str(settings.home))

    result = CliRunner().invoke(commands.logs)

    assert isinstance(result.exception, UserError)
    assert "run `mlpipe up`" in str(result.exception)


def test_the_last_lines_of_a_log(tmp_path):
    log = tmp_path / "a.log"
    log.write_text("".join(f"line {number}\n" for number in range(10_000)))

    assert lifecycle.tail(log, 2) == "line 9998\nline 9999"
    assert lifecycle.tail(tmp_path / "none.log", 2) == ""


def _pids(path: Path) -> list[int]:
    _until(lambda: path.exists() and len(path.read_text().split()) == 2)
    return [int(word) for word in path.read_text().split()]


def _lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and living(psutil.Process(pid))


def _until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)
