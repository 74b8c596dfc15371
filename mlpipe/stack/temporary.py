"""A stack, or its object store alone, for as long as a block of code runs: for tests and measurements."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import requests

from mlpipe.stack.components import program
from mlpipe.stack.lifecycle import down, tail, up
from mlpipe.stack.local import StackSettings
from mlpipe.stack.ports import free_block


@contextlib.contextmanager
def running_stack(home: Path, timeout: float = 240.0) -> Iterator[StackSettings]:
    """Start a stack of its own on free ports, and stop it at the end; its state stays in `home`.

    Raises:
        UserError: it did not start.
        RuntimeError: at the end processes are left.
    """
    airflow_port, mlflow_port, s3_port, _ = free_block(3)
    settings = StackSettings.load(home, airflow_port=airflow_port, mlflow_port=mlflow_port, s3_port=s3_port)
    try:
        settings, _ = up(settings, lambda *_: None, timeout)
        yield settings
    finally:
        if left := down(settings):
            raise RuntimeError(f"processes {left} could not be stopped")


@contextlib.contextmanager
def running_object_store(
    folder: Path, timeout: float = 60.0, launcher: Sequence[str] = (), volume_mib: int = 16
) -> Iterator[dict[str, str]]:
    """Start SeaweedFS on free ports with its data in `folder`; gives boto3's variables that name it and its keys.

    Args:
        launcher: a command that prepares its place and then becomes the command that follows.
        volume_mib: size of the files that objects are written into. Each bucket takes several, of which there are as
            many as fit on the disk, so small ones do for tests; to write large objects takes several times as long.

    Raises:
        RuntimeError: it did not start.
    """
    names = [
        f"{part}.{kind}" for part in ("master", "volume", "filer", "s3", "admin") for kind in ("port", "port.grpc")
    ]
    ports = dict(zip(names, free_block(len(names)), strict=False))
    flags = [f"-{name}={port}" for name, port in ports.items()]
    off = ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    command = [
        *launcher,
        program("weed"),
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *flags,
        *off,
        f"-master.volumeSizeLimitMB={volume_mib}",
    ]
    keys = {"AWS_ACCESS_KEY_ID": secrets.token_hex(8), "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16)}
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    log = folder / "weed.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, **keys}, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_up(endpoint, process, log, timeout)
        yield {**keys, "AWS_ENDPOINT_URL_S3": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
    finally:
        process.kill()  # it would take ten seconds to say goodbye, and its data are thrown away
        process.wait(10)


def _wait_until_up(endpoint: str, process: subprocess.Popen[bytes], log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(requests.RequestException):
            requests.get(f"{endpoint}/status", timeout=2)
            return
        time.sleep(0.1)
    raise RuntimeError(f"SeaweedFS did not start: {tail(log, 20)}")
