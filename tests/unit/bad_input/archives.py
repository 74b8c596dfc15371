"""Archives that nobody should send, and a few odd ones that are welcome; each function writes one into a folder."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.unit.data.conftest import Files, encoded, image_tree, pack_tar, pack_zip, random_pixels, split_tree

Maker = Callable[[Path], Path]

GOOD = image_tree({"cat": 12, "dog": 12})
SCRIPTS = ("кошка", "猫", "قطة", "γάτα", "बिल्ली", "고양이", "🐈", "naïve café", "a'b\"c", "<b>$x$")


def zipped(files: Files, compression: int = zipfile.ZIP_STORED) -> Maker:
    return lambda folder: pack_zip(folder / "a.zip", files, compression)


def tarred(files: Files, mode: str = "w:gz") -> Maker:
    return lambda folder: pack_tar(folder / "a.tar", files, mode)


def with_image(name: str, content: bytes) -> Maker:
    """Good images and one more."""
    return zipped({**GOOD, name: content})


def raw(content: bytes) -> Maker:
    def make(folder: Path) -> Path:
        (folder / "a.zip").write_bytes(content)
        return folder / "a.zip"

    return make


def changed(change: Callable[[bytearray], bytes | bytearray], files: Files = GOOD) -> Maker:
    """A good zip whose bytes were changed afterwards."""

    def make(folder: Path) -> Path:
        path = pack_zip(folder / "a.zip", files)
        path.write_bytes(change(bytearray(path.read_bytes())))
        return path

    return make


def cut(share: float) -> Callable[[bytearray], bytearray]:
    return lambda content: content[: int(len(content) * share)]


def encrypt_first(content: bytearray) -> bytearray:
    """Set the flag of the first member in the directory and before its data."""
    content[content.index(b"PK\x01\x02") + 8] |= 1
    content[content.index(b"PK\x03\x04") + 6] |= 1
    return content


def flip_a_pixel(content: bytearray) -> bytearray:
    """The bytes differ, the checksum stays."""
    content[content.index(b"IDAT") + 8] ^= 0xFF
    return content


def overlap(content: bytearray) -> bytearray:
    """Let the last member lie where the first one does."""
    at = content.rindex(b"PK\x01\x02") + 42
    content[at : at + 4] = struct.pack("<L", 0)
    return content


def claim_200_mb_each(content: bytearray) -> bytearray:
    """A few kilobytes that say they unpack to gigabytes, as a bomb's directory does."""
    at = 0
    while (at := content.find(b"PK\x01\x02", at)) >= 0:
        content[at + 10 : at + 12] = struct.pack("<H", zipfile.ZIP_DEFLATED)
        content[at + 24 : at + 28] = struct.pack("<L", 200_000_000)
        at += 4
    return content


def larger_than_promised(folder: Path) -> Path:
    """A member of a megabyte whose directory says ten bytes."""
    path = pack_zip(folder / "a.zip", {**GOOD, "cat/big.bmp": b"\0" * 1_000_000}, zipfile.ZIP_DEFLATED)
    path.write_bytes(path.read_bytes().replace(struct.pack("<L", 1_000_000), struct.pack("<L", 10)))
    return path


def zeros_beside_images(folder: Path) -> Path:
    """A gigabyte of zeros in a tar.gz of a megabyte, in a member that is no image."""
    path = pack_tar(folder / "a.tar", GOOD, "w")
    zeros = tarfile.TarInfo("zeros")
    zeros.size = 1100 << 20
    images = path.read_bytes().rstrip(b"\0")
    images += b"\0" * (-len(images) % tarfile.BLOCKSIZE)
    packed = gzip.compress(b"\0" * (10 << 20)) * 110  # members of a gzip follow each other
    path.write_bytes(gzip.compress(images + zeros.tobuf()) + packed + gzip.compress(b"\0" * 10240))
    return path


def many_folders(folder: Path) -> Path:
    """100,001 classes of nothing, in a tar of a few hundred kilobytes."""
    with tarfile.open(folder / "a.tar", "w:gz", compresslevel=1) as archive:
        for number in range(100_001):
            archive.addfile(tarfile.TarInfo(f"{number}/1.png"))
    return folder / "a.tar"


def huge_tar_header(folder: Path) -> Path:
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    (folder / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + b"\0" * 10240)
    return folder / "a.tar"


def nested(depth: int, branches: int) -> Maker:
    """Zips in zips, as in 42.zip."""

    def make(folder: Path) -> Path:
        content = pack_zip(folder / "inner.zip", {"zeros.bmp": b"\0" * 10_000_000}, zipfile.ZIP_DEFLATED).read_bytes()
        for _ in range(depth):
            files = {f"{number}.zip": content for number in range(branches)}
            content = pack_zip(folder / "inner.zip", files, zipfile.ZIP_DEFLATED).read_bytes()
        return folder / "inner.zip"

    return make


def tar_member(kind: bytes, target: str) -> Maker:
    def make(folder: Path) -> Path:
        with tarfile.open(folder / "a.tar", "w") as archive:
            member = tarfile.TarInfo("cat/link.png")
            member.type, member.linkname = kind, target
            archive.addfile(member)
            for name, content in GOOD.items():
                plain = tarfile.TarInfo(name)
                plain.size = len(content)
                archive.addfile(plain, io.BytesIO(content))
        return folder / "a.tar"

    return make


def zip_link(folder: Path) -> Path:
    path = pack_zip(folder / "a.zip", GOOD)
    with zipfile.ZipFile(path, "a") as archive:
        member = zipfile.ZipInfo("cat/link.png")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc/passwd")
    return path


def same_name_twice(folder: Path) -> Path:
    path = pack_zip(folder / "a.zip", GOOD)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("cat/0.png", encoded(random_pixels(1)))
    return path


def named_in_every_script() -> Files:
    return image_tree(dict.fromkeys(SCRIPTS, 6))


def one_class() -> Files:
    return split_tree({"cat": 20}, {"cat": 20})
