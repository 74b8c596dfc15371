from __future__ import annotations

import errno
import json
import logging
import os
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlpipe.config import DataConfig
from mlpipe.data import imageset, prepare
from mlpipe.data.archives.decode import resize_pixels
from mlpipe.data.dataset import Dataset, open_dataset
from mlpipe.data.manifest import Manifest, load_manifest, manifest_key
from mlpipe.data.prepare import prepare_dataset
from mlpipe.data.sources.fetch import fetch_source
from mlpipe.data.storage.store import ObjectStore, Upload
from mlpipe.data.versions import record_version
from mlpipe.errors import UserError

SIZE = 8


def config(path: Path, **changes: object) -> DataConfig:
    return replace(DataConfig(dataset="images", uri=str(path), image_size=SIZE), **changes)  # type: ignore[arg-type]


@pytest.fixture
def published(store: ObjectStore, tmp_path: Path):
    def publish(data: DataConfig) -> Dataset:
        manifest = prepare_dataset(data, fetch_source(data, store), store)
        return open_dataset(manifest.digest, store, tmp_path / "cache")

    return publish


def refused(data: DataConfig, store: ObjectStore, match: str) -> str:
    with pytest.raises(UserError, match=match) as caught:
        prepare_dataset(data, fetch_source(data, store), store)
    assert str(caught.value).startswith("data_uri: ")
    assert store.list("datasets") == []
    return str(caught.value)


def test_images_labels_and_splits_are_the_sources(make: SimpleNamespace, published, tmp_path: Path) -> None:
    train, test = {"b": 20, "a": 12}, {"a": 5, "b": 4}
    files = make.split_tree(train, test)
    dataset = published(config(make.pack_zip(tmp_path / "a.zip", files)))
    manifest = dataset.manifest
    assert manifest.classes == ("a", "b")
    assert (manifest.num_train + manifest.num_val, manifest.num_test) == (32, 9)
    assert manifest.class_counts["test"] == (5, 4)
    assert manifest.notes == ()

    def pixels(prefix: str, counts: dict[str, int]) -> list[tuple[int, bytes]]:
        import io

        from PIL import Image

        return [
            ("ab".index(name), np.asarray(Image.open(io.BytesIO(files[f"{prefix}/{name}/{i}.png"]))).tobytes())
            for name, count in counts.items()
            for i in range(count)
        ]

    test_split = dataset.test_split()
    assert [
        (int(label), image.tobytes()) for label, image in zip(test_split.labels, test_split.images_u8[:], strict=True)
    ] == pixels("test", test)
    training, validation = dataset.train_split(), dataset.val_split()
    seen = [
        (int(label), image.tobytes())
        for split in (training, validation)
        for label, image in zip(split.labels, split.images_u8[:], strict=True)
    ]
    assert sorted(seen) == sorted(pixels("train", train))
    values = training.images_u8[:] / 255
    np.testing.assert_allclose(manifest.channel_mean, values.mean((0, 1, 2)), atol=1e-12)
    np.testing.assert_allclose(manifest.channel_std, values.std((0, 1, 2)), atol=1e-12)


def test_the_deviation_of_a_constant_channel_is_not_zero() -> None:
    findings = prepare._Findings.of(2)
    findings.sums[:], findings.squares[:] = (0, 7 * 4, 200 * 4), (0, 49 * 4, 40_000 * 4)
    assert findings.statistics(np.ones(2, bool), 4)[1] == (1 / 255, 1 / 255, 1 / 255)


def test_classes_alone_are_split(make: SimpleNamespace, published, tmp_path: Path) -> None:
    dataset = published(config(make.pack_tar(tmp_path / "a.tar.gz", make.image_tree({"a": 30, "b": 20}))))
    counts = np.array([dataset.manifest.class_counts[part] for part in ("train", "val", "test")])
    assert counts.sum(axis=0).tolist() == [30, 20]
    assert (counts > 0).all()
    images = [
        image.tobytes()
        for split in (dataset.train_split(), dataset.val_split(), dataset.test_split())
        for image in split.images_u8[:]
    ]
    assert len(set(images)) == 50


def test_zip_and_tar_give_the_same_arrays(make: SimpleNamespace, published, tmp_path: Path) -> None:
    files = make.split_tree({"a": 9, "b": 9}, {"a": 2, "b": 2})
    manifests = [
        published(config(path)).manifest
        for path in (
            make.pack_zip(tmp_path / "a.zip", files),
            make.pack_zip(tmp_path / "b.zip", files, zipfile.ZIP_DEFLATED),
            make.pack_tar(tmp_path / "a.tar", files, "w"),
            make.pack_tar(tmp_path / "a.tgz", {f"wrapped/{name}": content for name, content in files.items()}),
        )
    ]
    assert len({manifest.digest for manifest in manifests}) == 4
    arrays = [{name: file for name, file in each.files.items() if name != "test_names.npy"} for each in manifests]
    assert all(each == arrays[0] for each in arrays)


def test_links_in_a_folder_are_noted(make: SimpleNamespace, published, tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    for name, content in make.image_tree({"a": 6, "b": 6}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "a" / "link.png").symlink_to(folder / "b" / "0.png")
    assert published(config(folder)).manifest.notes[0].startswith("1 links and special files were left out; copy")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no space")
def test_a_full_disk_is_an_error_and_no_signal(
    make: SimpleNamespace, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    data = config(make.pack_zip(tmp_path / "a.zip", make.image_tree({"a": 6, "b": 6})))
    with pytest.raises(OSError, match="No space left"):
        prepare_dataset(data, fetch_source(data, store), store)
    assert store.list("datasets") == []


def test_the_names_of_test_images_are_kept(make: SimpleNamespace, published, tmp_path: Path) -> None:
    files = make.split_tree({"a": 9, "b": 9}, {"a": 2, "b": 2})
    dataset = published(config(make.pack_zip(tmp_path / "a.zip", files)))
    assert set(dataset.test_names()) == {name for name in files if name.startswith("test/")}


def test_many_runs_keep_their_order(make: SimpleNamespace, published, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(imageset, "RUN_IMAGES", 3)
    files = make.image_tree({"a": 40, "b": 41})
    dataset = published(config(make.pack_zip(tmp_path / "a.zip", files)))
    assert dataset.manifest.num_train + dataset.manifest.num_val + dataset.manifest.num_test == 81
    monkeypatch.setattr(imageset, "RUN_IMAGES", 1000)
    again = published(config(make.pack_zip(tmp_path / "b.zip", files, zipfile.ZIP_DEFLATED)))
    assert again.manifest.files == dataset.manifest.files


def test_any_size_and_mode(make: SimpleNamespace, published, tmp_path: Path) -> None:
    files = make.image_tree({"a": 6, "b": 6})
    files["a/wide.jpg"] = make.encoded(np.zeros((10, 300, 3), np.uint8), "JPEG")
    files["b/alpha.png"] = make.encoded(np.zeros((20, 20, 4), np.uint8))
    notes = published(config(make.pack_zip(tmp_path / "a.zip", files), image_size=16)).manifest.notes
    assert notes == ("1 image with transparency, laid on white",)


def test_published_data_is_left_alone(make: SimpleNamespace, store: ObjectStore, tmp_path: Path, monkeypatch) -> None:
    data = config(make.pack_zip(tmp_path / "a.zip", make.image_tree({"a": 9, "b": 9})))
    source = fetch_source(data, store)
    first = prepare_dataset(data, source, store)
    monkeypatch.setattr(store, "upload", None)
    assert prepare_dataset(replace(data, uri="elsewhere"), source, store) == first
    assert load_manifest(first.digest, store) == first == Manifest.from_json(first.to_json())


def test_digest_covers_source_and_settings(make: SimpleNamespace, published, tmp_path: Path) -> None:
    path = make.pack_zip(tmp_path / "a.zip", make.image_tree({"a": 12, "b": 12}))
    changes = [{}, {"image_size": 9}, {"split_seed": 1}, {"validation_fraction": 0.2}, {"test_fraction": 0.3}]
    digests = [published(config(path, **change)).manifest.digest for change in changes]
    other = make.pack_zip(tmp_path / "b.zip", make.image_tree({"a": 12, "b": 12}, seed=1))
    digests.append(published(config(other)).manifest.digest)
    assert len(set(digests)) == 6
    assert {len(digest) for digest in digests} == {32}


@pytest.mark.parametrize("harm", ["delete", "replace"])
def test_damaged_publication_is_mended(make: SimpleNamespace, store: ObjectStore, tmp_path: Path, harm: str) -> None:
    data = config(make.pack_zip(tmp_path / "a.zip", make.image_tree({"a": 9, "b": 9})))
    source = fetch_source(data, store)
    first = prepare_dataset(data, source, store)
    key = first.key("train_images.npy")
    if harm == "delete":
        store.delete(key)
    else:
        store.put_bytes(key, b"x" * first.files["train_images.npy"].bytes)
    assert prepare_dataset(data, source, store) == first
    open_dataset(first.digest, store, tmp_path / "cache").train_split()


def test_failed_upload_publishes_nothing(
    make: SimpleNamespace, store: ObjectStore, tmp_path: Path, monkeypatch
) -> None:
    data = config(make.pack_zip(tmp_path / "a.zip", make.image_tree({"a": 9, "b": 9})))
    source = fetch_source(data, store)
    upload = store.upload

    def failing(key: str, num_bytes: int) -> AbstractContextManager[Upload]:
        if key.endswith("val_indices.npy"):
            raise OSError(28, "No space left on device")
        return upload(key, num_bytes)

    monkeypatch.setattr(store, "upload", failing)
    with pytest.raises(OSError, match="No space"):
        prepare_dataset(data, source, store)
    assert not any(key.endswith("manifest.json") for key in store.list("datasets"))
    monkeypatch.undo()
    assert prepare_dataset(data, source, store).num_train


def test_two_at_once(make: SimpleNamespace, store: ObjectStore, tmp_path: Path, monkeypatch) -> None:
    data = config(make.pack_zip(tmp_path / "a.zip", make.image_tree({"a": 9, "b": 9})))
    source = fetch_source(data, store)
    meet = threading.Barrier(2)
    put = store.put_bytes

    def together(key: str, *args: Any, **options: Any) -> bool:
        if key.endswith("manifest.json"):
            meet.wait(30)
        return put(key, *args, **options)

    monkeypatch.setattr(store, "put_bytes", together)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: prepare_dataset(data, source, store), range(2))
    assert first == second == load_manifest(first.digest, store)


def test_another_workers_other_arrays_are_noticed(
    make: SimpleNamespace, store: ObjectStore, tmp_path: Path, monkeypatch
) -> None:
    data = config(make.pack_zip(tmp_path / "a.zip", make.image_tree({"a": 9, "b": 9})))
    source = fetch_source(data, store)
    upload = store.upload

    def raced(key: str, num_bytes: int) -> AbstractContextManager[Upload]:
        if key.endswith("val_indices.npy"):
            digest = key.split("/")[1]
            store.put_bytes(manifest_key(digest), other.to_json(), if_absent=True)
        return upload(key, num_bytes)

    other = replace(prepare_dataset(data, source, store), files={})
    store.delete(manifest_key(other.digest))
    monkeypatch.setattr(store, "upload", raced)
    with pytest.raises(RuntimeError, match="same versions of Pillow"):
        prepare_dataset(data, source, store)


def test_bad_images_are_named(make: SimpleNamespace, store: ObjectStore, tmp_path: Path) -> None:
    files = make.split_tree({"a": 9, "b": 9}, {"a": 2, "b": 2})
    whole = files["train/a/3.png"]
    bad = {
        "train/a/3.png": whole[: len(whole) // 2],
        "train/b/4.png": b"",
        "test/a/1.png": b"GIF89a",
        "test/b/0.png": b"text",
    }
    path = make.pack_zip(tmp_path / "a.zip", files | bad)
    message = refused(config(path, max_damaged=0.15), store, "4 of 22 images cannot be used")
    assert "'train/a/3.png' is damaged" in message
    assert "'train/b/4.png' is empty" in message
    assert message.count(".png'") == 3
    assert "At most 3 may be left out (max_damaged 0.15); replace them, remove them, or raise max_damaged" in message


def test_a_few_damaged_images_are_left_out_and_named(make: SimpleNamespace, published, tmp_path: Path) -> None:
    files = make.split_tree({"a": 60, "b": 60}, {"a": 20, "b": 20})
    bad = {"train/a/3.png": b"", "test/b/0.png": b"<html>404</html>"}
    dataset = published(config(make.pack_zip(tmp_path / "a.zip", files | bad), max_damaged=0.02))
    manifest = dataset.manifest
    assert manifest.left_out == (
        ("train/a/3.png", "is empty (0 bytes)"),
        ("test/b/0.png", "is not an image"),
    )
    assert manifest.notes[0].startswith("2 of 160 images cannot be used: 'train/a/3.png' is empty (0 bytes)")
    assert (manifest.num_train + manifest.num_val, manifest.num_test) == (119, 39)
    for split in (dataset.train_split(), dataset.val_split(), dataset.test_split()):
        assert split.images_u8[:].reshape(len(split), -1).any(axis=1).all()


def test_a_damaged_image_is_left_out_of_a_source_without_splits(
    make: SimpleNamespace, published, tmp_path: Path
) -> None:
    files = make.image_tree({"a": 60, "b": 60}) | {"a/3.png": b"no image"}
    dataset = published(config(make.pack_tar(tmp_path / "a.tar", files, "w")))
    assert [name for name, _ in dataset.manifest.left_out] == ["a/3.png"]
    images = [
        image.tobytes()
        for split in (dataset.train_split(), dataset.val_split(), dataset.test_split())
        for image in split.images_u8[:]
    ]
    assert len(set(images)) == 119


def test_a_grown_archive_keeps_the_sides_of_its_images(
    make: SimpleNamespace, published, store: ObjectStore, tmp_path: Path
) -> None:
    first = make.image_tree({"a": 30, "b": 30})
    more = make.image_tree({"a": 10, "b": 10}, seed=1)
    grown = first | {name.replace("/", "/new"): content for name, content in more.items()}
    before = published(config(make.pack_zip(tmp_path / "a.zip", first)))
    after = published(config(make.pack_zip(tmp_path / "b.zip", grown)))
    assert set(before.test_hashes()) <= set(after.test_hashes())
    assert set(before.trained_on_hashes()) <= set(after.trained_on_hashes())
    assert not set(after.test_hashes()) & set(after.trained_on_hashes())
    versions = [record_version(each, store, tmp_path / "cache") for each in (before, after, before)]
    assert [version.number for version in versions] == [1, 2, 1]
    assert [version.change for version in versions] == [
        None,
        "Version 2: 20 images added, 0 removed since version 1",
        None,
    ]


def test_other_classes_under_a_known_name_are_refused(
    make: SimpleNamespace, published, store: ObjectStore, tmp_path: Path
) -> None:
    for counts in ({"a": 9, "b": 9}, {"a": 9, "c": 9}):
        path = make.pack_zip(tmp_path / f"{len(counts)}{'c' in counts}.zip", make.image_tree(counts))
        dataset = published(config(path, name="letters"))
        if "b" in counts:
            record_version(dataset, store, tmp_path / "cache")
    with pytest.raises(UserError, match="name: 'letters' already names .* adds 'c' and lacks 'b'; give"):
        record_version(dataset, store, tmp_path / "cache")


def test_near_duplicates_across_given_splits_are_named(make: SimpleNamespace, published, tmp_path: Path) -> None:
    files = make.split_tree({"a": 9, "b": 9}, {"a": 2, "b": 2})
    pixels = np.kron(make.random_pixels(7), np.ones((4, 4, 1), np.uint8))
    files["test/a/1.jpg"] = make.encoded(pixels, "JPEG", quality=95)
    files["train/a/3.jpg"] = make.encoded(pixels, "JPEG", quality=80)
    manifest = published(config(make.pack_zip(tmp_path / "a.zip", files))).manifest
    assert manifest.near_duplicates == (("test/a/1.jpg", "train/a/3.jpg"),)


def test_validation_images_that_are_training_images_too_are_named(
    make: SimpleNamespace, published, tmp_path: Path
) -> None:
    files = make.split_tree({"a": 9, "b": 9}, {"a": 2, "b": 2})
    files |= make.image_tree({"val/a": 3, "val/b": 3})
    files["val/a/9.png"] = files["train/a/3.png"]
    manifest = published(config(make.pack_zip(tmp_path / "a.zip", files))).manifest
    assert manifest.near_duplicates == (("val/a/9.png", "train/a/3.png"),)
    assert manifest.num_known_test == 0
    assert "1 validation image is also among the training images: val/a/9.png = train/a/3.png" in manifest.notes


def test_manifests_of_the_format_before_are_read(make: SimpleNamespace, published, tmp_path: Path) -> None:
    """Those of the versions before, and of the images that a champion was trained on."""
    manifest = published(config(make.pack_zip(tmp_path / "a.zip", make.image_tree({"a": 9, "b": 9})))).manifest
    values = json.loads(manifest.to_json()) | {"format_version": 6}
    del values["num_known_test"]
    assert Manifest.from_json(json.dumps(values).encode()) == replace(manifest, format_version=6)


def test_all_test_images_that_are_known_count_also_beyond_the_list(
    make: SimpleNamespace, published, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(prepare, "MAX_LISTED", 3)
    files = make.split_tree({"a": 9, "b": 9}, {"a": 8, "b": 8})
    files |= {f"test/a/{number}.png": files["train/a/0.png"] for number in range(5)}
    manifest = published(config(make.pack_zip(tmp_path / "a.zip", files))).manifest
    assert len(manifest.near_duplicates) == 3
    assert any(text.startswith("5 of 16 test images are also among") for text in manifest.warnings)


def test_images_that_show_the_same_are_in_one_part_of_a_cross_validation(
    make: SimpleNamespace, published, tmp_path: Path
) -> None:
    tree = make.image_tree({"a": 20, "b": 20})
    copies = {name.replace(".", f"-{number}."): content for name, content in tree.items() for number in range(3)}
    dataset = published(config(make.pack_zip(tmp_path / "a.zip", tree | copies)))
    for part, held_out in dataset.folds(3, seed=0):
        known = {image.tobytes() for split in (part.train_split(), part.val_split()) for image in split.images_u8[:]}
        assert not known & {image.tobytes() for image in held_out.images_u8[:]}
    with pytest.raises(UserError, match=r"^folds: 20 is not allowed; the smallest class has \d+ different images"):
        dataset.check_folds(20)


def test_many_bad_images_stop_early(make: SimpleNamespace, store: ObjectStore, tmp_path: Path) -> None:
    files = dict.fromkeys(make.image_tree({"a": 150, "b": 150}), b"text")
    refused(config(make.pack_zip(tmp_path / "a.zip", files)), store, "more than 103 of 300 images cannot be used")


def test_a_class_with_too_few_images(make: SimpleNamespace, store: ObjectStore, tmp_path: Path) -> None:
    path = make.pack_zip(tmp_path / "a.zip", make.image_tree({"a": 30, "lonely": 1}))
    refused(config(path), store, "'lonely' has 1 image, 6 needed")
    path = make.pack_zip(tmp_path / "b.zip", make.split_tree({"a": 30, "b": 30}, {"a": 3}))
    refused(config(path), store, "'b' has 0 images in test/, 1 needed")
    path = make.pack_zip(tmp_path / "c.zip", make.split_tree({"a": 30}, {"a": 3, "b": 3}))
    refused(config(path), store, "'b' has 0 images in train/, 5 needed")


def test_shared_and_repeated_images_are_reported(
    make: SimpleNamespace, published, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = make.split_tree({"a": 9, "b": 9}, {"a": 2, "b": 2})
    files["test/a/1.png"] = make.encoded(make.random_pixels(7))
    files["train/a/3.png"] = make.encoded(make.random_pixels(7), compress_level=1)  # other bytes, same pixels
    files["train/b/1.png"] = files["train/b/2.png"]
    files["train/b/5.png"] = files["train/a/6.png"]
    with caplog.at_level(logging.WARNING):
        notes = published(config(make.pack_zip(tmp_path / "a.zip", files))).manifest.notes
    assert notes == (
        "1 test image is also among the training or validation images: test/a/1.png = train/a/3.png",
        "2 training images are copies of others",
        "1 image is also in another class",
    )
    assert all(note in caplog.text for note in notes)


def test_digits(published) -> None:
    from mlpipe.data.sources.digits import digits_bytes, read_digits

    dataset = published(DataConfig(dataset="digits"))
    manifest = dataset.manifest
    assert manifest.classes == tuple("0123456789")
    assert manifest.num_train + manifest.num_val + manifest.num_test == 1797
    assert manifest.num_test == pytest.approx(360, abs=50)
    images, labels = read_digits(digits_bytes())
    shown = {resize_pixels(image, 32).tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    test = dataset.test_split()
    assert [shown[image.tobytes()] for image in test.images_u8[:]] == test.labels.tolist()
