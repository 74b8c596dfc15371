from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from mlpipe.data.archive import open_archive
from mlpipe.data.cifar10 import CLASSES
from mlpipe.data.layout import Layout, resolve_layout
from mlpipe.errors import UserError


@pytest.fixture
def layout_of(make: SimpleNamespace, tmp_path: Path):
    def resolve(*names: str) -> Layout:
        with open_archive(make.pack_zip(tmp_path / "a.zip", dict.fromkeys(names, b""))) as archive:
            return resolve_layout(archive)

    return resolve


def test_train_and_test(layout_of) -> None:
    layout = layout_of("train/b/1.png", "test/a/1.png", "train/a/1.png", "test/b/1.png")
    assert layout.classes == ("a", "b")
    assert layout.labels.tolist() == [1, 0, 0, 1]
    assert layout.is_test is not None
    assert layout.is_test.tolist() == [False, True, False, True]


def test_classes_alone(layout_of) -> None:
    layout = layout_of("b/1.png", "a/1.png", "C/1.png")
    assert layout.classes == ("C", "a", "b")  # by code point
    assert layout.labels.tolist() == [2, 1, 0]
    assert layout.is_test is None


@pytest.mark.parametrize("wrapper", ["archive/", "a/b/", "./"])
def test_wrapping_folders(layout_of, wrapper: str) -> None:
    assert layout_of(f"{wrapper}x/1.png", f"{wrapper}y/1.png").classes == ("x", "y")
    split = layout_of(*(f"{wrapper}{part}/{name}/1.png" for part in ("train", "test") for name in "xy"))
    assert split.classes == ("x", "y")
    assert split.is_test is not None


def test_composed_and_decomposed_names_are_one_class(layout_of) -> None:
    layout = layout_of("train/cafe\u0301/1.png", "test/café/1.png", "train/b/1.png", "test/b/1.png")
    assert layout.classes == ("b", "café")


def test_class_without_images(layout_of) -> None:
    assert layout_of("a/1.png", "b/1.png", "c/").classes == ("a", "b", "c")  # the counts will be refused
    assert layout_of("w/a/1.png", "w/b/1.png", "w/c/", "w/").classes == ("a", "b", "c")


def test_cifar10s_order_is_the_alphabets() -> None:
    assert sorted(CLASSES) == list(CLASSES)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ([], "no images"),
        (["readme.txt"], "no images .*'readme.txt'"),
        (["1.png", "2.png"], "'the top folder' lie in no class folder"),
        (["a/1.png", "2.png"], "'the top folder' lie in no class folder"),
        (["a/1.png", "b/c/2.png"], "'b/c' lie in no class folder"),
        (["a/1.png", "a/2.png"], "one class, 'a'"),
        (["train/a/1.png", "test/a/1.png"], "one class, 'a'"),
        (["train/a/1.png", "train/b/1.png"], "train/ only"),
        (["train/a/1.png", "train/b/1.png", "Train/b/2.png"], "Train/, train/ only"),
        (["train/1.png", "test/1.png"], "wrong depth"),
        (["train/a/b/1.png", "test/a/1.png"], "'train/a/b/' lie at the wrong depth"),
        (["train/a/1.png", "test/a/1.png", "val/a/1.png"], "'val/' beside train/ and test/"),
        (["train/a/1.png", "test/a/1.png", "1.png"], "'/' beside train/ and test/"),
        (["Cat/1.png", "cat/1.png"], "'Cat', 'cat' differ in upper and lower case"),
        (["STRASSE/1.png", "straße/1.png", "x/1.png"], "differ in upper and lower case"),
    ],
)
def test_other_layouts(layout_of, names: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        layout_of(*names)
