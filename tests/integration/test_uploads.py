"""Uploads to a real MLflow server over a connection that breaks."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from rich.console import Console

from mlpipe.data.storage.uris import fetch_uri
from mlpipe.errors import UserError
from mlpipe.run_command import SHARED_FILES, uploaded
from mlpipe.tracking import uploads

pytestmark = pytest.mark.integration

PART = 1 << 20
NUM_BYTES = 5 * PART + 1000


@dataclass
class Link:
    """A relay to a server; what clients send through it."""

    address: str
    sent: int = 0
    breaks_at: float = float("inf")
    """Bytes after which the relay closes every connection."""
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def link_to(address: str) -> Iterator[Link]:
    target = urlsplit(address)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        link = Link(f"http://localhost:{listener.getsockname()[1]}")

        def relay(source: socket.socket, sink: socket.socket, *, counted: bool) -> None:
            with suppress(OSError), source, sink:
                while data := source.recv(1 << 16):
                    if counted:
                        with link.lock:
                            link.sent += len(data)
                        if link.sent > link.breaks_at:
                            break
                    sink.sendall(data)
                for each in (source, sink):
                    each.shutdown(socket.SHUT_RDWR)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    server = socket.create_connection((target.hostname or "", target.port or 80))
                    for ends, counted in (((client, server), True), ((server, client), False)):
                        threading.Thread(target=relay, args=ends, kwargs={"counted": counted}, daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield link


def test_a_broken_upload_goes_on_where_it_was(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PART_BYTES", PART)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(SHARED_FILES)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    archive = tmp_path / "pets and more.zip"
    archive.write_bytes(np.random.default_rng(0).bytes(NUM_BYTES))
    with link_to(environment["MLFLOW_TRACKING_URI"]) as link:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", link.address)
        link.breaks_at = 3.5 * PART
        with pytest.raises(UserError, match=r"pets and more\.zip could not be uploaded .* sends what is missing"):
            uploaded(str(archive), Console(quiet=True))
        link.sent, link.breaks_at = 0, float("inf")
        address = uploaded(str(archive), Console(quiet=True))
        assert 2 * PART < link.sent < 3 * PART
        link.sent = 0
        assert uploaded(str(archive), Console(quiet=True)) == address
        assert link.sent < PART / 10
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert address == f"mlflow-artifacts:///uploads/{sha256}/pets_and_more.zip#sha256={sha256}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment["MLFLOW_TRACKING_URI"])
    target = tmp_path / "fetched"
    assert fetch_uri(str(address), target, field="data_uri").sha256 == sha256
    assert target.read_bytes() == archive.read_bytes()
