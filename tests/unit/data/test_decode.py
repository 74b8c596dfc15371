from __future__ import annotations

import contextlib
import io
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from mlpipe.data.archives.decode import BadImageError, decode_image
from tests.unit.bad_input.images import png_header


def decoded(data: bytes | memoryview, size: int, remarks: Counter[str]) -> np.ndarray:
    pixels = np.full((size, size, 3), 77, np.uint8)
    decode_image(data, pixels, remarks)
    return pixels


def by_pillow(data: bytes, size: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR))


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def smooth(size: int) -> Image.Image:
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    return Image.fromarray(
        np.stack([np.tile(ramp, (size, 1)), np.tile(ramp[:, None], (1, size)), np.full((size, size), 90, np.uint8)], -1)
    )


@pytest.mark.parametrize(
    ("mode", "form", "options"),
    [
        ("RGB", "JPEG", {"quality": 60}),
        ("RGB", "JPEG", {"quality": 95, "subsampling": 0, "progressive": True}),
        ("L", "JPEG", {}),
        ("RGB", "JPEG", {"optimize": True, "comment": b"text", "restart_marker_blocks": 2}),
    ],
)
def test_short_way_gives_pillows_pixels(
    make: SimpleNamespace, mode: str, form: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = saved(Image.fromarray(make.random_pixels(1, 32)).convert(mode), form, **options)
    wanted = by_pillow(data, 32)
    monkeypatch.setattr(Image, "open", None)
    np.testing.assert_array_equal(decoded(data, 32, Counter()), wanted)
    np.testing.assert_array_equal(decoded(memoryview(bytearray(data)), 32, Counter()), wanted)


def test_a_known_header_vouches_for_nothing_else(make: SimpleNamespace) -> None:
    first, second = (saved(Image.fromarray(make.random_pixels(seed, 32)), "JPEG") for seed in (1, 2))
    assert first.partition(b"\xff\xda")[0] == second.partition(b"\xff\xda")[0]
    np.testing.assert_array_equal(decoded(first, 32, Counter()), by_pillow(first, 32))
    np.testing.assert_array_equal(decoded(second, 32, Counter()), by_pillow(second, 32))
    np.testing.assert_array_equal(decoded(second, 24, Counter()), by_pillow(second, 24))
    with pytest.raises(BadImageError):
        decoded(second[: len(second) * 3 // 4], 32, Counter())
    grey_head = saved(Image.new("L", (32, 32)), "JPEG")
    np.testing.assert_array_equal(decoded(grey_head, 32, Counter()), by_pillow(grey_head, 32))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"])
def test_formats_and_sizes(make: SimpleNamespace, form: str) -> None:
    data = saved(Image.fromarray(make.random_pixels(1, 20)), form)
    remarks: Counter[str] = Counter()
    for size in (8, 20, 48):
        pixels = decoded(data, size, remarks)
        assert pixels.shape == (size, size, 3)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, by_pillow(data, size))
    assert not remarks


def test_large_jpeg_differs_little_from_full_decoding() -> None:
    data = saved(smooth(512), "JPEG", quality=95)
    difference = np.abs(decoded(data, 32, Counter()).astype(int) - by_pillow(data, 32))
    assert difference.max() <= 3


def test_exif_orientation() -> None:
    image = smooth(16)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    remarks: Counter[str] = Counter()
    turned = decoded(saved(image, "JPEG", exif=exif, quality=95), 16, remarks).astype(int)
    assert remarks == {"turned upright by their EXIF orientation": 1}
    assert np.abs(turned - np.rot90(np.asarray(image), -1)).max() < 12
    np.testing.assert_array_equal(decoded(saved(image, "PNG", exif=exif), 16, remarks), np.rot90(np.asarray(image), -1))


@pytest.mark.filterwarnings("ignore")
def test_broken_exif_is_passed_over() -> None:
    data = saved(smooth(16), "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 40)
    assert decoded(data, 16, Counter()).shape == (16, 16, 3)


def test_transparency_lies_on_white() -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (10, 20, 30, 255)
    remarks: Counter[str] = Counter()
    for data in (
        saved(Image.fromarray(pixels)),
        saved(Image.fromarray(pixels), "WEBP", lossless=True),
        saved(Image.fromarray(pixels).quantize(4)),  # palette with alpha
    ):
        result = decoded(data, 4, remarks)
        assert (result[:2] == (10, 20, 30)).all()
        assert (result[2:] == 255).all()
    assert remarks == {"with transparency, laid on white": 3}
    assert decoded(saved(Image.new("RGB", (4, 4), "red"), transparency=(255, 0, 0)), 4, remarks).min() == 255
    grey = Image.merge("LA", (Image.new("L", (4, 4), 7), Image.new("L", (4, 4), 255)))
    before = remarks.copy()
    assert (decoded(saved(grey), 4, remarks) == 7).all()
    assert remarks == before  # nothing of it shines through


def test_sixteen_bits_keep_the_upper_eight() -> None:
    values = np.array([[0, 255, 256, 65535]] * 4, np.uint16)
    remarks: Counter[str] = Counter()
    for form in ("PNG", "TIFF"):
        result = decoded(saved(Image.fromarray(values), form), 4, remarks)
        assert result[0, :, 0].tolist() == [0, 0, 1, 255]
    assert remarks == {"of 16 bits, cut to the upper 8": 2}


def test_sixteen_bits_that_hold_twelve_are_said() -> None:
    remarks: Counter[str] = Counter()
    decoded(saved(Image.fromarray(np.full((4, 4), 4095, np.uint16))), 4, remarks)
    assert remarks["of 16 bits with no value above 4095, which is nearly black; convert them to 8 bits"] == 1


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ((0.0, 0.5, 1.0), np.float32, (0, 128, 255)),
        ((0.0, 100.0, 255.0), np.float32, (0, 100, 255)),
        ((0.0, 257.0, 65535.0), np.float32, (0, 1, 255)),
        ((-1.0, 0.0, 1.0), np.float32, (0, 128, 255)),
        ((3, 100, 200), np.int32, (3, 100, 200)),
        ((0, 1, 100_000), np.int32, (0, 0, 255)),
        ((-7, -7, -7), np.int32, (0, 0, 0)),
    ],
)
def test_thirty_two_bits_are_scaled_by_their_range(values: tuple[float, ...], dtype: Any, expected: Any) -> None:
    pixels = np.repeat(np.array(values, dtype)[:, None], 3, axis=1)
    found = decoded(saved(Image.fromarray(pixels), "TIFF"), 3, Counter())
    assert found[:, 0, 0].tolist() == list(expected)


def test_pixels_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(BadImageError, match="not finite"):
        decoded(saved(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), 4, Counter())


@pytest.mark.parametrize("form", ["HEIF", "AVIF"])
def test_formats_of_telephones(form: str) -> None:
    pillow_heif.register_heif_opener()
    data = saved(Image.new("RGB", (16, 16), (200, 30, 30)), form)
    assert np.abs(decoded(data, 16, Counter()).astype(int) - (200, 30, 30)).max() < 12


def test_cmyk() -> None:
    remarks: Counter[str] = Counter()
    data = saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG")
    assert np.abs(decoded(data, 8, remarks).astype(int) - (0, 255, 255)).max() < 8
    assert remarks == {"of CMYK, converted to RGB": 1}


@pytest.mark.parametrize("mode", ["1", "P", "L"])
def test_other_modes(mode: str) -> None:
    assert (decoded(saved(Image.new("RGB", (8, 8), "white").convert(mode)), 8, Counter()) == 255).all()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_picture_of_an_animation(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("#ff0000", "#00ff00")]
    data = saved(
        frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    remarks: Counter[str] = Counter()
    assert (decoded(data, 8, remarks) == (255, 0, 0)).all()
    assert remarks == {"with several pictures, of which the first was used": 1}


def test_tiny_image_is_reported() -> None:
    remarks: Counter[str] = Counter()
    assert (decoded(saved(Image.new("RGB", (1, 1), "white")), 8, remarks) == 255).all()
    assert remarks == {"with a side of less than 4 pixels": 1}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "empty"),
        (b"no image", "is not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "is not an image"),
        (b"\xff\xd8", "is not an image|is damaged"),
        (b"\x89PNG\r\n\x1a\n", "is not an image|is damaged"),
        (png_header(8, 8), "is damaged"),
        (png_header(50_000, 50_000), "pixels"),
        (png_header(30_000, 10), "has 30000 × 10 pixels; at most"),
        (png_header(9_000, 10_000), "has 9000 × 10000 pixels|more than .* pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images(data: bytes, match: str) -> None:
    with pytest.raises(BadImageError, match=match) as caught:
        decoded(data, 8, Counter())
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"])
def test_cut_off_images(make: SimpleNamespace, form: str) -> None:
    data = saved(Image.fromarray(make.random_pixels(0, 16)), form)
    for length in range(0, len(data) // 2, 7):
        with pytest.raises(BadImageError):
            decoded(data[:length], 16, Counter())


@pytest.mark.filterwarnings("ignore")  # Pillow warns of odd metadata
def test_noise_in_images_is_a_bad_image_or_pixels(make: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    for form in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"):
        whole = saved(Image.fromarray(make.random_pixels(0, 16)), form)
        for _ in range(60):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), 3):
                data[at] = rng.integers(0, 256)
            with contextlib.suppress(BadImageError):
                assert decoded(bytes(data), 16, Counter()).shape == (16, 16, 3)
