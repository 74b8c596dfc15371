"""Where the local stack keeps its state, which ports it uses, and what a client needs to reach it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from mlpipe.errors import UserError
from mlpipe.stack.credentials import Credentials
from mlpipe.stack.files import private_folder, read_json, write_private
from mlpipe.stack.ports import LOOPBACK, all_free, free_block

PACKAGE = Path(__file__).resolve().parents[1]
PROJECT = PACKAGE.parent if (PACKAGE.parent / "dags").is_dir() else None
"""The checkout; `None`: the package was installed from a wheel."""

DEFAULT_PORTS = {"airflow_port": 8080, "mlflow_port": 5000, "s3_port": 8333}

DATA_BUCKET = "mlpipe"
"""Data sets, sources, weights and checkpoints."""
ARTIFACT_BUCKET = "mlflow"
"""What MLflow stores for its clients."""

MAX_SOCKET_PATH = 90
"""Bytes; a Unix socket's address holds 104 on macOS and 108 on Linux, and supervisord adds a suffix while binding."""

NOT_IN_HOME = re.compile(r'[%"\r\n]|\s[#;]')
"""What supervisord reads otherwise in some option, however it is escaped."""

NUM_STORAGE_PORTS = 9
"""Eight in a row, and the last one's gRPC port."""


@dataclass(frozen=True, kw_only=True)
class StackSettings:
    """One local stack. Nothing is created by loading the settings."""

    home: Path
    """State folder (MLPIPE_HOME): all data, logs and secrets. Default `.mlpipe` in the checkout, or where there is
    none in the current folder."""
    airflow_port: int
    """Of Airflow's UI and API (MLPIPE_AIRFLOW_PORT)."""
    mlflow_port: int
    """Of MLflow's UI and API (MLPIPE_MLFLOW_PORT)."""
    s3_port: int
    """Of the object store's S3 API (MLPIPE_S3_PORT)."""
    storage_ports: tuple[int, ...] = ()
    """Of the object store's parts among themselves; chosen at the first start."""

    @classmethod
    def load(cls, home: Path | None = None, **ports: int | None) -> Self:
        """Settings from arguments, environment variables, the last start and defaults, in this order.

        Args:
            home: state folder.
            ports: `airflow_port`, `mlflow_port`, `s3_port`; `None` is as not given.

        Raises:
            UserError: a port is not a number from 1 to 65535.
        """
        home = (
            (home or Path(os.environ.get("MLPIPE_HOME") or (PROJECT or Path.cwd()) / ".mlpipe")).expanduser().resolve()
        )
        remembered = _remembered(home)
        values: dict[str, Any] = {}
        for name, default in DEFAULT_PORTS.items():
            setting = f"MLPIPE_{name.upper()}"
            given = [ports.get(name), os.environ.get(setting), remembered.get(name), default]
            values[name] = _port(setting, next(value for value in given if value not in (None, "")))
        return cls(home=home, storage_ports=tuple(remembered.get("storage_ports", ())), **values)

    def with_storage_ports(self) -> Self:
        """These settings with usable inner ports of the object store: the last ones, or new ones if they are taken.

        Raises:
            OSError: no ports are free.
        """
        ports = self.storage_ports
        public = set(self.public_ports.values())
        if len(ports) != NUM_STORAGE_PORTS or set(ports) & public or not all_free(ports):
            ports = free_block(NUM_STORAGE_PORTS - 1, avoid=public)
        return replace(self, storage_ports=ports)

    def remember(self) -> None:
        """Keep the ports for later starts and for clients."""
        values = {**self.public_ports, "storage_ports": self.storage_ports}
        write_private(self.home / "stack.json", json.dumps(values, indent=2) + "\n")

    def remembered(self) -> dict[str, Any]:
        """The ports of the last start."""
        return _remembered(self.home)

    @property
    def public_ports(self) -> dict[str, int]:
        """The three ports that a user chooses."""
        return {name: getattr(self, name) for name in DEFAULT_PORTS}

    @property
    def airflow_url(self) -> str:
        return f"http://{LOOPBACK}:{self.airflow_port}"

    @property
    def mlflow_url(self) -> str:
        return f"http://{LOOPBACK}:{self.mlflow_port}"

    @property
    def s3_url(self) -> str:
        return f"http://{LOOPBACK}:{self.s3_port}"

    @property
    def data(self) -> Path:
        """Databases and objects."""
        return self.home / "data"

    @property
    def logs(self) -> Path:
        """One rotated file per component; Airflow's task logs in `airflow/`."""
        return self.home / "logs"

    @property
    def run(self) -> Path:
        """What is true only while the stack runs."""
        return self.home / "run"

    @property
    def airflow_home(self) -> Path:
        return self.home / "airflow"

    @property
    def dags(self) -> Path:
        return (PROJECT or PACKAGE) / "dags"

    @property
    def credentials_path(self) -> Path:
        return self.home / "credentials.json"

    @property
    def airflow_database(self) -> Path:
        return self.data / "airflow.db"

    @property
    def mlflow_database(self) -> Path:
        return self.data / "mlflow.db"

    @cached_property
    def socket(self) -> Path:
        """Where a supervisor listens that is started now: in /tmp if the state path is too long for a socket's address.

        Other temporary folders are not the same in each shell.
        """
        inside = self.run / "supervisor.sock"
        if len(os.fsencode(inside)) <= MAX_SOCKET_PATH:
            return inside
        name = hashlib.sha256(os.fsencode(self.home)).hexdigest()[:12]
        return Path("/tmp") / f"mlpipe-{os.getuid()}-{name}" / "s.sock"  # noqa: S108 - `create_folders` checks its owner

    def create_folders(self) -> None:
        """Make the state folder and its parts, for the owner only.

        Raises:
            UserError: the folder cannot be made or named in the supervisor's configuration, or the socket's folder
                belongs to somebody else.
        """
        if found := NOT_IN_HOME.search(str(self.home)):
            raise UserError(
                f"MLPIPE_HOME: {str(self.home)!r} has {found[0]!r}, which the supervisor's configuration cannot hold; "
                'choose a folder without %, ", line breaks or white space before # or ;'
            )
        try:
            for path in (self.home, self.data, self.data / "objects", self.logs, self.run, self.airflow_home):
                private_folder(path)
            private_folder(self.socket.parent)
        except OSError as error:
            raise UserError(
                f"MLPIPE_HOME: {str(self.home)!r} cannot be used ({error}); choose another folder"
            ) from None
        owner = self.socket.parent.stat().st_uid
        if owner != os.getuid() or self.socket.parent.is_symlink():
            raise UserError(f"{self.socket.parent}: belongs to user {owner}; remove it, or set a shorter MLPIPE_HOME")

    def client_environment(self) -> dict[str, str]:
        """Environment variables with which a process on this machine reaches the stack.

        Raises:
            UserError: no stack was started yet.
        """
        credentials = Credentials.load(self.credentials_path)
        return {
            **self.service_addresses(credentials),
            "MLPIPE_AIRFLOW_URL": self.airflow_url,
            "MLPIPE_AIRFLOW_USER": credentials.airflow_user,
            "MLPIPE_AIRFLOW_PASSWORD": credentials.airflow_password,
        }

    def mlflow_environment(self, credentials: Credentials) -> dict[str, str]:
        """Environment variables with which any program reaches MLflow; its login is Airflow's."""
        return {
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "MLFLOW_TRACKING_USERNAME": credentials.airflow_user,
            "MLFLOW_TRACKING_PASSWORD": credentials.airflow_password,
        }

    def service_addresses(self, credentials: Credentials) -> dict[str, str]:
        """The part that stages need as well: where MLflow and the object store are, and their login and keys."""
        return {
            "MLPIPE_HOME": str(self.home),
            "MLPIPE_SHARED_FILES": "true",
            "MLPIPE_S3_BUCKET": DATA_BUCKET,
            "MLPIPE_CACHE_DIR": str(self.home / "cache"),
            "MLPIPE_MLFLOW_UI_URL": self.mlflow_url,
            "MLPIPE_AIRFLOW_UI_URL": self.airflow_url,
            **self.mlflow_environment(credentials),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "AWS_ENDPOINT_URL_S3": self.s3_url,
            "AWS_ACCESS_KEY_ID": credentials.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": credentials.s3_secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": no_proxy(os.environ),
            "no_proxy": no_proxy(os.environ),
        }


def no_proxy(environ: Mapping[str, str]) -> str:
    """The hosts that are reached without a proxy, with this machine among them."""
    given = [host for name in ("NO_PROXY", "no_proxy") for host in environ.get(name, "").split(",") if host]
    # In a list, the star would no longer stand for all hosts.
    return "*" if "*" in given else ",".join(dict.fromkeys([*given, LOOPBACK, "localhost"]))


def _remembered(home: Path) -> dict[str, Any]:
    try:
        return read_json(home / "stack.json")
    except ValueError:  # damaged: the defaults will do
        return {}


def _port(setting: str, value: Any) -> int:
    port = 0
    with contextlib.suppress(ValueError, TypeError):
        port = int(value)
    if not 1 <= port <= 65_535:
        raise UserError(f"{setting}: {value!r} is not a port; give a number from 1 to 65535")
    return port
