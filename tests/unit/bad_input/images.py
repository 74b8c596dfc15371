"""Image files of every odd kind."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def plain(mode: str = "RGB", size: tuple[int, int] = (16, 12)) -> Image.Image:
    pixels = np.random.default_rng(7).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def sixteen_bit() -> bytes:
    return saved(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257))


def not_finite() -> bytes:
    return saved(Image.fromarray(np.full((16, 16), np.nan, np.float32)), "TIFF")


def palette_with_alpha() -> bytes:
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:8] = (200, 10, 10, 255)
    return saved(Image.fromarray(pixels).quantize(8))


def animated() -> bytes:
    return saved(plain(), "GIF", save_all=True, append_images=[Image.new("RGB", (16, 12), "red")])


def rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(plain(), "JPEG", exif=exif)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises that many pixels and has none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
