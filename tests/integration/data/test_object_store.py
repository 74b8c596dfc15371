"""SeaweedFS with boto3's checksum trailers, which some servers have stored as content (seaweedfs#6548)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from mlpipe.data.storage.store import ObjectStore

MIB = 1 << 20


@pytest.mark.integration
@pytest.mark.parametrize("num_bytes", [0, 1, 5 * MIB + 3, 64 * MIB, 64 * MIB + 7, 100 * MIB + 1])
def test_every_size_comes_back_byte_for_byte(store: ObjectStore, tmp_path: Path, num_bytes: int) -> None:
    content = np.random.default_rng(num_bytes).bytes(num_bytes)
    sha256 = hashlib.sha256(content).hexdigest()
    (tmp_path / "sent").write_bytes(content)
    store.put_file("a/file", tmp_path / "sent", sha256)
    store.get_file("a/file", tmp_path / "received", sha256)
    assert (tmp_path / "received").read_bytes() == content
    head = store.head("a/file")
    assert head is not None
    assert (head["bytes"], head["sha256"]) == (num_bytes, sha256)
    if num_bytes < 10 * MIB:
        store.put_bytes("a/bytes", content)
        assert store.get_bytes("a/bytes") == content


@pytest.mark.integration
@pytest.mark.parametrize("num_bytes", [0, 1, 16 * MIB - 1, 16 * MIB, 16 * MIB + 1, 100 * MIB + 1])
def test_upload_in_parts_comes_back_byte_for_byte(store: ObjectStore, tmp_path: Path, num_bytes: int) -> None:
    content = np.random.default_rng(num_bytes).bytes(num_bytes)
    with store.upload("a/file", num_bytes) as upload:
        for start in range(0, num_bytes, 5 * MIB + 1):
            upload.write(memoryview(content)[start : start + 5 * MIB + 1])
        assert not store.exists("a/file")
        etag = upload.close()
    head = store.head("a/file")
    assert head is not None
    assert (head["bytes"], head["etag"]) == (num_bytes, etag)
    store.get_file("a/file", tmp_path / "received", hashlib.sha256(content).hexdigest())
