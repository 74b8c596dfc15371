from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mlpipe.data.storage import store as store_module
from mlpipe.data.storage.store import ObjectStore
from mlpipe.environment import Environment
from mlpipe.errors import UserError


def test_file_comes_back_byte_for_byte(store: ObjectStore, tmp_path: Path) -> None:
    content = bytes(range(256)) * 1000 + b"\r\n\0"
    (tmp_path / "a").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    store.put_file("x/a", tmp_path / "a", sha256)
    store.get_file("x/a", tmp_path / "b", sha256)
    assert (tmp_path / "b").read_bytes() == content
    head = store.head("x/a")
    assert head is not None
    assert (head["bytes"], head["sha256"]) == (len(content), sha256)
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


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """S3's least size of a part but the last."""
    monkeypatch.setattr(store_module, "PART_BYTES", 5 << 20)
    return 5 << 20


@pytest.mark.parametrize("extra", [-1, 0, 1, 12 << 20])
def test_upload_piece_by_piece(store: ObjectStore, small_parts: int, extra: int) -> None:
    content = bytes(range(256)) * ((small_parts + (13 << 20)) // 256)
    content = content[: small_parts + extra]
    with store.upload("a", len(content)) as upload:
        for start in range(0, len(content), 3_000_001):
            upload.write(memoryview(content)[start : start + 3_000_001])
        assert store.head("a") is None
        etag = upload.close()
    assert store.get_bytes("a") == content
    assert store.head("a") == {"bytes": len(content), "etag": etag, "sha256": None}


@pytest.mark.parametrize("num_parts", [0, 3])
def test_upload_that_fails_leaves_nothing(store: ObjectStore, small_parts: int, num_parts: int) -> None:
    def fail() -> None:
        with store.upload("a", 50 << 20) as upload:
            upload.write(bytes(num_parts * small_parts + 1))
            raise EOFError

    with pytest.raises(EOFError):
        fail()
    assert store.head("a") is None
    assert not store._client.list_multipart_uploads(Bucket=store.bucket).get("Uploads")


def test_upload_has_the_length_that_was_promised(store: ObjectStore) -> None:
    with store.upload("a", 2) as upload:
        upload.write(b"1")
        with pytest.raises(ValueError, match="1 bytes are missing"):
            upload.close()
        with pytest.raises(ValueError, match="2 bytes, but only 1 are left"):
            upload.write(b"23")
    assert store.head("a") is None


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
