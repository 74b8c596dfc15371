"""One image file's bytes to pixels: when a data set is prepared, and when a logged model labels files.

This file travels with every logged model, so it imports nothing of mlpipe. Where simplejpeg or pillow-heif is not
installed it does without: Pillow decodes the same JPEG pixels, and HEIC is refused.

Every file becomes 8-bit RGB of one size: turned upright by its EXIF orientation, transparency laid on white, the first
picture of an animation, 16 bits cut to the upper 8, 32 bits scaled by their range, CMYK and palettes converted by
Pillow, embedded color profiles ignored. Plain JPEGs that already have the wanted size take a shorter way through
simplejpeg, which runs the same libjpeg-turbo (the pixels are the same, a test holds it) without Pillow's 35 µs of
bookkeeping per image, most of them under Python's lock, and without the second copy and the 10 µs per image of
torchvision.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections import Counter

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

MAX_PIXELS = 89_478_485
"""Of one image; Pillow's own limit, a quarter of a gigabyte of RGB."""
MAX_SIDE = 25_000
"""Pixels of an image's longer side."""
TINY_SIDE = 4
"""An image of a side shorter than this is reported, pixels."""

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "AVIF")
_ORIENTATION = 0x0112
_DRAFT_MARGIN = 4
"""A JPEG is decoded at 1/2, 1/4 or 1/8 of its size (libjpeg's scaled DCT) while that leaves this many times the wanted
side; then the antialiased resizing has the last word."""

_UNDECODABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's readers raise on files that are not what they seem."""


class BadImageError(ValueError):
    """A file that is no usable image; the message says why."""


def decode_image(data: bytes | memoryview, pixels: NDArray[np.uint8], remarks: Counter[str]) -> None:
    """Decode an image file into `pixels`, (size, size, 3) RGB; the image's aspect ratio is not kept.

    Args:
        remarks: counts what was done that not everybody expects.

    Raises:
        BadImageError: the file is damaged, not an image, too large, or of a mode without an agreed range.
    """
    if not _decode_plain(data, pixels):
        pixels[:] = _by_pillow(data, len(pixels), remarks)


def _by_pillow(data: bytes | memoryview, size: int, remarks: Counter[str]) -> NDArray[np.uint8]:
    if not len(data):
        raise BadImageError("is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=_formats(data)) as image:
            _check_size(image)
            return _pixels(image, size, remarks)
    except BadImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImageError("is not an image") from error
    except Image.DecompressionBombError as error:
        raise BadImageError(f"has more than {MAX_PIXELS:,} pixels; make it smaller") from error
    except _UNDECODABLE as error:
        raise BadImageError(f"is damaged ({' '.join(str(error).split())[:80] or type(error).__name__})") from error


def _formats(data: bytes | memoryview) -> tuple[str, ...]:
    """Pillow's names of the formats that are read; that of telephones needs a plugin, which is loaded on first use."""
    if bytes(data[4:8]) != b"ftyp" or bytes(data[8:12]) in (b"avif", b"avis"):
        return FORMATS
    try:
        import pillow_heif
    except ImportError:
        raise BadImageError("is HEIC, for which pillow-heif is not installed") from None
    pillow_heif.register_heif_opener()
    return (*FORMATS, "HEIF")


def resize_pixels(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(H, W) grey or (H, W, 3) RGB to (size, size, 3) RGB, antialiased bilinear."""
    return _resized(Image.fromarray(pixels).convert("RGB"), size)


def _resized(image: Image.Image, size: int) -> NDArray[np.uint8]:
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadImageError(
            f"has {width} × {height} pixels; at most {MAX_PIXELS:,} in all and {MAX_SIDE:,} a side are read"
        )


def _pixels(image: Image.Image, size: int, remarks: Counter[str]) -> NDArray[np.uint8]:
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photograph with its preview
        remarks["with several pictures, of which the first was used"] += 1
    if min(image.size) < TINY_SIDE:
        remarks[f"with a side of less than {TINY_SIDE} pixels"] += 1
    image.draft(None, (_DRAFT_MARGIN * size, _DRAFT_MARGIN * size))
    image.load()
    return _resized(_to_rgb(_upright(image, remarks), remarks), size)


def _upright(image: Image.Image, remarks: Counter[str]) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except _UNDECODABLE:  # broken metadata leave the pixels as they are
        return image
    if orientation not in range(2, 9):
        return image
    remarks["turned upright by their EXIF orientation"] += 1
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image, remarks: Counter[str]) -> Image.Image:
    if image.mode.startswith("I;16"):
        remarks["of 16 bits, cut to the upper 8"] += 1
        values = np.asarray(image)
        if values.max() < 1 << 12:  # as cameras of 12 bits write; a dark image of 16 bits looks the same
            remarks["of 16 bits with no value above 4095, which is nearly black; convert them to 8 bits"] += 1
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_scaled(np.asarray(image), remarks)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema()[0] < 255:  # type: ignore[operator]
            remarks["with transparency, laid on white"] += 1
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode == "CMYK":
        remarks["of CMYK, converted to RGB"] += 1
    return image.convert("RGB")


def _scaled(values: NDArray[np.integer | np.floating], remarks: Counter[str]) -> NDArray[np.uint8]:
    """(H, W) values of 32 bits to 0..255, by the range that they lie in: 0..1, 0..255, 0..65535, or their own."""
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low + high):
        raise BadImageError("has pixels that are not finite numbers")
    fractions = values.dtype.kind == "f"
    for limit in (1.0, 255.0, 65535.0) if fractions else (255.0, 65535.0):
        if low >= 0 and high <= limit:
            remarks[f"of 32 bits, scaled from 0 to {limit:g}"] += 1
            return np.rint(values * (255 / limit)).astype(np.uint8)
    remarks["of 32 bits, scaled from their darkest to their brightest pixel"] += 1
    return np.rint((values - low) * (255 / (high - low or 1))).astype(np.uint8)


def _decode_plain(data: bytes | memoryview, pixels: NDArray[np.uint8]) -> bool:
    """The short way. `False`: the file is no plain JPEG, has another size, or is damaged; Pillow then judges it."""
    if simplejpeg is None or data[:2] != b"\xff\xd8" or not _is_plain_jpeg(data, len(pixels)):
        return False
    try:
        simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=pixels, strict=True)
    except ValueError:
        return False
    return True


# Segments that say nothing about what the pixels mean: JFIF, comment, quantisation and Huffman tables, restarts.
# Others (EXIF, Adobe's color transform, several pictures in one file) are Pillow's.
_NEUTRAL_SEGMENTS = frozenset({0xE0, 0xFE, 0xDB, 0xC4, 0xDD})
_BASELINE, _EXTENDED, _PROGRESSIVE, _START_OF_SCAN = 0xC0, 0xC1, 0xC2, 0xDA

_last_head = (b"", 0)
"""All segments of the last plain JPEG and its size: most images of a data set come from one encoder."""


def _is_plain_jpeg(data: bytes | memoryview, size: int) -> bool:
    """8-bit grey or YCbCr of `size` × `size`."""
    global _last_head
    head, size_of_last = _last_head
    if size == size_of_last and bytes(data[: len(head)]) == head:
        return True
    scan_at = _find_scan(data, size)
    if scan_at is None:
        return False
    _last_head = (bytes(data[: scan_at + 2]), size)
    return True


def _find_scan(data: bytes | memoryview, size: int) -> int | None:
    """Where the picture begins, if the segments before it (ITU-T T.81, annex B) are those of a plain JPEG."""
    at, end, fits = 2, len(data) - 10, False
    while at < end:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == _START_OF_SCAN:
            return at if fits else None
        if marker in (_BASELINE, _EXTENDED, _PROGRESSIVE):
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            fits = data[at + 4] == 8 and height == width == size and data[at + 9] in (1, 3)
        elif marker not in _NEUTRAL_SEGMENTS:
            return None
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None
