"""A file is the same tensor wherever it is read: when a data set is prepared, and when a logged model labels it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image
from torch import Tensor, nn

from mlpipe.data.archives.archive import open_archive
from mlpipe.data.archives.folders import pack_folder
from mlpipe.data.archives.layout import resolve_layout
from mlpipe.data.imageset import ArchivedImages
from mlpipe.models import package
from mlpipe.models.portable import ImageClassifier, ModelDescription

SIZE = 32
FORMATS = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "jpeg": ("L", "RGB", "CMYK"),
    "bmp": ("1", "L", "P", "RGB"),
    "gif": ("L", "P"),
    "webp": ("RGB", "RGBA"),
    "tiff": ("1", "L", "I;16", "I", "F", "RGB", "RGBA", "CMYK"),
    "avif": ("RGB", "RGBA"),
    "heif": ("RGB",),
}
"""By file format the modes that Pillow writes of it."""
SIZES = {"same": (SIZE, SIZE), "other": (50, 41), "large": (400, 300)}


def picture(mode: str, size: tuple[int, int], seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 4), np.uint8), "RGBA").resize(size, Image.Resampling.BICUBIC)
    if mode in ("I;16", "I", "F"):
        values = np.asarray(coarse.convert("L")).astype(np.float64) / 255
        array = values.astype(np.float32) if mode == "F" else (values * 65535).astype("i4" if mode == "I" else "u2")
        return Image.fromarray(array)
    return coarse if mode == "RGBA" else coarse.convert("RGB").convert(mode)


def content(form: str, mode: str, size: tuple[int, int], seed: int, orientation: int | None = None) -> bytes:
    pillow_heif.register_heif_opener()
    options: dict[str, Any] = {"quality": 90} if form == "jpeg" else {}
    if orientation:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    buffer = io.BytesIO()
    picture(mode, size, seed).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Every mode, format and size that is read, and every orientation."""
    cases = [(form, mode, size, None) for form, modes in FORMATS.items() for mode in modes for size in SIZES.values()]
    cases += [("jpeg", "RGB", SIZES["other"], orientation) for orientation in range(2, 9)]
    cases += [("png", "RGB", SIZES["other"], 6), ("webp", "RGB", SIZES["same"], 6)]
    paths = []
    for number, (form, mode, size, orientation) in enumerate(cases):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number:03d}.{form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(form, mode, size, number, orientation))
        paths.append(path)
    return paths


@pytest.fixture
def classifier(description: ModelDescription, network: nn.Module, tmp_path: Path) -> ImageClassifier:
    loaded = ImageClassifier()
    loaded.load(*package.write_files(replace(description, file_size=SIZE), network, tmp_path))
    return loaded


def seen_by(classifier: ImageClassifier, call: Any) -> Tensor:
    """What the network is shown during a call."""
    shown: list[Tensor] = []
    hook = classifier.predictor.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0].clone()))
    call()
    hook.remove()
    return shown[0] if len(shown) == 1 else pytest.fail("more than one batch")


def test_training_and_prediction_see_the_same_pixels(
    files: list[Path], classifier: ImageClassifier, tmp_path: Path
) -> None:
    packed = tmp_path / "packed.zip"
    pack_folder(tmp_path / "images", packed, field="data_uri", max_bytes=1 << 30)
    prepared: dict[str, np.ndarray] = {}
    with open_archive(packed) as archive:
        images = ArchivedImages(archive, resolve_layout(archive))
        for run in images.runs(SIZE):
            decoded = run.decode()
            assert not decoded.bad
            prepared |= {Path(images.name(run.start + i)).name: pixels for i, pixels in enumerate(decoded.images_u8)}
    assert set(prepared) == {path.name for path in files}
    expected = seen_by(classifier, lambda: classifier.probabilities(np.stack([prepared[path.name] for path in files])))
    assert np.array_equal(seen_by(classifier, lambda: classifier.predict_files(files)), expected)
    as_bytes = seen_by(classifier, lambda: classifier.predict_files([path.read_bytes() for path in files]))
    assert np.array_equal(as_bytes, expected)


def test_a_phones_photograph_is_turned_upright(classifier: ImageClassifier) -> None:
    above = np.zeros((40, 60, 3), np.uint8)
    above[:20] = 255  # light above; the phone stores it turned, and says so
    upright, turned = io.BytesIO(), io.BytesIO()
    Image.fromarray(above).save(upright, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(above)).save(turned, "PNG", exif=exif)
    answers = classifier.predict_files([upright.getvalue(), turned.getvalue()]).filter(like="probability_").to_numpy()
    assert np.array_equal(answers[0], answers[1])


def test_sixteen_bits_keep_their_brightness_and_hidden_colors_stay_hidden(classifier: ImageClassifier) -> None:
    def file(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    def grey(value: int) -> Image.Image:
        return Image.fromarray(np.full((8, 8), value, np.uint16))

    hidden = np.zeros((8, 8, 4), np.uint8)  # black, and transparent everywhere
    shown = seen_by(
        classifier,
        lambda: classifier.predict_files(
            [
                file(grey(1000)),
                file(grey(60_000)),
                file(Image.fromarray(hidden)),
                file(Image.new("RGB", (8, 8), "white")),
            ]
        ),
    )
    assert not np.array_equal(shown[0], shown[1])
    assert np.array_equal(shown[2], shown[3])


def test_one_bad_file_stops_no_other(classifier: ImageClassifier, files: list[Path], tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (20_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    bomb.write_bytes(header + b"\x00" * 40)
    odd = tmp_path / "odd.bmp"
    odd.write_bytes(b"BM" + b"\xff" * 60)
    missing = tmp_path / "missing.png"
    frame = classifier.predict_files([files[0], bomb, odd, missing, tmp_path, files[1]])
    assert [bool(error) for error in frame["error"]] == [False, True, True, True, True, False]
    assert frame["label"].notna().tolist() == [True, False, False, False, False, True]
    assert not [error for error in frame["error"] if "\n" in error]
    assert frame["error"][3] == "No such file or directory"
