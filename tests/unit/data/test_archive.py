from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import inflate64
import numpy as np
import pytest

from mlpipe.data.archives.archive import open_archive
from mlpipe.data.archives.layout import resolve_layout
from mlpipe.data.archives.listing import ArchiveLimits
from mlpipe.errors import UserError

PIXEL = b"not really pixels"  # the archive's reader does not decode


def contents(path: Path, max_count: int = 3, max_bytes: int = 1 << 20) -> dict[str, bytes]:
    """Everything that the reader sees, in its order."""
    with open_archive(path) as archive:
        found: dict[str, bytes] = {}
        for packed in archive.stream(max_count, max_bytes):
            assert packed.start == len(found)
            assert 1 <= packed.count <= max_count
            files = list(packed.read())
            assert len(files) == packed.count
            for offset, data in enumerate(files):
                found[archive.name(packed.start + offset)] = bytes(data)
        assert len(found) == len(archive) == len(archive.sizes)
        return found


def refused(path: Path, match: str, limits: ArchiveLimits | None = None) -> None:
    def read_all() -> None:
        with open_archive(path, limits) as archive:
            for packed in archive.stream(8, 1 << 20):
                list(packed.read())

    with pytest.raises(UserError, match=match):
        read_all()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_is_read_as_zipfile_reads_it(make: SimpleNamespace, tmp_path: Path, compression: int) -> None:
    rng = np.random.default_rng(0)
    files = {f"c{i % 3}/{i}.png": rng.bytes(int(rng.integers(0, 5000))) for i in range(50)}
    assert contents(make.pack_zip(tmp_path / "a.zip", files, compression)) == files


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tar_is_read_as_tarfile_reads_it(make: SimpleNamespace, tmp_path: Path, mode: str) -> None:
    files = {f"./c{i % 3}/{'long' * 40}{i}.png": bytes([i]) * i * 100 for i in range(20)}
    assert contents(make.pack_tar(tmp_path / "a.tar", files, mode)) == files


def test_zip64_and_comment(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("a/1.png", "w", force_zip64=True) as member:  # 20 bytes of extra field
            member.write(PIXEL)
        archive.writestr("b/2.png", PIXEL)
        archive.comment = b"PK\x05 a comment"
    assert contents(path) == {"a/1.png": PIXEL, "b/2.png": PIXEL}


@pytest.mark.parametrize(
    ("large", "match"),
    [((), "damaged"), ((len(PIXEL),), "damaged"), ((len(PIXEL), 2**63 - 1), "members lie outside of it")],
    ids=["no sizes", "one size of two", "more than there is"],
)
def test_large_sizes_that_cannot_be(tmp_path: Path, large: tuple[int, ...], match: str) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        member = zipfile.ZipInfo("a/1.png")
        member.compress_type = zipfile.ZIP_DEFLATED
        member.extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large)
        archive.writestr(member, PIXEL)
    content = bytearray(path.read_bytes())
    struct.pack_into("<2L", content, content.index(b"PK\x01\x02") + 20, 0xFFFFFFFF, 0xFFFFFFFF)
    path.write_bytes(content)
    refused(path, match)


def test_zip_of_more_than_65535_members(make: SimpleNamespace, tmp_path: Path) -> None:
    path = make.pack_zip(tmp_path / "a.zip", {f"c{i % 2}/{i}.png": b"" for i in range(66_000)})
    with open_archive(path) as archive:
        assert len(archive) == 66_000
        assert archive.name(65_999) == "c1/65999.png"


def test_zip_with_unseekable_output(tmp_path: Path) -> None:
    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.content = b""

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.content += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:  # sizes follow the data
        archive.writestr("a/1.png", PIXEL * 10)
    (tmp_path / "a.zip").write_bytes(pipe.content)
    assert contents(tmp_path / "a.zip") == {"a/1.png": PIXEL * 10}


def test_names_in_every_script(make: SimpleNamespace, tmp_path: Path) -> None:
    names = ["кошка", "猫", "قطة", "γάτα", "बिल्ली", "고양이", "🐈", "naïve café", "a'b\"c", "$x$", "..."]
    files = {f"{name}/图{i}.PNG": PIXEL for i, name in enumerate(names)}
    for path in (make.pack_zip(tmp_path / "a.zip", files), make.pack_tar(tmp_path / "a.tar", files)):
        with open_archive(path) as archive:
            shown = [folder[0] for folder in archive.folders]
        assert sorted(shown) == sorted(name for name in names if name != "...")


def test_utf8_without_its_flag(make: SimpleNamespace, tmp_path: Path) -> None:
    path = make.pack_zip(tmp_path / "a.zip", {"кот/1.png": PIXEL})
    content = path.read_bytes().replace(b"\x14\x00\x00\x08\x00\x00", b"\x14\x00\x00\x00\x00\x00")
    assert content != path.read_bytes()
    path.write_bytes(content)
    assert list(contents(path)) == ["кот/1.png"]


def old_zip(make: SimpleNamespace, path: Path, encoding: str, *names: str) -> Path:
    """A zip whose names are not UTF-8, which Python's zipfile does not write."""
    raw = [name.encode(encoding) for name in names]
    placeholders = [b"%c" % (ord("A") + number) * len(name) for number, name in enumerate(raw)]
    content = make.pack_zip(path, {name.decode(): PIXEL for name in placeholders}).read_bytes()
    for placeholder, name in zip(placeholders, raw, strict=True):
        content = content.replace(placeholder, name)
    path.write_bytes(content)
    return path


def test_half_a_letter_of_shift_jis_is_no_backslash(make: SimpleNamespace, tmp_path: Path) -> None:
    names = ("ソファ/1.png", "ソックス/1.png", "ベッド/1.png", "ソファ/x.csv")
    with open_archive(old_zip(make, tmp_path / "a.zip", "cp932", *names)) as archive:
        layout = resolve_layout(archive)
        assert len(layout.classes) == 3
        assert layout.notes[0].startswith("names of 3 images are not UTF-8, as in zips of an old Windows")
        assert archive.read_table(archive.tables[0]) == (PIXEL.decode(), [])


@pytest.mark.parametrize("name", ["apple", "pêche"])
def test_backslashes_of_windows_are_separators(make: SimpleNamespace, tmp_path: Path, name: str) -> None:
    with open_archive(old_zip(make, tmp_path / "a.zip", "cp437", f"{name}\\1.png", "uva\\1.png")) as archive:
        assert archive.folders == [(name,), ("uva",)]


def test_names_of_the_field_for_unicode_paths(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for raw, of_raw in (("_/1.png", "_/1.png"), ("b/1.png", "renamed since")):
            path = "猫/1.png".encode()
            member = zipfile.ZipInfo(raw)
            member.extra = struct.pack("<HHBL", 0x7075, 5 + len(path), 1, zlib.crc32(of_raw.encode())) + path
            archive.writestr(member, PIXEL)
    assert list(contents(tmp_path / "a.zip")) == ["猫/1.png", "b/1.png"]


def test_a_damaged_csv_is_named(make: SimpleNamespace, tmp_path: Path) -> None:
    path = make.pack_zip(
        tmp_path / "a.zip", {"1.png": PIXEL, "labels.csv": b"image,label\n" * 50}, zipfile.ZIP_DEFLATED
    )
    content = bytearray(path.read_bytes())
    content[content.index(b"labels.csv") + len("labels.csv")] = 0xFF  # the first byte of its data
    path.write_bytes(content)
    with open_archive(path) as archive, pytest.raises(UserError, match=r"member 'labels\.csv' cannot be unpacked"):
        resolve_layout(archive)


def test_what_systems_leave_behind_is_passed_over(make: SimpleNamespace, tmp_path: Path) -> None:
    litter = {
        "__MACOSX/a/._1.png": b"",
        "a/.DS_Store": b"",
        "a/Thumbs.db": b"",
        "a/Icon\r": b"",
        "a\\.hidden.png": b"",
        "__MACOSX/a/._Icon\r": b"",
        "$RECYCLE.BIN/2.png": b"x",
        "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg": b"x",
        "./": b"",
        ".git/x.png": b"",
        "a/.hidden.png": b"",
    }
    other = {"README.md": b"", "a/labels.csv": b"", "more.zip": b""}
    with open_archive(
        make.pack_zip(tmp_path / "a.zip", {"a/1.png": PIXEL, "b/1.png": PIXEL, **litter, **other})
    ) as archive:
        assert len(archive) == 2
        assert archive.num_others == 3
        assert "3 files that are not images were left out: README.md" in resolve_layout(archive).notes[0]


def tar_of_folders(path: Path, number: int) -> Path:
    with tarfile.open(path, "w") as archive:
        for i in range(number):
            folder = tarfile.TarInfo(f"{i}")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
    return path


def test_bombs(make: SimpleNamespace, tmp_path: Path) -> None:
    big = make.pack_zip(tmp_path / "a.zip", {f"a/{i}.bmp": b"\0" * 200_000 for i in range(20)}, zipfile.ZIP_DEFLATED)
    refused(big, "decompression bomb", ArchiveLimits(ratio_from_bytes=1_000_000))
    refused(big, "at most 0 MB are read", ArchiveLimits(max_image_bytes=100_000))
    refused(big, "decompression bomb", ArchiveLimits(max_total_bytes=1_000_000))
    refused(big, "more than 5 images", ArchiveLimits(max_images=5))
    refused(big, "more than 7 members", ArchiveLimits(max_members=7))
    tar = make.pack_tar(tmp_path / "a.tar", {"a/1.png": PIXEL, "zeros": b"\0" * 3_000_000})
    refused(tar, "decompression bomb", ArchiveLimits(max_total_bytes=1_000_000))
    refused(tar, "decompression bomb", ArchiveLimits(ratio_from_bytes=1_000_000))  # no image in it is large
    more = tmp_path / "more.tar"
    more.write_bytes(
        make.pack_tar(tmp_path / "b.tar", {"a/1.png": PIXEL}).read_bytes() + gzip.compress(b"\0" * 3_000_000)
    )
    refused(more, "decompression bomb", ArchiveLimits(ratio_from_bytes=1_000_000))  # after the archive's end
    contents(more)
    refused(tar_of_folders(tmp_path / "c.tar", 20), "more than 10 members", ArchiveLimits(max_members=10))
    folders = make.pack_zip(tmp_path / "b.zip", {f"{i}/1.png": PIXEL for i in range(20)})
    refused(folders, "more than 10 folders", ArchiveLimits(max_folders=10))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "neither a zip nor a tar"),
        (b"hello", "neither a zip nor a tar"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"7z\xbc\xaf'\x1c", "7z archive"),
        (b"Rar!\x1a\x07", "rar archive"),
        (b"PK\x03\x04", "damaged"),
        (b"\x1f\x8b\x08", "damaged"),
        (b"\x1f\x8b" + b"x" * 100, "damaged"),
        (b"BZh9" + b"x" * 100, "damaged"),
        (b"\xfd7zXZ\x00" + b"x" * 100, "damaged"),
    ],
)
def test_not_an_archive(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "a").write_bytes(content)
    refused(tmp_path / "a", match)


@pytest.mark.parametrize("kind", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
def test_cut_off_anywhere(make: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    files = {f"c{i}/1.png": rng.bytes(700) for i in range(6)}
    whole = make.pack_zip(tmp_path / "a", files) if kind == "zip" else make.pack_tar(tmp_path / "a", files, kind)
    content = whole.read_bytes()
    # An unpacked tar ends in zeros to a multiple of 10,240; cutting off some of those is no damage.
    end = len(content) if kind != "w" else 6 * 1536
    for length in (*range(0, end, 97), end - 1):
        (tmp_path / "cut").write_bytes(content[:length])
        refused(tmp_path / "cut", "damaged|neither a zip nor a tar")


def deflate64_zip(path: Path, files: dict[str, bytes]) -> Path:
    """As Windows packs folders above 2 GB: Python's zipfile cannot write it, so each member is packed and marked."""
    packed = {}
    for name, content in files.items():
        deflater = inflate64.Deflater()
        packed[name] = deflater.deflate(content) + deflater.flush()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in packed.items():
            archive.writestr(name, content)
    data = bytearray(path.read_bytes())
    for name, content in files.items():
        for signature, method_at, crc_at in ((b"PK\x03\x04", 8, 14), (b"PK\x01\x02", 10, 16)):
            name_at = data.find(name.encode(), 0 if signature[2] == 3 else data.find(b"PK\x01\x02"))
            start = data.rfind(signature, 0, name_at)
            struct.pack_into("<H", data, start + method_at, 9)
            struct.pack_into("<LLL", data, start + crc_at, zlib.crc32(content), len(packed[name]), len(content))
    path.write_bytes(data)
    return path


def test_what_windows_packs_above_two_gigabytes(make: SimpleNamespace, tmp_path: Path) -> None:
    files = make.image_tree({"a": 2, "b": 2}) | {"b/large.png": bytes(200_000)}
    with open_archive(deflate64_zip(tmp_path / "a.zip", files)) as archive:
        found = [bytes(data) for packed in archive.stream(10, 1 << 20) for data in packed.read()]
    assert found == list(files.values())


@pytest.mark.parametrize("pack", ["pack_zip", "pack_tar"])
def test_files_without_a_suffix_are_known_by_their_first_bytes(
    make: SimpleNamespace, tmp_path: Path, pack: str
) -> None:
    png = make.encoded(make.random_pixels(1))
    files = {"a/1": png, "a/README": b"text", "b/2": make.encoded(make.random_pixels(2), "JPEG"), "b/Makefile": b""}
    with open_archive(getattr(make, pack)(tmp_path / "a.bin", files)) as archive:
        assert [archive.name(i) for i in range(len(archive))] == ["a/1", "b/2"]
        assert archive.num_others == 2
