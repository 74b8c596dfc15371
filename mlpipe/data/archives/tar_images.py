"""Images in a tar, packed or not."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mlpipe.data.archives.listing import DAMAGED, ArchiveLimits, ImageArchive, Listing, Packed, copy_bounded, why
from mlpipe.data.archives.names import MAGIC_BYTES
from mlpipe.errors import UserError


class TarImages(ImageArchive):
    """A tar, packed or not. It is read from front to back: once to list it, once for the images."""

    def __init__(self, path: Path, limits: ArchiveLimits) -> None:
        self._names: list[str] = []
        super().__init__(path, limits)

    def name(self, index: int) -> str:
        return self._names[index]

    def _list(self, listing: Listing) -> None:
        for tar, member in self._members():
            if member.isdir():
                if member.name not in ("", "."):
                    listing.add_folder(member.name)
            elif listing.add(member.name, member.size, lambda: _head(tar, member)):  # noqa: B023 - called at once
                self._names.append(member.name)

    def copy_member(self, name: str, target: BinaryIO, max_bytes: int) -> None:
        for tar, member in self._members():
            if member.name == name and (reader := tar.extractfile(member)):
                copy_bounded(reader, target, name, max_bytes)
                return

    def stream(self, max_count: int, max_bytes: int) -> Iterator[Packed]:
        runs = self._runs(max_count, max_bytes)
        try:
            start, stop = next(runs, (0, 0))
            files: list[bytes | memoryview] = []
            for tar, member in self._members():
                position = start + len(files)
                if position >= len(self) or member.name != self._names[position]:
                    continue
                files.append(self._content(tar, member))
                if position + 1 == stop:
                    yield Packed(start, stop - start, lambda files=files: files)  # type: ignore[misc]
                    files = []
                    start, stop = next(runs, (len(self), len(self)))
        except DAMAGED as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the archive is damaged ({why(error)}); copy or pack it again") from error

    @staticmethod
    def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        reader = tar.extractfile(member)
        content = reader.read() if reader else b""
        if len(content) != member.size:
            raise EOFError(f"{member.name[:120]!r} is cut off")
        return content

    def _members(self) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        """Members one by one; none is kept, so that memory does not grow with their number."""
        with open_tar(self.path, self.limits) as (tar, bounded):
            while (member := tar.next()) is not None:
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise UserError(
                        f"the archive's member {member.name[:120]!r} is a link or device; pack plain files only"
                    )
                yield tar, member
                tar.members.clear()  # type: ignore[attr-defined]
            _check_end(bounded)


def _head(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    reader = tar.extractfile(member)
    return reader.read(MAGIC_BYTES) if reader else b""


@contextmanager
def open_tar(path: Path, limits: ArchiveLimits) -> Iterator[tuple[tarfile.TarFile, _Bounded]]:
    """A tar, packed or not, and the bytes that it is read from, which end with an error where a bomb begins."""
    with (
        _unpacked(path) as unpacked,
        closing(_Bounded(unpacked, limits, path.stat().st_size)) as bounded,
        tarfile.open(fileobj=bounded, mode="r:") as tar,
    ):
        yield tar, bounded


def _unpacked(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(6)
    if head[:2] == b"\x1f\x8b":
        return gzip.open(path, "rb")
    if head[:3] == b"BZh":
        return bz2.open(path, "rb")
    if head == b"\xfd7zXZ\x00":
        return lzma.open(path, "rb")
    return path.open("rb")


def _check_end(bounded: _Bounded) -> None:
    """tarfile takes a damaged or cut header for the archive's end; that is a block of zeros."""
    if len(bounded.last_read) != tarfile.BLOCKSIZE or any(bounded.last_read):
        raise EOFError("its end is missing or a header is broken")
    # What follows the last member holds a packed stream's own checksum.
    while bounded.read(1 << 16):
        pass


class _Bounded(io.RawIOBase):
    """The unpacked bytes, refusing reads of a size that no image or header has, and more of them than images make."""

    def __init__(self, unpacked: Any, limits: ArchiveLimits, packed_bytes: int) -> None:
        self._unpacked = unpacked
        self._max_read = limits.max_image_bytes
        self._max_total = limits.unpacked_bytes(packed_bytes)
        self.last_read = b""

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > self._max_read:
            raise UserError("the archive has a member or header of an absurd size; pack it again")
        content: bytes = self._unpacked.read(size)
        self._check(self._unpacked.tell())
        self.last_read = content
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._check(offset if whence == os.SEEK_SET else 0)  # before it is unpacked
        position: int = self._unpacked.seek(offset, whence)
        self._check(position)
        return position

    def tell(self) -> int:
        position: int = self._unpacked.tell()
        return position

    def _check(self, position: int) -> None:
        if position > self._max_total:
            raise UserError("the archive unpacks to more than images do; is it a decompression bomb?")
