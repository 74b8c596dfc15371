"""What a worker reads for whoever triggers a DAG."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlpipe.data.storage import allowed
from mlpipe.data.storage.uris import fetch_uri, list_s3_folder, version_of
from mlpipe.errors import UserError
from tests.web import web_server


@pytest.fixture
def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As docker-compose.yml limits workers; the folder whose files may be read."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv(allowed.FILES, str(folder))
    monkeypatch.setenv(allowed.HOSTS, "public")
    monkeypatch.setenv(allowed.BUCKETS, "mlpipe")
    return folder


@pytest.mark.parametrize(
    "uri", ["/etc/passwd", "file:///etc/passwd", "{data}/../../../../../../etc/passwd", "{data}/link"]
)
def test_files_elsewhere_are_not_read(uri: str, limited: Path, tmp_path: Path) -> None:
    (limited / "link").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match=r"^data_uri: .* may not be read by workers"):
        fetch_uri(uri.format(data=limited), tmp_path / "got", field="data_uri")
    assert not (tmp_path / "got").exists()


def test_files_in_the_folder_are_read(limited: Path, tmp_path: Path) -> None:
    (limited / "pets.zip").write_bytes(b"content")
    assert fetch_uri(f"{limited}/pets.zip", tmp_path / "got", field="data_uri").num_bytes == 7


@pytest.mark.parametrize(
    "uri", ["http://169.254.169.254/latest/meta-data/", "http://127.0.0.1:5000/", "http://10.1.2.3/x", "http://[::1]/x",
     "http://[64:ff9b::7f00:1]/x", "http://[2002:7f00:1::]/x", "http://[fec0::1]/x", "http://[::ffff:10.1.2.3]/x"],
)  # fmt: skip
@pytest.mark.usefixtures("limited")
def test_private_addresses_are_not_asked(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^weights: the host .* may not be asked"):
        fetch_uri(uri, tmp_path / "got", field="weights")
    assert version_of(uri, field="weights") is None


@pytest.mark.usefixtures("limited")
def test_a_name_that_only_a_proxy_knows_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with web_server((200, {}, b"secret")) as (proxy, requests):
        monkeypatch.setenv("http_proxy", proxy)
        with pytest.raises(UserError, match=r"^data_uri: the host 'wiki\.invalid' is not known here"):
            fetch_uri("http://wiki.invalid/x", tmp_path / "got", field="data_uri")
        monkeypatch.setenv(allowed.HOSTS, "public,wiki.invalid")
        assert fetch_uri("http://wiki.invalid/x", tmp_path / "got", field="data_uri").num_bytes == 6
    assert len(requests) == 1


@pytest.mark.usefixtures("limited")
def test_a_path_with_a_null_byte_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^data_uri: .* is not a usable path"):
        fetch_uri("file:///data/%00", tmp_path / "got", field="data_uri")


@pytest.fixture
def redirecting() -> Iterator[str]:
    """A server that sends everybody on to the address that machines in a cloud ask for their secrets."""

    with web_server((302, {"Location": "http://169.254.169.254/latest/meta-data/"}, b"")) as (address, _):
        yield f"{address}/x"


@pytest.mark.usefixtures("limited")
def test_redirects_are_looked_at(redirecting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(allowed.HOSTS, "public,127.0.0.1")
    with pytest.raises(UserError, match=r"the host '169\.254\.169\.254' may not be asked"):
        fetch_uri(redirecting, tmp_path / "got", field="data_uri")


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("uri", ["s3://mlflow/1/secret.zip", "s3://mlflow/1/"])
def test_other_buckets_are_not_read(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the bucket 'mlflow' may not be read"):
        list_s3_folder(uri, field="data_uri") if uri.endswith("/") else fetch_uri(uri, tmp_path / "g", field="data_uri")
