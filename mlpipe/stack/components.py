"""The supervised components: how each is started and where it shows itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlpipe.errors import UserError
from mlpipe.stack.local import ARTIFACT_BUCKET, DATA_BUCKET, StackSettings
from mlpipe.stack.ports import LOOPBACK

STORAGE = "seaweedfs"
TRACKING = "mlflow"
AIRFLOW = ("api-server", "scheduler", "dag-processor", "triggerer")
NAMES = (STORAGE, TRACKING, *AIRFLOW)

PRELOAD = "AIRFLOW__GPU_EXECUTOR__PRELOAD"
PRELOADED = "mlflow,boto3,pandas,sklearn.metrics,sklearn.model_selection,matplotlib.figure"
"""What the stages import besides torch: in the scheduler once, not in each task."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One supervised process."""

    name: str
    command: tuple[str, ...]
    log: Path
    stop_seconds: int = 10
    """Until it is killed when asked to stop."""
    url: str | None = None
    """Where a person or a client finds it."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of its own, over those of all components."""


def components(settings: StackSettings) -> tuple[Component, ...]:
    """All components, in the order in which they are of use.

    Raises:
        UserError: a program is not installed.
    """
    airflow = program("airflow")

    def component(name: str, command: tuple[str, ...], **more: Any) -> Component:
        return Component(name=name, command=command, log=settings.logs / f"{name}.log", **more)

    return (
        component(STORAGE, _storage(settings), url=settings.s3_url),
        component(
            TRACKING,
            (sys.executable, "-m", "mlpipe.stack.mlflow_server", LOOPBACK, str(settings.mlflow_port)),
            url=settings.mlflow_url,
            environment={
                "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{settings.mlflow_database}?timeout=60",
                "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{ARTIFACT_BUCKET}",
            },
        ),
        # The API server is done at once, but threads of its database driver keep the process.
        component("api-server", (airflow, "api-server"), url=settings.airflow_url, stop_seconds=3),
        # The log servers of this and of the triggerer would listen on all addresses; the API server reads the files.
        component(
            "scheduler",
            (airflow, "scheduler", "--skip-serve-logs"),
            environment={PRELOAD: os.environ.get(PRELOAD, PRELOADED)},
        ),
        component("dag-processor", (airflow, "dag-processor")),
        component("triggerer", (airflow, "triggerer", "--skip-serve-logs")),
    )


def program(name: str) -> str:
    """Path of a program installed beside this Python.

    Raises:
        UserError: it is not installed.
    """
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise UserError(
            f"{name}: not installed beside {sys.executable}; run `make install`, or install mlpipe[airflow,local-stack]"
        )
    return str(path)


def _storage(settings: StackSettings) -> tuple[str, ...]:
    master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3_grpc, admin, admin_grpc = settings.storage_ports
    options: dict[str, object] = {
        "dir": settings.data / "objects",
        "bucket": f"{DATA_BUCKET},{ARTIFACT_BUCKET}",
        "ip": LOOPBACK,
        "ip.bind": LOOPBACK,
        "s3.port": settings.s3_port,
        "s3.port.grpc": s3_grpc,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.iam": "false",
        "webdav": "false",
        "webdav.cacheDir": settings.run,
        "admin.ui": "false",
        "admin.port": admin,
        "admin.port.grpc": admin_grpc,
        "master.port": master,
        "master.port.grpc": master_grpc,
        "master.telemetry": "false",
        "volume.port": volume,
        "volume.port.grpc": volume_grpc,
        "volume.id": "local",  # else it is its address, which may change from start to start
        "filer.port": filer,
        "filer.port.grpc": filer_grpc,
        "filer.localSocket": settings.socket.with_name("filer.sock"),
        "s3.localSocket": settings.socket.with_name("s3.sock"),
        "filer.disableDirListing": "true",
    }
    return (program("weed"), "mini", *(f"-{name}={value}" for name, value in options.items()))
