from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mlpipe.data.store import ObjectStore
from mlpipe.environment import Environment
from mlpipe.errors import UserError


def test_file_comes_back_byte_for_byte(store: ObjectStore, tmp_path: Path) -> None:
    content = bytes(range(256)) * 1000 + b"\r\n\0"
    (tmp_path / "a").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    store.put_file("x/a", tmp_path / "a", sha256)
    store.get_file("x/a", tmp_path / "b", sha256)
    assert (tmp_path / "b").read_bytes() == content
    assert store.head("x/a") == {"bytes": len(content), "sha256": sha256}
    assert store.uri("x/a") == f"s3://{store.bucket}/x/a"


def test_first_writer_wins(store: ObjectStore) -> None:
    assert store.put_bytes("a", b"first", if_absent=True)
    assert not store.put_bytes("a", b"second", if_absent=True)
    assert store.get_bytes("a") == b"first"
    assert store.put_bytes("a", b"third")
    assert store.get_bytes("a") == b"third"


def test_missing_objects(store: ObjectStore, tmp_path: Path) -> None:
    assert not store.exists("nothing")
    store.delete("nothing")
    with pytest.raises(FileNotFoundError, match="nothing"):
        store.get_bytes("nothing")
    with pytest.raises(FileNotFoundError, match="nothing"):
        store.get_file("nothing", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_damaged_object_leaves_no_file(store: ObjectStore, tmp_path: Path) -> None:
    store.put_bytes("a", b"damaged")
    with pytest.raises(OSError, match="damaged"):
        store.get_file("a", tmp_path / "file", hashlib.sha256(b"whole").hexdigest())
    assert list(tmp_path.iterdir()) == []


def test_list_is_of_one_folder(store: ObjectStore) -> None:
    for key in ("a/2", "a/1", "ab/3", "b"):
        store.put_bytes(key, b"")
    assert store.list("a") == ["a/1", "a/2"]
    assert store.list("nothing") == []


@pytest.mark.parametrize("key", ["", "/a", "a/../b", "..", "a//b", "a/", "./a", "a\\b", "a\nb", "a" * 1025])
def test_keys_stay_under_their_prefix(store: ObjectStore, key: str) -> None:
    with pytest.raises(ValueError, match="^key: "):
        store.put_bytes(key, b"")
    with pytest.raises(ValueError, match="^key: "):
        store.exists(key)


@pytest.mark.usefixtures("s3_endpoint")
def test_bucket_is_created_when_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPIPE_S3_BUCKET", "made-on-demand")
    for _ in range(2):
        ObjectStore.from_environment(Environment.from_env()).put_bytes("a", b"1")


@pytest.mark.usefixtures("s3_endpoint")
def test_no_keys_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match="AWS_ACCESS_KEY_ID"):
        ObjectStore("some-bucket").exists("a")
