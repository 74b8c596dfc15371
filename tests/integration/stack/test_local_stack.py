"""The real components under their supervisor. The stack is as healthy after each test as before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest
import requests
from itsdangerous import URLSafeTimedSerializer

from mlpipe.stack.components import NAMES
from mlpipe.stack.credentials import Credentials
from mlpipe.stack.health import Health, s3_client
from mlpipe.stack.local import DATA_BUCKET, StackSettings
from mlpipe.stack.supervisor import Supervisor, living

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


@pytest.fixture
def mlpipe(stack: StackSettings) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line, for this stack."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "MLPIPE_HOME": str(stack.home), "NO_COLOR": "1", "COLUMNS": "200"}
        for name in stack.public_ports:
            environment.pop(f"MLPIPE_{name.upper()}", None)
        command = [sys.executable, "-m", "mlpipe.cli", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    return run


def test_starting_twice_changes_nothing(stack, mlpipe):
    before = _pids(stack)

    again = mlpipe("up")

    assert again.returncode == 0, again.stderr
    assert "already up" in again.stdout
    credentials = Credentials.load(stack.credentials_path)
    for shown in (stack.airflow_url, stack.mlflow_url, f"admin / {credentials.airflow_password}"):
        assert shown in again.stdout
    assert _pids(stack) == before
    assert set(before) == set(NAMES)


def test_status_shows_every_component(stack, mlpipe):
    result = mlpipe("status")

    assert result.returncode == 0
    assert result.stdout.count("running") == len(NAMES)
    assert stack.airflow_url in result.stdout


def test_other_ports_are_refused_while_it_runs(mlpipe):
    result = mlpipe("up", "--s3-port", "9")

    assert result.returncode == 2
    assert "MLPIPE_S3_PORT: 9 is asked for" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_second_stack_on_the_same_ports_is_refused_before_anything_starts(stack, tmp_path):
    ports = [f"--{name.replace('_', '-')}={port}" for name, port in stack.public_ports.items()]
    environment = {**os.environ, "MLPIPE_HOME": str(tmp_path / "second")}
    result = subprocess.run(
        [sys.executable, "-m", "mlpipe.cli", "up", *ports],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert result.returncode == 2
    assert f"port {stack.airflow_port} is taken by process " in result.stderr
    assert "choose another with" in result.stderr
    assert not (tmp_path / "second" / "run" / "supervisord.conf").exists()


def test_everything_listens_on_loopback_only(stack):
    listeners = [
        connection.laddr
        for process in Supervisor(stack).processes()
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]

    assert {address.ip for address in listeners} == {"127.0.0.1"}
    assert {address.port for address in listeners} == {*stack.public_ports.values(), *stack.storage_ports}


def test_secrets_are_for_their_owner_only_and_not_in_any_command(stack):
    secrets = [stack.credentials_path, stack.airflow_home / "passwords.json", stack.run / "supervisord.conf"]

    assert {path.stat().st_mode & 0o777 for path in secrets} == {0o600}
    assert stack.home.stat().st_mode & 0o777 == 0o700
    assert stack.socket.parent.stat().st_mode & 0o777 == 0o700
    values = [value for name, value in vars(Credentials.load(stack.credentials_path)).items() if name != "airflow_user"]
    commands = [" ".join(process.cmdline()) for process in Supervisor(stack).processes()]
    assert not [value for value in values for command in commands if value in command]
    logs = "\n".join(path.read_text(errors="replace") for path in stack.logs.glob("*.log"))
    assert not [value for value in values if value in logs]


def test_nobody_gets_in_without_a_key(stack):
    http = requests.Session()
    http.trust_env = False
    s3_client(stack.client_environment()).put_object(Bucket=DATA_BUCKET, Key="secret", Body=b"x")
    filer = f"http://127.0.0.1:{stack.storage_ports[4]}/buckets/{DATA_BUCKET}"

    assert http.get(f"{stack.s3_url}/{DATA_BUCKET}/secret", timeout=5).status_code == 403
    assert http.put(f"{stack.s3_url}/{DATA_BUCKET}/mine", data=b"x", timeout=5).status_code == 403
    assert http.get(f"{filer}/secret", timeout=5).status_code == 401
    assert http.put(f"{filer}/mine", data=b"x", timeout=5).status_code == 401
    assert http.get(f"{stack.airflow_url}/api/v2/dags", timeout=5).status_code == 401
    assert http.post(f"{stack.airflow_url}/api/v2/pools", json={"name": "a", "slots": 1}, timeout=5).status_code == 401


def test_pages_of_other_sites_cannot_write_to_mlflow(stack):
    """A web page that its user has open must not use the login of their browser."""
    http = requests.Session()
    http.trust_env = False
    http.auth = _login(stack)
    url = f"{stack.mlflow_url}/api/2.0/mlflow/experiments/create"

    for headers in ({"Origin": "http://elsewhere.example"}, {"Host": "elsewhere.example"}):
        answer = http.post(url, json={"name": "theirs"}, headers=headers, timeout=10)
        assert answer.status_code == 403, headers


@pytest.mark.usefixtures("stack")
def test_the_doctor_finds_every_connection_well(mlpipe):
    result = mlpipe("doctor")

    lines = {line[2:].rsplit("  ", 1)[0].strip(): line[0] for line in result.stdout.splitlines() if line[0] in "✔✘"}
    assert not [name for name, mark in lines.items() if mark == "✘"], result.stdout
    assert {"S3 round trip", "MLflow artifact round trip", *NAMES} <= set(lines)
    assert result.returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_component_is_restarted(stack, name):
    before = _pids(stack)
    health = Health(stack, Credentials.load(stack.credentials_path), since=time.time())

    os.kill(before[name], signal.SIGKILL)

    _until(lambda: _pids(stack).get(name) not in (None, before[name]))
    _until(lambda: health.problem(name) is None, seconds=120)
    others = {other: pid for other, pid in _pids(stack).items() if other != name}
    assert others == {other: pid for other, pid in before.items() if other != name}
    group = [process for process in Supervisor(stack).processes() if os.getpgid(process.pid) == before[name]]
    assert group == [], "the killed component's children were left"


def test_data_survives_and_no_process_is_left(stack, mlpipe):
    store = s3_client(stack.client_environment())
    content = os.urandom(3 * 2**20)
    store.put_object(Bucket=DATA_BUCKET, Key="kept", Body=content)
    http = requests.Session()
    http.trust_env = False
    http.auth = _login(stack)
    created = http.post(
        f"{stack.mlflow_url}/api/2.0/mlflow/experiments/create", json={"name": "kept"}, timeout=10
    ).json()
    processes = Supervisor(stack).processes()
    assert len(processes) > len(NAMES)

    assert mlpipe("down").returncode == 0

    assert [process for process in processes if living(process)] == []
    assert mlpipe("status").returncode == 1
    assert mlpipe("down").returncode == 0
    began = time.monotonic()
    started = mlpipe("up")
    print(f"warm start: {time.monotonic() - began:.1f} s")  # noqa: T201 - shown with pytest -s
    assert started.returncode == 0, started.stdout + started.stderr
    assert store.get_object(Bucket=DATA_BUCKET, Key="kept")["Body"].read() == content
    found = http.get(
        f"{stack.mlflow_url}/api/2.0/mlflow/experiments/get-by-name",
        params={"experiment_name": "kept"},
        timeout=10,
    ).json()
    assert found["experiment"]["experiment_id"] == created["experiment_id"]
    assert found["experiment"]["artifact_location"].startswith("mlflow-artifacts:/")


def test_a_killed_supervisor_is_cleared_up_and_replaced(stack, mlpipe):
    session = json.loads((stack.run / "session.json").read_text())
    orphans = {process.pid for process in Supervisor(stack).processes()} - {session["sid"]}

    os.kill(session["sid"], signal.SIGKILL)
    _until(lambda: mlpipe("status").returncode == 1)
    again = mlpipe("up")

    assert again.returncode == 0, again.stdout + again.stderr
    assert not {process.pid for process in Supervisor(stack).processes()} & orphans


def _login(stack: StackSettings) -> tuple[str, str]:
    environment = stack.client_environment()
    return environment["MLFLOW_TRACKING_USERNAME"], environment["MLFLOW_TRACKING_PASSWORD"]


def test_mlflow_answers_only_who_has_airflows_login(stack):
    user, password = _login(stack)
    signed = URLSafeTimedSerializer(password, salt="session").dumps("")
    other = URLSafeTimedSerializer("another password", salt="session").dumps("")
    ticket = URLSafeTimedSerializer(password, salt="ticket").dumps("")
    api = f"{stack.mlflow_url}/api/2.0"
    for url in (
        stack.mlflow_url,
        f"{api}/mlflow/experiments/search?max_results=1",
        f"{api}/mlflow-artifacts/artifacts?path=uploads",
        f"{stack.mlflow_url}/ajax-api/2.0/mlflow/experiments/search?max_results=1",
        f"{stack.mlflow_url}/graphql",
        f"{stack.mlflow_url}/mlpipe-login?ticket={signed}",
    ):
        for given in (None, (user, "wrong"), (user, "")):
            answer = requests.get(url, auth=given, timeout=30)
            assert answer.status_code == 401, url
            assert "mlpipe env" in answer.text
        for cookie in (other, ticket, "x"):
            assert requests.get(url, cookies={"mlpipe_mlflow": cookie}, timeout=30).status_code == 401, url
    assert requests.put(f"{api}/mlflow-artifacts/artifacts/mine", data=b"x", timeout=30).status_code == 401
    for allowed in ({"auth": (user, password)}, {"cookies": {"mlpipe_mlflow": signed}}):
        assert requests.get(f"{api}/mlflow/experiments/search?max_results=1", timeout=30, **allowed).ok


def _pids(stack: StackSettings) -> dict[str, int]:
    return {state.name: state.pid for state in Supervisor(stack).states() if state.alive and state.pid}


def _until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)


def test_mlflow_has_no_assistant_that_runs_commands(stack):
    for path in ("config", "sessions"):
        url = f"{stack.mlflow_url}/ajax-api/3.0/mlflow/assistant/{path}"
        assert requests.get(url, auth=_login(stack), timeout=30).status_code == 404
