from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tenacity import stop_after_attempt, wait_none

from mlpipe.data.storage import uris
from mlpipe.data.storage.store import ObjectStore
from mlpipe.data.storage.uris import fetch_uri, version_of
from mlpipe.errors import UserError


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uris, "_RETRIES", {"stop": stop_after_attempt(3), "wait": wait_none()})


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """Where to fetch to; nothing else may be left there by what fails."""
    folder = tmp_path / "target"
    yield folder / "file"
    assert not folder.exists() or [path.name for path in folder.iterdir()] in ([], ["file"])


def refused(uri: str, target: Path, match: str, **options: int) -> str:
    with pytest.raises(UserError, match=match) as caught:
        fetch_uri(uri, target, field="data_uri", **options)
    message = str(caught.value)
    assert message.startswith("data_uri: ")
    assert "\n" not in message
    assert not target.exists()
    return message


def test_local_files(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "a b#c?.zip"
    source.write_bytes(b"content")
    for uri in (str(source), source.as_uri()):
        fetched = fetch_uri(uri, target, field="data_uri")
        assert target.read_bytes() == b"content"
        assert (fetched.num_bytes, fetched.sha256) == (7, hashlib.sha256(b"content").hexdigest())


def test_unusable_local_files(tmp_path: Path, target: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "file").write_bytes(b"12345678")
    refused(str(tmp_path / "none.zip"), target, "none.zip does not exist where this task runs")
    refused(str(tmp_path), target, "is a folder")
    refused(str(tmp_path / "empty"), target, "empty")
    refused("/dev/null", target, "not a regular file")
    refused("x" * 5000, target, "not a usable path")
    refused("a\0b", target, "data_uri")
    refused("~no-such-user/x.zip", target, "no-such-user/x.zip does not exist")
    refused(f"file://other/{tmp_path}/file", target, "another host")
    refused(str(tmp_path / "file"), target, "at most", max_bytes=7)


def test_unsupported_scheme(target: Path) -> None:
    assert "pass" not in refused("ftp://user:pass@host/a.zip", target, "ftp:// .* is not supported")


@pytest.mark.parametrize(
    "address",
    [
        "mlflow-artifacts://attacker/uploads/" + "0" * 64 + "/a.zip",
        "mlflow-artifacts:///1/artifacts/a.zip",
        "mlflow-artifacts:///uploads/" + "0" * 64 + "/../a.zip",
    ],
    ids=["another host", "a run's artifact", "out of its folder"],
)
def test_only_uploads_are_fetched_from_mlflow(address: str, target: Path) -> None:
    refused(address, target, "is no upload of `mlpipe run`")


def test_http(make: SimpleNamespace, target: Path) -> None:
    with make.web_server((200, {}, b"content")) as (address, _):
        assert fetch_uri(f"{address}/a.zip", target, field="data_uri").num_bytes == 7
    assert target.read_bytes() == b"content"


def test_http_checksum_in_the_fragment(make: SimpleNamespace, target: Path) -> None:
    sha256 = hashlib.sha256(b"content").hexdigest()
    with make.web_server((200, {}, b"content")) as (address, requests):
        fetch_uri(f"{address}/a#sha256={sha256}", target, field="data_uri")
        target.unlink()
        refused(f"{address}/a#sha256={'0' * 64}", target, f"has sha256 {sha256} instead of 0000")
        refused(f"{address}/a#md5=1", target, "give #sha256=<64 hex digits>")
    assert requests == ["GET /a", "GET /a"]


@pytest.mark.parametrize(
    ("status", "match"),
    [(404, "does not exist"), (403, "refuses access"), (401, "refuses access"), (418, "status 418")],
)
def test_http_mistakes_are_not_tried_again(make: SimpleNamespace, target: Path, status: int, match: str) -> None:
    with make.web_server((status, {}, b"")) as (address, requests):
        message = refused(f"{address}/a.zip?X-Signature=secret", target, match)
        assert "secret" not in message
    assert len(requests) == 1


def test_http_busy_server_is_tried_again(make: SimpleNamespace, target: Path) -> None:
    with make.web_server((503, {}, b""), (200, {"Content-Length": "100"}, b"cut"), (200, {}, b"ok")) as (address, _):
        fetch_uri(f"{address}/a", target, field="data_uri")
    assert target.read_bytes() == b"ok"


@pytest.mark.parametrize("answer", [(500, {}, b""), (200, {"Content-Length": "100"}, b"cut")])
def test_http_lasting_failures_may_heal(
    make: SimpleNamespace, target: Path, answer: object, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        make.web_server(answer) as (address, requests),
        pytest.raises(ConnectionError) as caught,
    ):
        fetch_uri(f"{address.replace('//', '//user:password@')}/a?token=secret", target, field="data_uri")
    assert not isinstance(caught.value, ValueError)
    assert len(requests) == 3
    for text in (str(caught.value), caplog.text):
        assert "secret" not in text
        assert "password" not in text


def test_http_size_limit(make: SimpleNamespace, target: Path) -> None:
    with make.web_server((200, {}, b"x" * 1000)) as (address, _):
        refused(f"{address}/a", target, "at most", max_bytes=999)
    with make.web_server((200, {}, b"")) as (address, _):
        refused(f"{address}/a", target, "empty")


def test_nobody_listens(target: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    refused(f"http://127.0.0.1:{port}/a.zip", target, "cannot be reached .*refused.*check the address")


def test_unknown_host(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    refused("http://no-such-host.invalid/a.zip", target, "host .* is not known")


@pytest.mark.parametrize("uri", ["http://", "http://[::1/a", "http://a b/c", "https://host:port/x"])
def test_malformed_addresses(target: Path, uri: str) -> None:
    refused(uri, target, "data_uri")


def test_s3(store: ObjectStore, target: Path) -> None:
    store.put_bytes("a/b.zip", b"content")
    fetch_uri(store.uri("a/b.zip"), target, field="data_uri")
    assert target.read_bytes() == b"content"
    target.unlink()
    refused(store.uri("a/none.zip"), target, "none.zip does not exist")
    refused("s3://no-such-bucket-here/a.zip", target, "no-such-bucket-here.* does not exist")
    refused("s3://bucket-alone", target, "names no file")
    refused("s3://UPPER CASE/a", target, "data_uri")
    refused("s3://bucket/../other/a.zip", target, r"has '\.' or '\.\.' in its key")
    refused(store.uri("a/b.zip"), target, "at most", max_bytes=3)


@pytest.mark.usefixtures("s3_endpoint")
def test_s3_without_keys(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong" * 8)
    refused("s3://some-bucket/a.zip", target, "the keys that are set may not read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    refused("s3://some-bucket/a.zip", target, "needs keys and none are set")


@pytest.mark.usefixtures("s3_endpoint")
def test_s3_server_away_may_heal(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{closed.getsockname()[1]}")
    monkeypatch.setattr("mlpipe.data.storage.store._CLIENT_RETRIES", {"mode": "standard", "max_attempts": 1})
    with pytest.raises(ConnectionError):
        fetch_uri("s3://some-bucket/a.zip", target, field="data_uri")


def test_version_of(make: SimpleNamespace, store: ObjectStore) -> None:
    store.put_bytes("a", b"1")
    first = version_of(store.uri("a"), field="data_uri")
    assert version_of(store.uri("a"), field="data_uri") == first
    store.put_bytes("a", b"2")
    assert version_of(store.uri("a"), field="data_uri") != first
    with make.web_server((200, {"ETag": '"abc"'}, b"1")) as (address, _):
        assert version_of(f"{address}/a", field="data_uri") == '"abc" 1'
    with make.web_server((200, {}, b"1")) as (address, _):
        assert version_of(f"{address}/a", field="data_uri") is None
