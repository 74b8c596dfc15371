"""Small archives and images that the tests make."""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.web import web_server

Files = dict[str, bytes]


def encoded(pixels: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    """An image file of (H, W), (H, W, 3) or (H, W, 4) pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def random_pixels(seed: int, size: int = 8) -> np.ndarray:
    """(size, size, 3) uint8"""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def image_tree(per_class: Mapping[str, int], prefix: str = "", seed: int = 0) -> Files:
    """PNGs `prefix<class>/<n>.png`, all different."""
    return {
        f"{prefix}{name}/{number}.png": encoded(random_pixels(zlib.crc32(f"{seed}/{prefix}{name}/{number}".encode())))
        for name, count in per_class.items()
        for number in range(count)
    }


def split_tree(train: Mapping[str, int], test: Mapping[str, int]) -> Files:
    return image_tree(train, "train/") | image_tree(test, "test/")


def pack_zip(path: Path, files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def pack_tar(path: Path, files: Mapping[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The functions of this module, for test modules, which cannot import it."""
    functions = (encoded, random_pixels, image_tree, split_tree, pack_zip, pack_tar, web_server)
    return SimpleNamespace(**{function.__name__: function for function in functions})
