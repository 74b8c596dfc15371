"""Checks of an installation and its running stack; each says how to fix a failure."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import requests

from mlpipe.airflow_api import AirflowApi
from mlpipe.errors import UserError
from mlpipe.stack.components import NAMES, program
from mlpipe.stack.credentials import Credentials
from mlpipe.stack.health import DAG_ID, Health, s3_client
from mlpipe.stack.local import DATA_BUCKET, StackSettings
from mlpipe.stack.service_environment import EXECUTOR, service_environment
from mlpipe.stack.supervisor import Supervisor

MIN_FREE_BYTES = 5 * 2**30
"""Space for data sets, models and checkpoints."""
MIN_FREE_TEMPORARY_BYTES = 2**30
"""Space for an archive, model or checkpoint in transfer."""
STACK_EXTRAS = ("training", "airflow", "local-stack")
REINSTALL = "run `make install` (or `uv pip sync requirements.lock`)"
ROUND_TRIP_SIZES = (0, 1, 5 * 2**20 + 3)
"""Bytes: empty, one byte, and more than one part of an upload."""
COMMAND_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check."""

    name: str
    ok: bool
    detail: str
    """The result in words."""
    remedy: str = ""
    """How to fix a failure or a warning."""


class CheckFailedError(Exception):
    """A check failed; the message says why."""


class CheckWarningError(CheckFailedError):
    """A check found something that works, but should be improved."""


def diagnose(settings: StackSettings, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Run all checks, cheap ones first: this machine, then the stack that `mlpipe run` would use."""
    url = environ.get("MLPIPE_AIRFLOW_URL", "").rstrip("/")
    if url and not _runs_here(url, settings):
        yield from _client(environ)
        return
    yield _finding("versions", lambda: versions(STACK_EXTRAS), REINSTALL)
    yield _finding("programs", programs, "run `make install`")
    folders = (settings.home, settings.home / "cache")
    yield _finding(
        "disk space",
        lambda: disk_space(MIN_FREE_BYTES, *folders),
        "free some space, or set MLPIPE_HOME to a folder on a larger disk",
    )
    yield _temporary_space()
    yield _finding("GPU", gpus, "mend the driver, or install the torch that fits it: both must list the same devices")
    yield _finding("executor", executors, "run `make install`, or install mlpipe[airflow] beside this Python")
    if Supervisor(settings).states():
        yield from local_stack(settings)
    else:
        yield Finding(name="stack", ok=False, detail="is not running", remedy="run `mlpipe up`")


def _runs_here(url: str, settings: StackSettings) -> bool:
    """Whether the local stack runs at this address. A machine that never started one may lack supervisor."""
    return url == settings.airflow_url and bool(settings.remembered() and Supervisor(settings).states())


def _client(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Checks for a machine that starts runs on a stack elsewhere."""
    yield _finding("versions", versions, REINSTALL)
    if cache := environ.get("MLPIPE_CACHE_DIR"):
        remedy = "free some space, or set MLPIPE_CACHE_DIR to a folder on a larger disk"
        yield _finding("disk space", lambda: disk_space(MIN_FREE_BYTES, Path(cache).expanduser()), remedy)
    yield _temporary_space()
    yield Finding(name="executor", ok=True, detail="not checked: that Airflow decides what runs its tasks, and where")
    yield from connections(environ, local=False)


def _temporary_space() -> Finding:
    return _finding(
        "temporary files",
        lambda: disk_space(MIN_FREE_TEMPORARY_BYTES, Path(tempfile.gettempdir())),
        "free some space, or set TMPDIR to a folder on a larger disk",
    )


def local_stack(settings: StackSettings) -> Iterator[Finding]:
    """Each component, each connection and the secrets of the stack that runs here."""
    health = Health(settings, Credentials.load(settings.credentials_path))
    for name in NAMES:
        remedy = f"see `mlpipe logs {name}`; `mlpipe up` starts missing components"
        yield _finding(name, lambda name=name: _healthy(health.problem(name)), remedy)  # type: ignore[misc]
    yield from connections(settings.client_environment(), local=True)
    yield _finding("secrets", lambda: secrets(settings), f"chmod 600 {settings.credentials_path}")


def connections(environ: Mapping[str, str], *, local: bool) -> Iterator[Finding]:
    """Use every service as a client does, at the addresses in these variables.

    Args:
        local: whether the variables belong to the local stack, whose logs `mlpipe logs` shows.
    """

    def logs(component: str = "") -> str:
        return f" (`{f'mlpipe logs {component}'.rstrip()}`)" if local else ""

    url = environ["MLPIPE_AIRFLOW_URL"].rstrip("/")
    yield _finding("Airflow health", lambda: airflow_health(url), f"see the logs of the named components{logs()}")
    yield _finding("DAG", lambda: dag(environ), "see the message; the DAG processor's log has details")
    mlflow_log = f"see MLflow's log{logs('mlflow')}"
    for name, variable, check, remedy in (
        ("S3 round trip", "AWS_ENDPOINT_URL_S3", s3_round_trip, f"see the store's log{logs('seaweedfs')}"),
        ("MLflow version", "MLFLOW_TRACKING_URI", mlflow_version, f"run the same MLflow on both sides; {mlflow_log}"),
        ("MLflow artifact round trip", "MLFLOW_TRACKING_URI", artifact_round_trip, mlflow_log),
    ):
        if environ.get(variable):
            yield _finding(name, lambda check=check: check(environ), remedy)  # type: ignore[misc]
        else:
            yield Finding(name=name, ok=True, detail=f"not checked: {variable} is not set here, only where stages run")


def versions(extras: Sequence[str] = ()) -> str:
    """Compare installed packages with the requirements of this project and these extras."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    wrong, checked = [], 0
    for requirement in map(Requirement, importlib.metadata.requires("mlpipe") or []):
        if not any(requirement.marker is None or requirement.marker.evaluate({"extra": e}) for e in ("", *extras)):
            continue
        checked += 1
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        if not requirement.specifier.contains(installed):
            wrong.append(f"{requirement.name} is {installed}, not {requirement.specifier}")
    python = platform.python_version()
    allowed = importlib.metadata.metadata("mlpipe")["Requires-Python"]
    if not SpecifierSet(allowed).contains(python):
        wrong.append(f"Python is {python}, not {allowed}")
    if wrong:
        raise CheckFailedError("; ".join(wrong))
    return f"Python {python}, {checked} packages as required; Docker is not needed"


def programs() -> str:
    """Find the stack's programs."""
    try:
        return ", ".join(Path(program(name)).name for name in ("weed", "airflow"))
    except UserError as error:
        raise CheckFailedError(str(error)) from None


def disk_space(needed: int, *folders: Path) -> str:
    """Free space on the disks that hold, or will hold, these folders."""
    places = [next(path for path in (folder, *folder.parents) if path.exists()) for folder in folders]
    free = {place: shutil.disk_usage(place).free for place in {place.stat().st_dev: place for place in places}.values()}
    text = ", ".join(f"{amount / 2**30:.1f} GiB free at {place}" for place, amount in free.items())
    if min(free.values()) < needed:
        raise CheckFailedError(f"{text}; {needed / 2**30:.0f} are needed")
    return text


def gpus() -> str:
    """NVIDIA devices that the executor counts and that torch sees."""
    if shutil.which("nvidia-smi") is None:
        return "none: CPU slots"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    if result.returncode != 0:
        raise CheckFailedError(f"nvidia-smi fails: {(result.stdout + result.stderr).strip()[:200]}")
    names = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    if not names:
        return "none: CPU slots"
    script = "import torch; print(torch.cuda.device_count(), torch.__version__, torch.version.cuda)"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
    )
    found, *build = result.stdout.split() or ["0", "missing", "None"]
    # CUDA_VISIBLE_DEVICES may hide devices from both this process and a training.
    if int(found) == 0 and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise CheckFailedError(
            f"nvidia-smi lists {len(names)} × {names[0]}, but torch {build[0]} (CUDA {build[1]}) sees none"
        )
    return f"{len(names)} × {names[0]}; torch sees {found}"


def executors() -> str:
    """Resolve the alias `gpu` as the scheduler does, in a process of its own: this one never loads Airflow."""
    script = (
        "from airflow.executors.executor_loader import ExecutorLoader as loader; "
        "print(loader.import_executor_cls(loader.lookup_executor_name_by_str('gpu'))[0].__name__)"
    )
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = StackSettings(home=Path(folder), airflow_port=1, mlflow_port=2, s3_port=3)
        elsewhere.create_folders()
        environment = service_environment(elsewhere, Credentials())
        result = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
    lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
    if result.returncode != 0:
        raise CheckFailedError(f"the alias gpu cannot be resolved: {lines[-1] if lines else 'no output'}")
    return f"{EXECUTOR} ({lines[-1]})"


def airflow_health(url: str) -> str:
    """Ask Airflow for the health of its components."""
    with _direct() as http:
        answer = http.get(f"{url}/api/v2/monitor/health", timeout=COMMAND_SECONDS)
        answer.raise_for_status()
    parts = {name: part["status"] for name, part in answer.json().items() if part and part.get("status")}
    if ill := [f"{name} is {status}" for name, status in parts.items() if status != "healthy"]:
        raise CheckFailedError("; ".join(ill))
    return f"{', '.join(parts)} at {url}"


def dag(environ: Mapping[str, str]) -> str:
    """Log in, and see that the DAG can be triggered."""
    AirflowApi(*(environ.get(name, "") for name in AirflowApi.VARIABLES), retries=0).check_dag(DAG_ID)
    return f"{DAG_ID} can be triggered"


def s3_round_trip(environ: Mapping[str, str]) -> str:
    """Write, read back, compare and delete objects of several sizes."""
    client = s3_client(environ, read_timeout=COMMAND_SECONDS)
    bucket = environ.get("MLPIPE_S3_BUCKET") or DATA_BUCKET
    for size in ROUND_TRIP_SIZES:
        content = os.urandom(size)
        key = f"doctor/{hashlib.sha256(content).hexdigest()}"
        client.put_object(Bucket=bucket, Key=key, Body=content)
        try:
            back = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        finally:
            client.delete_object(Bucket=bucket, Key=key)
        if back != content:
            raise CheckFailedError(f"an object of {size} bytes came back as {len(back)} other bytes")
    return f"objects of {', '.join(f'{size:,}' for size in ROUND_TRIP_SIZES)} bytes came back unchanged"


def mlflow_version(environ: Mapping[str, str]) -> str:
    """Compare the MLflow versions on the server and here."""
    with _direct() as http:
        answer = http.get(
            f"{environ['MLFLOW_TRACKING_URI'].rstrip('/')}/version",
            auth=_mlflow_login(environ),
            timeout=COMMAND_SECONDS,
        )
    answer.raise_for_status()
    there, here = answer.text.strip()[:40], importlib.metadata.version("mlflow")
    if there != here:
        raise CheckWarningError(f"{there} on the server, {here} here")
    return f"{there} on both sides"


def artifact_round_trip(environ: Mapping[str, str]) -> str:
    """Send a file through MLflow's proxy, as a client without S3 keys does, and compare the returned bytes."""
    content = os.urandom(2**20 + 1)
    base = f"{environ['MLFLOW_TRACKING_URI'].rstrip('/')}/api/2.0/mlflow-artifacts/artifacts/doctor"
    url = f"{base}/{hashlib.sha256(content).hexdigest()}"
    with _direct() as http:
        http.auth = _mlflow_login(environ)
        http.put(url, data=content, timeout=COMMAND_SECONDS).raise_for_status()
        try:
            answer = http.get(url, timeout=COMMAND_SECONDS)
            answer.raise_for_status()
        finally:
            http.delete(url, timeout=COMMAND_SECONDS)
    if answer.content != content:
        raise CheckFailedError(f"an artifact of {len(content)} bytes came back as {len(answer.content)} other bytes")
    return f"a file of {len(content):,} bytes came back unchanged"


def secrets(settings: StackSettings) -> str:
    """Check that only their owner can read the secrets."""
    for path in (settings.credentials_path, settings.airflow_home / "passwords.json"):
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise CheckFailedError(f"other users can read {path} (mode {mode:o})")
    return "only their owner can read them"


def _mlflow_login(environ: Mapping[str, str]) -> tuple[str, str] | None:
    user = environ.get("MLFLOW_TRACKING_USERNAME")
    return (user, environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None


def _direct() -> requests.Session:
    """A session without the environment's proxy: this project's services are not behind it."""
    session = requests.Session()
    session.trust_env = False
    return session


def _healthy(problem: str | None) -> str:
    if problem:
        raise CheckFailedError(problem)
    return "healthy"


def _finding(name: str, check: Callable[[], str], remedy: str) -> Finding:
    from botocore.exceptions import BotoCoreError, ClientError

    own = (CheckFailedError, UserError, OSError, subprocess.SubprocessError)
    try:
        return Finding(name=name, ok=True, detail=check())
    except (*own, requests.RequestException, BotoCoreError, ClientError) as error:
        well = isinstance(error, CheckWarningError)
        return Finding(name=name, ok=well, detail=" ".join(str(error).split()), remedy=remedy)
