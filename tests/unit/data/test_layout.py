from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mlpipe.data.archives.archive import open_archive
from mlpipe.data.archives.layout import Layout, resolve_layout
from mlpipe.data.sources.cifar10 import CLASSES
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


def test_a_class_may_be_called_train(layout_of) -> None:
    layout = layout_of(*(f"{part}/{name}/1.png" for part in ("train", "test") for name in ("bus", "train")))
    assert layout.classes == ("bus", "train")
    assert layout_of(*(f"train/train/{name}/1.png" for name in "ab")).classes == ("a", "b")


@pytest.mark.parametrize("wrapper", ["archive/", "a/b/", "./"])
def test_wrapping_folders(layout_of, wrapper: str) -> None:
    assert layout_of(f"{wrapper}x/1.png", f"{wrapper}y/1.png").classes == ("x", "y")
    split = layout_of(*(f"{wrapper}{part}/{name}/1.png" for part in ("train", "test") for name in "xy"))
    assert split.classes == ("x", "y")
    assert split.is_test is not None


def test_composed_and_decomposed_names_are_one_class(layout_of) -> None:
    layout = layout_of("train/cafe\u0301/1.png", "test/café/1.png", "train/b/1.png", "test/b/1.png")
    assert layout.classes == ("b", "café")


def test_folders_without_images_are_no_classes(layout_of) -> None:
    assert layout_of("a/1.png", "b/1.png", "annotations/").classes == ("a", "b")
    assert layout_of("w/a/1.png", "w/b/1.png", "w/annotations/x.xml", "w/").classes == ("a", "b")


def splits_of(layout: Layout) -> str:
    """A letter for each image: t(r)ain, (v)alidation, t(e)st, (-) left aside."""
    sides = np.full(len(layout.labels), "r")
    for chosen, letter in ((layout.is_test, "e"), (layout.is_val, "v")):
        if chosen is not None:
            sides[chosen] = letter
    sides[layout.labels < 0] = "-"
    return "".join(sides)


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_own_validation_images(layout_of, val: str) -> None:
    layout = layout_of(*(f"x/{part}/{name}/1.png" for part in ("train", val, "test") for name in "ab"))
    assert splits_of(layout) == "rrvvee"
    assert layout.notes == ()


@pytest.mark.parametrize(
    "names", [("seg_train", "seg_test"), ("training_set", "test_set"), ("train/train", "test/test")]
)
def test_other_names_of_splits(layout_of, names: tuple[str, ...]) -> None:
    layout = layout_of(*(f"x/{part}/{name}/1.png" for part in names for name in "ab"))
    assert (layout.classes, splits_of(layout)) == (("a", "b"), "rree")


def test_classes_that_end_like_splits(layout_of) -> None:
    assert layout_of("crash_test/1.png", "crash_report/1.png").classes == ("crash_report", "crash_test")
    assert layout_of("crash_test/1.png", "steam_train/1.png").classes == ("crash_test", "steam_train")


def test_train_and_val_alone(layout_of) -> None:
    layout = layout_of(*(f"{part}/{name}/1.png" for part in ("training", "val") for name in "ab"))
    assert (splits_of(layout), layout.is_val) == ("rree", None)
    assert layout.notes == ("there is no test/: the validation images (val/) are the test split",)


def test_train_alone(layout_of) -> None:
    layout = layout_of("train/a/1.png", "train/b/1.png")
    assert layout.is_test is layout.is_val is None
    assert "a part of them became the test split" in layout.notes[0]


def test_images_without_a_label_in_test(layout_of) -> None:
    layout = layout_of("train/a/1.png", "train/b/1.png", "test/1.png", "test/2.png")
    assert (splits_of(layout), layout.is_test) == ("rr--", None)
    assert layout.notes[0] == "2 images straight in test/ have no label and were left aside"


def test_folders_inside_of_class_folders(layout_of) -> None:
    layout = layout_of("cat/siamese/1.png", "cat/2.png", "dog/poodle/small/1.png")
    assert layout.classes == ("cat", "dog")
    assert layout.labels.tolist() == [0, 0, 1]
    assert layout.notes[0].startswith("2 folders lie inside class folders, such as 'cat/siamese'")


@pytest.fixture
def table_of(make: SimpleNamespace, tmp_path: Path):
    def resolve(table: str, *names: str, table_name: str = "labels.csv") -> Layout:
        files = dict.fromkeys(names, b"") | {table_name: table.encode("utf-8-sig")}
        path = make.pack_tar(tmp_path / "a.tar", files, "w")
        with open_archive(path) as archive:
            return resolve_layout(archive)

    return resolve


def test_labels_from_a_csv(table_of) -> None:
    layout = table_of("image,label\n1.png,cat\n2.png,dog\n3,cat\n", "pics/1.png", "pics/2.png", "pics/3.png")
    assert layout.classes == ("cat", "dog")
    assert layout.labels.tolist() == [0, 1, 0]
    assert layout.notes == ("classes come from labels.csv",)


def test_a_csv_may_number_its_rows_in_a_column_id(table_of) -> None:
    layout = table_of("id,picture,label\n1,2.png,x\n2,1.png,y\n", "1.png", "2.png")
    assert [layout.classes[label] for label in layout.labels] == ["y", "x"]


def test_splits_from_a_csv(table_of) -> None:
    rows = "Filename;Class;Split\na/1.png;x;train\na/2.png;y;valid\na/3.png;x;test\n"
    assert splits_of(table_of(rows, "a/1.png", "a/2.png", "a/3.png")) == "rve"
    with pytest.raises(UserError, match="labels.csv: split 'holdout' is not allowed; give train, val or test"):
        table_of(rows.replace("valid", "holdout"), "a/1.png", "a/2.png", "a/3.png")


def test_rows_and_images_that_do_not_match_are_named(table_of) -> None:
    layout = table_of("image,label\n1.png,x\n2.png,y\n9.png,x\n", "1.png", "2.png", "5.png")
    assert splits_of(layout) == "rr-"
    assert layout.notes[1:] == (
        "1 images have no row in it and were left aside: 5.png",
        "1 of its rows have no image: 9.png",
    )


def test_train_and_test_folders_with_a_csv(table_of) -> None:
    names = ("train/1.png", "train/2.png", "test/3.png")
    layout = table_of("id,category\n1,x\n2,y\n", *names, table_name="train.csv")
    assert splits_of(layout) == "rr-"


@pytest.mark.parametrize(
    ("table", "names", "match"),
    [
        (
            "id,label\n1,x\n2,y\n",
            ["train/1.png", "train/2.png", "test/1.png"],
            "the row '1' fits train/1.png and test/1.png; write their paths",
        ),
        ("image,label\n1.png,x\n2.png,y\n1.png,y\n", ["1.png", "2.png"], "several rows for '1.png', with 'x' and 'y'"),
        ("image,label,split\n1.png,x,train\n1.png,x,test\n", ["1.png"], "with 'x, train' and 'x, test'"),
        (
            "image,label\ndata/1.png,x\ndata/2.png,y\n",
            ["1.png", "2.png"],
            "labels.csv names none of .* its first row has 'data/1.png', and the first image is '1.png'",
        ),
        ('image,label\n"1.png,x\n' + "2.png,y\n" * 20_000, ["1.png", "2.png"], "labels.csv cannot be read .*quotes"),
    ],
    ids=["a row fits two images", "two labels", "two splits", "other paths", "an open quote"],
)
def test_a_csv_that_cannot_be_followed(table_of, table: str, names: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        table_of(table, *names)


def test_rows_said_twice_and_paths_tell_images_apart(table_of) -> None:
    layout = table_of("image,label\na/1.png,x\nb/1.png,y\na/1.png,x\n", "w/a/1.png", "w/b/1.png")
    assert layout.labels.tolist() == [0, 1]


PARTS = ("part_1/1.png", "part_1/2.png", "part_2/3.png", "part_2/4.png")


def test_a_csv_that_contradicts_the_folders_is_refused(table_of) -> None:
    with pytest.raises(UserError, match="labels.csv and the folders give .* such as 'mole' and 'part_1'; remove"):
        table_of("image_id,dx\n1,mole\n2,wart\n3,mole\n4,wart\n", *PARTS)


@pytest.mark.parametrize(
    "table",
    [
        "id,label\n1,0\n2,0\n3,1\n4,1\n",
        "id,label\n1,part_1\n2,part_2\n3,part_2\n4,part_2\n",
        "id,label\n1,mole\n",
        "id,label\n7,mole\n8,wart\n9,mole\n",
        "id,label\n1,mole\n1,wart\n2,mole\n3,mole\n4,wart\n",
        'id,label\n"1,mole\n' + "x,y\n" * 40_000,
    ],
    ids=["the same by number", "the folders' names", "of few", "of other images", "of no single class", "broken"],
)
def test_folders_count_where_a_csv_does_not_contradict_them(table_of, table: str) -> None:
    assert table_of(table, *PARTS).classes == ("part_1", "part_2")


@pytest.mark.parametrize(
    ("encoding", "notes"),
    [("utf-16", []), ("cp1252", ["labels.csv is not UTF-8; it was read as Windows-1252"])],
)
def test_a_csv_that_is_not_utf8(make: SimpleNamespace, tmp_path: Path, encoding: str, notes: list[str]) -> None:
    table = "image,label\n1.png,maçã\n2.png,limão\n".encode(encoding)
    with open_archive(make.pack_zip(tmp_path / "a.zip", {"1.png": b"", "2.png": b"", "labels.csv": table})) as archive:
        layout = resolve_layout(archive)
    assert layout.classes == ("limão", "maçã")
    assert list(layout.notes) == ["classes come from labels.csv", *notes]


def test_a_csv_of_something_else(table_of) -> None:
    with pytest.raises(UserError, match="'the top folder' lie in no class folder"):
        table_of("path,noisy\n1.png,0\n", "1.png", "2.png")


def test_a_csv_with_quoted_line_ends_beside_another_file(make: SimpleNamespace, tmp_path: Path) -> None:
    table = b'image,label,caption\n1.png,x,"two\nlines"\n2.png,y,one\n'
    files = {"1.png": b"", "2.png": b"", "labels.csv": table, "readme.txt": b"hi"}
    with open_archive(make.pack_zip(tmp_path / "a.zip", files)) as archive:
        layout = resolve_layout(archive)
    assert layout.labels.tolist() == [0, 1]
    assert layout.notes == (
        "classes come from labels.csv",
        "1 files that are not images were left out: readme.txt",
    )


def test_an_archive_in_an_archive(make: SimpleNamespace, tmp_path: Path) -> None:
    inner = make.pack_zip(tmp_path / "pets.zip", make.image_tree({"a": 2, "b": 1}))
    outer = make.pack_tar(tmp_path / "outer.tar.gz", {"x/pets.zip": inner.read_bytes(), "x/readme.txt": b"hi"})
    with open_archive(outer) as archive:
        assert resolve_layout(archive).labels.tolist() == [0, 0, 1]
    broken = make.pack_zip(tmp_path / "outer.zip", {"pets.zip": b"PK\x03\x04 no"})
    with pytest.raises(UserError, match="'pets.zip' in it: the archive is damaged"):
        open_archive(broken)


def test_a_csv_beside_the_archive_of_its_images_is_named(make: SimpleNamespace, tmp_path: Path) -> None:
    inner = make.pack_zip(tmp_path / "images.zip", {"1.png": b"", "2.png": b""})
    table = b"image,label\n1.png,x\n2.png,y\n"
    outer = make.pack_zip(tmp_path / "outer.zip", {"images.zip": inner.read_bytes(), "labels.csv": table})
    with (
        open_archive(outer) as archive,
        pytest.raises(UserError, match=r"labels\.csv lies beside .* pack it into that"),
    ):
        resolve_layout(archive)


def test_cifar10s_order_is_the_alphabets() -> None:
    assert sorted(CLASSES) == list(CLASSES)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ([], "no images"),
        (["readme.txt"], "no images .*'readme.txt'"),
        (["1.png", "2.png"], "'the top folder' lie in no class folder"),
        (["a/1.png", "2.png"], "'the top folder' lie in no class folder"),
        (["a/1.png", "a/2.png"], "one class, 'a'"),
        (["p/x.png", "p/a/1.png", "p/b/1.png"], "image 'p/x.png' lies beside the folders 'a/' and 'b/'"),
        (
            ["test-1/a/1.png", "test-1/b/1.png", "p2/a/1.png", "p2/b/1.png"],
            "'p2/' and 'test-1/' hold .* rename .* train/ and test/",
        ),
        (["train/a/1.png", "test/a/1.png"], "one class, 'a'"),
        (["train/a/1.png", "train/b/1.png", "Train/b/2.png"], "Train/ and train/ for one split; merge them"),
        (["train/1.png", "test/1.png"], "'train' lie in no class folder"),
        (["train/1.png", "train/a/1.png", "train/b/1.png"], "'train' lie in no class folder"),
        (["test/a/1.png", "test/b/1.png"], "labelled images in test/ only"),
        (["train/a/1.png", "test/a/1.png", "1.png"], "'/' beside train/ and test/"),
        (["bus/1.png", "car/1.png", "train/1.png"], "'bus/', 'car/' beside .* a class called train .* must be renamed"),
        (["Cat/1.png", "cat/1.png"], "'Cat', 'cat' differ in upper and lower case"),
        (["STRASSE/1.png", "straße/1.png", "x/1.png"], "differ in upper and lower case"),
    ],
)
def test_other_layouts(layout_of, names: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        layout_of(*names)
