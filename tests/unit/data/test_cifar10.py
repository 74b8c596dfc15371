from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlpipe.config import DataConfig
from mlpipe.data.dataset import open_dataset
from mlpipe.data.prepare import prepare_dataset
from mlpipe.data.sources import cifar10
from mlpipe.data.sources.cifar10 import OfficialArchive, is_python_archive, read_python_archive
from mlpipe.data.sources.fetch import fetch_source
from mlpipe.data.storage.store import ObjectStore, file_sha256
from mlpipe.data.storage.uris import MAX_BYTES
from mlpipe.errors import UserError

BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def batch(name: str, per_class: int = 2) -> dict[bytes, Any]:
    rng = np.random.default_rng(BATCHES.index(name))
    labels = list(range(10)) * per_class
    return {b"data": rng.integers(0, 256, (len(labels), 3072), np.uint8), b"labels": labels, b"batch_label": b"a batch"}


def official_files(**changed: bytes) -> dict[str, bytes]:
    """The archive's members in the order of the real one, which is not that of their names."""
    order = ["data_batch_4", "test_batch", "batches.meta", *(f"data_batch_{i}" for i in (2, 5, 1, 3))]
    meta = {b"label_names": [name.encode() for name in cifar10.CLASSES], b"num_vis": 3072}
    content = {name: pickle.dumps(meta if name == "batches.meta" else batch(name), protocol=2) for name in order}
    return {f"cifar-10-batches-py/{name}": value for name, value in (content | changed).items()}


@pytest.fixture
def archive(make: SimpleNamespace, tmp_path: Path) -> Path:
    return make.pack_tar(tmp_path / "cifar-10-python.tar.gz", official_files())


def official_of(path: Path, url: str = "http://127.0.0.1:9/unused") -> OfficialArchive:
    return OfficialArchive(url=url, sha256=file_sha256(path))


def test_reads_the_official_layout(archive: Path) -> None:
    assert is_python_archive(archive)
    images = read_python_archive(archive)
    assert images.classes == cifar10.CLASSES
    assert images.images_u8.shape == (120, 32, 32, 3)
    assert images.is_test.tolist() == [False] * 100 + [True] * 20
    for position, name in enumerate(BATCHES):
        expected = batch(name)
        part = slice(20 * position, 20 * position + 20)
        np.testing.assert_array_equal(
            images.images_u8[part], expected[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        )
        assert images.labels[part].tolist() == expected[b"labels"]


def test_through_to_a_published_data_set(archive: Path, store: ObjectStore, tmp_path: Path) -> None:
    data = DataConfig(dataset="cifar10", uri=str(archive))
    source = cifar10.fetch(data, store, max_bytes=MAX_BYTES, official=official_of(archive))
    assert source.kind == "cifar10"
    dataset = open_dataset(prepare_dataset(data, source, store).digest, store, tmp_path / "cache")
    assert dataset.manifest.classes == cifar10.CLASSES
    test = dataset.test_split()
    np.testing.assert_array_equal(test.images_u8[:], read_python_archive(archive).images_u8[100:])
    assert test.labels.tolist() == batch("test_batch")[b"labels"]


def test_own_source_is_downloaded_once(make: SimpleNamespace, archive: Path, store: ObjectStore) -> None:
    data = DataConfig(dataset="cifar10")
    with make.web_server((200, {}, archive.read_bytes())) as (address, requests):
        official = official_of(archive, f"{address}/cifar-10-python.tar.gz")
        first = cifar10.fetch(data, store, max_bytes=MAX_BYTES, official=official)
        assert cifar10.fetch(data, store, max_bytes=MAX_BYTES, official=official) == first
    assert requests == ["GET /cifar-10-python.tar.gz"]
    assert first.sha256 == official.sha256
    assert first.kind == "cifar10"


def test_own_source_out_of_reach(archive: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from tenacity import stop_after_attempt, wait_none

    monkeypatch.setattr("mlpipe.data.storage.uris._RETRIES", {"stop": stop_after_attempt(1), "wait": wait_none()})
    with pytest.raises(UserError, match="data_uri: .*or give the address of a copy"):
        cifar10.fetch(DataConfig(dataset="cifar10"), store, max_bytes=MAX_BYTES, official=official_of(archive))


def test_another_checksum_is_refused(archive: Path, store: ObjectStore) -> None:
    official = OfficialArchive(url="", sha256="0" * 64)
    message = "data_uri: .* has sha256 .*, but CIFAR-10's archive has 0000.*download it again"
    with pytest.raises(UserError, match=message):
        cifar10.fetch(DataConfig(dataset="cifar10", uri=str(archive)), store, max_bytes=MAX_BYTES, official=official)
    assert store.list("sources") == []


def test_the_images_layout_needs_cifar10s_classes(make: SimpleNamespace, store: ObjectStore, tmp_path: Path) -> None:
    right = make.pack_zip(tmp_path / "a.zip", make.image_tree(dict.fromkeys(cifar10.CLASSES, 1)))
    assert fetch_source(DataConfig(dataset="cifar10", uri=str(right)), store).kind == "images"
    wrong = make.pack_zip(tmp_path / "b.zip", make.image_tree({"cat": 1, "dog": 1}))
    with pytest.raises(UserError, match="data_uri: .*classes are cat, dog and not those of cifar10"):
        fetch_source(DataConfig(dataset="cifar10", uri=str(wrong)), store)


class Harm:
    """Runs a command when it is unpickled by pickle's own unpickler."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._path,))


class Codec:
    def __reduce__(self) -> tuple[Any, ...]:
        import _codecs

        return (_codecs.encode, ("x", "zlib"))


def test_pickles_run_nothing(make: SimpleNamespace, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    for harm in (Harm(touched), Codec()):
        evil = make.pack_tar(tmp_path / "evil.tar.gz", official_files(test_batch=pickle.dumps(harm, protocol=2)))
        with pytest.raises(UserError, match="the pickle wants"):
            read_python_archive(evil)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"test_batch": b""}, "damaged"),
        ({"test_batch": b"\x80\x02nonsense"}, "damaged"),
        ({"test_batch": pickle.dumps([1])}, "'data' is missing"),
        ({"test_batch": pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"labels": [0, 1]})}, "unexpected form"),
        ({"test_batch": pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]})}, "without a name"),
        ({"batches.meta": pickle.dumps({b"label_names": "abc"})}, "no usable label names"),
    ],
)
def test_damaged_contents(make: SimpleNamespace, tmp_path: Path, changed: dict[str, bytes], match: str) -> None:
    with pytest.raises(UserError, match=match):
        read_python_archive(make.pack_tar(tmp_path / "a.tar.gz", official_files(**changed)))


def test_damaged_archive(archive: Path, tmp_path: Path) -> None:
    content = archive.read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged"):
        read_python_archive(tmp_path / "cut")


def test_image_archives_are_not_taken_for_it(make: SimpleNamespace, tmp_path: Path) -> None:
    assert not is_python_archive(make.pack_zip(tmp_path / "a.zip", {"a/1.png": b""}))
    assert not is_python_archive(make.pack_tar(tmp_path / "a.tar", {"a/1.png": b""}))
    (tmp_path / "b").write_bytes(b"\x1f\x8bgarbage")
    assert not is_python_archive(tmp_path / "b")
