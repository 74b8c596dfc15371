from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from sklearn.datasets import load_digits

from mlpipe.config import DataConfig
from mlpipe.data.sources.digits import digits_bytes, read_digits
from mlpipe.data.sources.fetch import SourceRef, fetch_source
from mlpipe.data.storage.store import ObjectStore
from mlpipe.errors import UserError


@pytest.fixture
def archive(make: SimpleNamespace, tmp_path: Path) -> Path:
    return make.pack_zip(tmp_path / "images.zip", make.image_tree({"a": 2, "b": 2}))


def images(uri: str | Path) -> DataConfig:
    return DataConfig(dataset="images", uri=str(uri))


def test_local_archive(archive: Path, store: ObjectStore) -> None:
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    for uri in (archive, archive.as_uri()):
        source = fetch_source(images(uri), store)
        assert (source.key, source.sha256, source.kind) == (f"sources/{sha256}", sha256, "images")
    assert store.get_bytes(source.key) == archive.read_bytes()


def test_remote_archive_is_fetched_again_only_when_it_changed(
    make: SimpleNamespace, archive: Path, store: ObjectStore
) -> None:
    content = archive.read_bytes()
    with make.web_server((200, {"ETag": '"1"'}, content)) as (address, requests):
        first = fetch_source(images(f"{address}/images.zip?sig=secret"), store)
        assert fetch_source(images(f"{address}/images.zip?sig=secret"), store) == first
        assert [request.split()[0] for request in requests] == ["HEAD", "GET", "HEAD"]
    assert not any("secret" in key for key in store.list("sources"))
    with make.web_server((200, {}, content)) as (address, requests):
        for _ in range(2):
            assert fetch_source(images(f"{address}/images.zip"), store) == first
        assert [request.split()[0] for request in requests] == ["HEAD", "GET", "HEAD", "GET"]


def test_address_with_checksum_is_fetched_once(make: SimpleNamespace, archive: Path, store: ObjectStore) -> None:
    content = archive.read_bytes()
    with make.web_server((200, {}, content)) as (address, requests):
        uri = f"{address}/images.zip#sha256={hashlib.sha256(content).hexdigest()}"
        assert fetch_source(images(uri), store) == fetch_source(images(uri), store)
    assert [request.split()[0] for request in requests].count("GET") == 1


def test_s3_archive(archive: Path, store: ObjectStore) -> None:
    store.put_file("mine/images.zip", archive)
    uri = store.uri("mine/images.zip")
    source = fetch_source(images(uri), store)
    assert fetch_source(images(uri), store) == source
    store.put_bytes("mine/images.zip", b"something else")
    with pytest.raises(UserError, match="neither a zip nor a tar"):
        fetch_source(images(uri), store)


def test_unusable_archive_is_not_stored(make: SimpleNamespace, store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 and no more")
    one_class = make.pack_zip(tmp_path / "b.zip", make.image_tree({"a": 9}))
    with make.web_server((200, {}, (tmp_path / "a.zip").read_bytes())) as (address, _):
        for uri, match in (
            (str(tmp_path / "a.zip"), "a.zip: the archive is damaged"),
            (str(one_class), "b.zip: the archive has one class"),
            (f"{address.replace('//', '//me:pw@')}/a.zip?sig=secret", "damaged"),
        ):
            with pytest.raises(UserError, match=f"^data_uri: .*{match}") as caught:
                fetch_source(images(uri), store)
            assert "secret" not in str(caught.value)
            assert "pw" not in str(caught.value)
    assert store.list("sources") == []


def test_digits_are_scikit_learns(store: ObjectStore) -> None:
    source = fetch_source(DataConfig(dataset="digits"), store)
    assert fetch_source(DataConfig(dataset="digits"), store) == source
    images_u8, labels = read_digits(digits_bytes())
    known = load_digits()
    assert (labels == known.target).all()
    assert ((images_u8 / 255 * 16).round() == known.images).all()
    assert images_u8.max() == 255


def unpacked(source: SourceRef, store: ObjectStore, path: Path) -> dict[str, bytes]:
    store.get_file(source.key, path, source.sha256)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_folder_is_one_source_whatever_its_files_times(
    make: SimpleNamespace, store: ObjectStore, tmp_path: Path
) -> None:
    files = make.image_tree({"a": 2, "b": 2})
    folder = tmp_path / "pets"
    for name, content in {**files, ".hidden/x.png": b"x", "a/.DS_Store": b"x"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "a" / "link.png").symlink_to("/etc/passwd")
    source = fetch_source(images(folder), store)
    assert unpacked(source, store, tmp_path / "copy.zip") == files
    os.utime(folder / "a" / "0.png", (0, 0))
    assert fetch_source(images(folder.as_uri()), store) == source


def test_a_folder_of_objects_is_fetched_again_when_it_changes(
    make: SimpleNamespace, store: ObjectStore, tmp_path: Path
) -> None:
    files = make.image_tree({"a": 2, "b": 2})
    for name, content in files.items():
        store.put_bytes(f"pets/{name}", content)
    address = f"s3://{store.bucket}/pets/"
    first = fetch_source(images(address), store)
    assert unpacked(first, store, tmp_path / "copy.zip") == files
    assert fetch_source(images(address), store) == first
    store.put_bytes("pets/a/9.png", make.encoded(make.random_pixels(9)))
    assert fetch_source(images(address), store) != first
    with pytest.raises(UserError, match="data_uri: s3://.*/nothing/ has no objects"):
        fetch_source(images(f"s3://{store.bucket}/nothing/"), store)


def test_a_folder_that_cannot_be_used(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data_uri: .* has no files with something in them"):
        fetch_source(images(tmp_path), store)
    (tmp_path / "link.png").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="data_uri: .* has links and special files alone, 1; copy it with `cp -rL`"):
        fetch_source(images(tmp_path), store)
    (not_utf8 := tmp_path / os.fsdecode(b"ma\xe7.png")).write_bytes(b"x")
    with pytest.raises(UserError, match=r"data_uri: the name of .*/ma\\xe7\.png' is not UTF-8; rename it"):
        fetch_source(images(tmp_path), store)
    not_utf8.unlink()
    (tmp_path / "1.png").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="data_uri: .* lie in no class folder; .*; 1 links and special files were left"):
        fetch_source(images(tmp_path), store)
    with pytest.raises(UserError, match="data_uri: .* has more than"):
        fetch_source(images(tmp_path), store, max_bytes=50)
