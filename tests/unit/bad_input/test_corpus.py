"""Bad input from one table, each row from the filled-in form through the stages as the DAG calls them.

A row that is refused must end in one line that begins with the form's field, quickly, with nothing published and,
where the archive's listing shows what is wrong, nothing stored. Rows without a complaint are odd but welcome: they
must be published, with the note that says what was done.
"""

from __future__ import annotations

import math
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlpipe.config import RunParams
from mlpipe.data.manifest import load_manifest
from mlpipe.errors import UserError
from tests.unit.bad_input import archives, images, weights
from tests.unit.bad_input.conftest import Pipeline
from tests.unit.data.conftest import image_tree, split_tree

pytestmark = pytest.mark.timeout(60)  # a refusal is quick; archives that unpack for minutes would end here


@dataclass(frozen=True)
class Case:
    """One row."""

    label: str
    form: Callable[[Path], dict[str, Any]]
    """Writes what it needs into a folder and returns the form's values."""
    complaint: str
    """What the one line must match; of welcome input, what a note must match."""
    listed: bool = True
    """Whether what is wrong shows in the form or in the archive's listing, before the archive is stored."""


def archive(label: str, make: archives.Maker, complaint: str, *, listed: bool = True) -> Case:
    return Case(
        label,
        lambda folder: {"dataset": "images", "data_uri": str(make(folder)), "image_size": 16},
        f"data_uri: {complaint}",
        listed,
    )


def values(label: str, complaint: str, **form: Any) -> Case:
    return Case(label, lambda _: form, complaint)


ARCHIVES = [
    archive("path traversal", archives.zipped({"../cat/1.png": b"x"}), ".*'../cat/1.png' points outside"),
    archive("path traversal within", archives.tarred({"cat/../../1.png": b"x"}), ".*points outside"),
    archive("path traversal in Windows' spelling", archives.zipped({"..\\cat\\1.png": b"x"}), ".*points outside"),
    archive("absolute path", archives.tarred({"/etc/1.png": b"x"}), ".*'/etc/1.png' points outside"),
    archive("drive letter", archives.zipped({"C:/cat/1.png": b"x"}), ".*points outside"),
    archive("symbolic link out", archives.tar_member(tarfile.SYMTYPE, "/etc/passwd"), ".*link or device"),
    archive("hard link out", archives.tar_member(tarfile.LNKTYPE, "../../etc/passwd"), ".*link or device"),
    archive("device", archives.tar_member(tarfile.CHRTYPE, ""), ".*link or device"),
    archive("fifo", archives.tar_member(tarfile.FIFOTYPE, ""), ".*link or device"),
    archive("symbolic link in a zip", archives.zip_link, ".*link or device"),
    archive("control characters", archives.zipped({"cat\x1b[31m/1.png": b"x"}), ".*control characters"),
    archive("bomb by size", archives.changed(archives.claim_200_mb_each), ".*decompression bomb"),
    archive("bomb by one member", archives.larger_than_promised, ".*damaged at 'cat/big.bmp'", listed=False),
    archive("bomb by a member that is no image", archives.zeros_beside_images, ".*decompression bomb"),
    archive("bomb by count", archives.many_folders, ".*more than 100,000 folders"),
    archive("bomb by nesting", archives.nested(3, 10), ".*no images .*it has '0.zip'"),
    archive("bomb by a tar header", archives.huge_tar_header, ".*absurd size"),
    archive("overlapping members", archives.changed(archives.overlap), ".*overlap"),
    archive("truncated zip", archives.changed(archives.cut(0.6)), ".*damaged"),
    archive("truncated tar.gz", lambda folder: truncated_tar(folder), ".*damaged"),
    archive("encrypted", archives.changed(archives.encrypt_first), ".*is encrypted; pack it without a password"),
    archive(
        "encrypted file without a suffix",
        archives.changed(archives.encrypt_first, {"LICENSE": b"text", **archives.GOOD}),
        ".*'LICENSE' is encrypted",
    ),
    archive(
        "wrong checksum", archives.changed(archives.flip_a_pixel), ".*damaged at 'cat/0.png' .*checksum", listed=False
    ),
    archive("unknown compression", archives.zipped(archives.GOOD, zipfile.ZIP_LZMA), ".*packed by method 14"),
    archive("same name twice", archives.same_name_twice, ".*same name"),
    archive("empty file", archives.raw(b""), ".*is empty"),
    archive("empty zip", archives.zipped({}), ".*no images"),
    archive("web page", archives.raw(b"<!DOCTYPE html><html>"), ".*is a web page"),
    archive("7z", archives.raw(b"7z\xbc\xaf'\x1c" + b"\0" * 40), ".*7z archive, which is not read"),
    archive("noise", archives.raw(bytes(range(256)) * 4), ".*neither a zip nor a tar"),
    archive("one class", archives.zipped(archives.one_class()), ".*one class, 'cat'; at least 2"),
    archive(
        "class of one image", archives.zipped(image_tree({"cat": 30, "lonely": 1})), ".*'lonely' has 1", listed=False
    ),
    archive(
        "class without test images",
        archives.zipped(split_tree({"cat": 9, "dog": 9}, {"cat": 3})),
        ".*'dog' has 0 images in test/, 1 needed",
        listed=False,
    ),
    archive("case collision", archives.zipped(image_tree({"Cat": 6, "cat": 6})), ".*'Cat', 'cat' differ in upper and"),
    archive("no class folders", archives.zipped({"1.png": b"x", "2.png": b"x"}), ".*lie in no class folder"),
    archive("no such file", lambda folder: folder / "none.zip", ".*none.zip does not exist"),
    archive("folder", lambda folder: folder, ".*has no files with something in them"),
]

IMAGES = [
    archive(
        f"image: {label}", archives.with_image(f"cat/odd{suffix}", content), f".*'cat/odd{suffix}' {why}", listed=False
    )
    for label, suffix, content, why in [
        ("zero bytes", ".png", b"", "is empty"),
        ("truncated PNG", ".png", images.saved(images.plain())[:200], "is damaged"),
        ("truncated JPEG", ".jpg", images.saved(images.plain(), "JPEG")[:300], "is damaged|is not an image"),
        ("not an image", ".png", b"hello", "is not an image"),
        ("SVG called PNG", ".png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image"),
        ("no numbers", ".tif", images.not_finite(), "has pixels that are not finite"),
        ("30,000 pixels wide", ".png", images.png_header(30_000, 10), "has 30000 × 10 pixels"),
        ("bomb of pixels", ".png", images.png_header(50_000, 50_000), "has .* pixels"),
    ]
]

PARAMETERS = [
    values("unknown key", "epoch: unknown parameter; known parameters are .*epochs", epoch=3),
    values("images without address", "data_uri: empty, but the data set 'images' needs", dataset="images"),
    values("digits with an address", "data_uri: .* is not used by the data set 'digits'", data_uri="/tmp/x.zip"),
    values("empty list of models", "models: 0 models", models=","),
    values("no weights after =", "models: .*names no weights", models="resnet18="),
    values("no name of a model", "models: .*is not a model name", models="../x"),
    values("unknown model", "models: 'resnet99' is unknown; did you mean", models="resnet99"),
    values("model twice", "models: two models would be called", models="resnet18=random,resnet18=random"),
    values("17 models", "models: 17 models", models=",".join(f"resnet{n}" for n in range(17))),
    values("weights of an estimator", "models: .*has no initial weights", models="logistic_regression=imagenet"),
    values("ImageNet weights of our own", "models: .*no ImageNet weights exist", models="custom_cnn=imagenet"),
    values("too small for the network", "image_size: inception_v3 cannot take", models="inception_v3", image_size=32),
    values("unsupported scheme", "data_uri: ftp:// .*not supported", dataset="images", data_uri="ftp://u:p@host/a.zip"),
    values("control character", "data_uri: ", dataset="images", data_uri="a\0b"),
    values("malformed checksum", "data_uri: .*give #sha256=", dataset="images", data_uri="http://h/a.zip#sha256=1"),
]

WEIGHTS = [
    Case(
        f"weights: {label}", lambda folder, make=make: {"models": f"custom_cnn={make(folder)}"}, f"models: {complaint}"
    )  # type: ignore[misc]
    for label, make, complaint in [
        (
            "wrong architecture",
            weights.of_resnet,
            ".*does not fit custom_cnn: 8 missing",
        ),
        ("wrong hash", weights.wrong_checksum, ".*instead of 0000"),
        ("malicious checkpoint", weights.malicious, ".*was not loaded, because it could run code"),
        ("malicious pickle", weights.malicious_pickle, ".*was not loaded, because it could run code"),
        ("TorchScript", weights.script, ".*could run code|.*cannot be read"),
        ("truncated", weights.cut, ".*cannot be read as weights"),
        ("zero bytes", weights.raw(b""), ".*is empty"),
        ("noise", weights.raw(b"not weights"), ".*could run code|.*cannot be read"),
        ("noise called safetensors", weights.raw(b"not weights", "w.safetensors"), ".*cannot be read as weights"),
        (
            "pointer of Git LFS",
            weights.raw(b"version https://git-lfs.github.com/spec/v1\n"),
            ".*is a pointer of Git LFS",
        ),
        ("web page", weights.raw(b"\n<!DOCTYPE html>"), ".*is a web page and not weights"),
        ("other format", weights.raw(b"x", "w.npz"), ".*neither random nor imagenet nor the address"),
        ("list", weights.saved([1, 2, 3]), ".*is not a state dictionary"),
        ("no such file", lambda folder: str(folder / "none.pth"), ".*none.pth does not exist"),
        ("no checksum over HTTP", lambda _: "http://127.0.0.1:9/w.pth", ".*has no checksum; append #sha256="),
        ("unknown registered model", lambda _: "models:/nothing/1", ".*models:/nothing/1"),
    ]
]

WELCOME = [
    archive("names in every script", archives.zipped(archives.named_in_every_script()), ""),
    archive("archive in a class folder", archives.with_image("cat/more.zip", b"PK\x03\x04"), "1 files that are not"),
    *(
        archive(f"image: {label}", archives.with_image(f"cat/odd{suffix}", content), f"1 image {note}")
        for label, suffix, content, note in [
            ("16 bits", ".png", images.sixteen_bit(), "of 16 bits, cut to the upper 8"),
            ("CMYK", ".jpg", images.saved(images.plain("CMYK"), "JPEG"), "of CMYK, converted to RGB"),
            ("palette with alpha", ".png", images.palette_with_alpha(), "with transparency, laid on white"),
            ("animated", ".gif", images.animated(), "with several pictures, of which the first was used"),
            ("turned by EXIF", ".jpg", images.rotated_by_exif(), "turned upright by their EXIF orientation"),
            ("1 × 1", ".png", images.saved(images.plain(size=(1, 1))), "with a side of less than 4 pixels"),
        ]
    ),
]


def truncated_tar(folder: Path) -> Path:
    path = archives.tarred(archives.GOOD)(folder)
    path.write_bytes(path.read_bytes()[:2000])
    return path


def of_every_field() -> list[Case]:
    """Wrong types and values out of range, as each field's own schema has them."""
    cases = []
    for name, schema in RunParams.json_schema().items():
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        wrong: dict[str, Any] = {"list": [1], "mapping": {"a": 1}}
        wrong |= {"text": "seven"} if types[-1] != "string" or "enum" in schema else {"number": 7}
        if types[-1] in ("integer", "number"):
            wrong |= {"true": True, "not a number": math.nan, "infinite": math.inf}
            wrong |= {"below": schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1) - 1}
            wrong |= {"above": schema["maximum"] + 1} if "maximum" in schema else {}
        if types[-1] == "integer":
            wrong["fraction"] = 16.5
        if "null" not in types:
            wrong["empty"] = None
        if "maxLength" in schema:
            wrong["too long"] = "x" * (schema["maxLength"] + 1)
        cases += [
            values(f"{name}: {what}", rf"{name}: .* is not allowed; give .+", **{name: value})
            for what, value in wrong.items()
        ]
    return cases


def rows(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.label for case in cases])


def test_the_corpus_has_no_row_twice() -> None:
    ids = [case.label for case in (*ARCHIVES, *IMAGES, *PARAMETERS, *of_every_field(), *WEIGHTS, *WELCOME)]
    assert len(ids) == len(set(ids))


@rows([*ARCHIVES, *IMAGES, *PARAMETERS, *of_every_field()])
def test_refused_before_anything_is_published(case: Case, pipeline: Pipeline, tmp_path: Path) -> None:
    form = case.form(tmp_path)
    before, sources = pipeline.published(), pipeline.store.list("sources")
    with pytest.raises(UserError, match=f"^{case.complaint}") as refused:
        pipeline.prepare(form)
    assert_one_short_line(refused.value)
    assert pipeline.published() == before
    if case.listed:
        assert pipeline.store.list("sources") == sources


@rows(WEIGHTS)
def test_weights_are_refused_before_a_run_is_opened(
    case: Case, pipeline: Pipeline, digits: dict[str, Any], tmp_path: Path
) -> None:
    form = case.form(tmp_path)
    before = pipeline.published()
    with pytest.raises(UserError, match=f"^{case.complaint}") as refused:
        pipeline.train({**form, "image_size": 8, "epochs": 1}, digits)
    assert_one_short_line(refused.value)
    assert pipeline.published() == before
    assert not (tmp_path / "hacked").exists()


@rows(WELCOME)
def test_odd_but_welcome(case: Case, pipeline: Pipeline, tmp_path: Path) -> None:
    data = pipeline.prepare(case.form(tmp_path))
    manifest = load_manifest(data.digest, pipeline.store)
    note = case.complaint.removeprefix("data_uri: ")
    assert any(each.startswith(note) for each in manifest.notes) if note else manifest.notes == ()
    if case.label == "names in every script":
        assert sorted(manifest.classes) == sorted(archives.SCRIPTS)


def assert_one_short_line(error: UserError) -> None:
    message = str(error)
    assert "\n" not in message
    assert not any(unicodedata.category(c) == "Cc" for c in message)
    assert len(message) < 800
    assert not any(secret in message for secret in ("u:p@", "Traceback"))
