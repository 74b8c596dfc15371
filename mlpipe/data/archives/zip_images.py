"""Images in a zip.

Python's zipfile keeps a 660-byte object per member and reads members one at a time under its lock; for many small
images that costs as much as decoding them, and memory grows with their number. So the directory is read here, into
some fifty bytes per image. Layouts: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (6.3.10).
"""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import inflate64
import numpy as np

from mlpipe.data.archives.listing import ArchiveLimits, ImageArchive, Listing, Packed, copy_bounded, why
from mlpipe.data.archives.names import MAGIC_BYTES
from mlpipe.errors import UserError

_END = struct.Struct("<4s4H2LH")
_END_64_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4sxB2xHH4x3L3H4x2L")
"""Of a member's entry in the directory: signature, system, flags, method, CRC-32, packed and unpacked size, lengths of
name, extra field and comment, attributes, offset of the local header."""
_LOCAL = struct.Struct("<4s5H3L2H")
_STORED, _DEFLATED, _DEFLATE64 = 0, 8, 9
_ENCRYPTED, _UTF8 = 0x1 | 0x40 | 0x2000, 0x800
_UNICODE_PATH = b"\x75\x70"
_UNIX = 3
_PLAIN = (0, stat.S_IFREG, stat.S_IFDIR)
_PIECE = 1 << 14
"""Bytes that are unpacked at once by deflate64, of which a thousand times as many may come out."""
_SLACK = 256
"""Room for the local headers' extra fields, which may be longer than the directory says, bytes."""
LINKS = b"mlpipe links left out: "
"""Begins the comment of a folder's zip; a number follows."""
LEFT_OUT_LINKS = "links and special files were left out; copy the folder with `cp -rL` to have what links point to"


class ZipImages(ImageArchive):
    """A zip. Images can be read in any order and by many threads at once."""

    def __init__(self, path: Path, limits: ArchiveLimits) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        self._offsets = array("q")  # of local headers
        self._packed_sizes = array("q")
        self._checksums = array("L")
        self._methods = array("B")
        self._name_lengths = array("H")
        self._directory_positions = array("q")
        try:
            super().__init__(path, limits)
            self._check_overlaps()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        super().close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def name(self, index: int) -> str:
        position = self._directory_positions[index]
        entry = _CENTRAL.unpack(os.pread(self._fd, _CENTRAL.size, position))
        flags, name_length, extra_length = entry[2], entry[7], entry[8]
        rest = os.pread(self._fd, name_length + extra_length, position + _CENTRAL.size)
        return _decoded(rest[:name_length], flags, rest[name_length:])[0]

    def stream(self, max_count: int, max_bytes: int) -> Iterator[Packed]:
        for start, stop in self._runs(max_count, max_bytes):
            yield Packed(start, stop - start, lambda start=start, stop=stop: self._read(start, stop))  # type: ignore[misc]

    def _list(self, listing: Listing) -> None:
        position, size, count, comment = self._find_directory(os.fstat(self._fd).st_size)
        if comment.startswith(LINKS) and comment[len(LINKS) :].isdigit():
            listing.notes.append(f"{int(comment[len(LINKS) :]):,} {LEFT_OUT_LINKS}")
        end = position + size
        with open(self._fd, "rb", buffering=1 << 20, closefd=False) as file:
            file.seek(position)
            self._list_directory(listing, file, position, end, count)

    def _list_directory(self, listing: Listing, file: BinaryIO, position: int, end: int, count: int) -> None:
        unpack, header_size, read, add = _CENTRAL.unpack, _CENTRAL.size, file.read, listing.add
        add_offset, add_packed_size = self._offsets.append, self._packed_sizes.append
        add_checksum, add_method = self._checksums.append, self._methods.append
        add_name_length, add_position = self._name_lengths.append, self._directory_positions.append
        num_guessed = 0
        while position < end:
            (
                signature,
                system,
                flags,
                method,
                checksum,
                packed,
                unpacked,
                name_length,
                extra_length,
                comment_length,
                attributes,
                offset,
            ) = unpack(read(header_size))
            if signature != b"PK\x01\x02":
                raise ValueError("its directory is broken")
            rest_length = name_length + extra_length + comment_length
            rest = read(rest_length)
            name, is_guess = _decoded(rest[:name_length], flags, rest[name_length : name_length + extra_length])
            if packed == 0xFFFFFFFF or unpacked == 0xFFFFFFFF or offset == 0xFFFFFFFF:
                extra = rest[name_length : name_length + extra_length]
                unpacked, packed, offset = _large(extra, unpacked, packed, offset)
            count -= 1
            if system == _UNIX and stat.S_IFMT(attributes >> 16) not in _PLAIN:
                raise UserError(f"the archive's member {name[:120]!r} is a link or device; pack plain files only")
            if flags & _ENCRYPTED:
                raise UserError(f"the archive's member {name[:120]!r} is encrypted; pack it without a password")
            if name[-1:] in ("/", "\\"):
                if name not in ("./", ".\\"):
                    listing.add_folder(name)
            elif add(name, unpacked, lambda: self._head(offset, method)):  # noqa: B023 - called at once
                if method not in (_STORED, _DEFLATED, _DEFLATE64):
                    raise UserError(
                        f"the archive's member {name[:120]!r} is packed by method {method}; "
                        "pack it with deflate (zip's default)"
                    )
                if method == _STORED and packed != unpacked:
                    raise ValueError(f"sizes of {name[:120]!r} contradict each other")
                num_guessed += is_guess
                add_offset(offset)
                add_packed_size(packed)
                add_checksum(checksum)
                add_method(method)
                add_name_length(name_length)
                add_position(position)
            position += header_size + rest_length
        if count % 65536 or position != end:
            raise ValueError("its directory is incomplete")
        if num_guessed:
            listing.notes.append(
                f"names of {num_guessed:,} images are not UTF-8, as in zips of an old Windows; pack them again with "
                "UTF-8 names if classes look wrong"
            )

    def _find_directory(self, file_size: int) -> tuple[int, int, int, bytes]:
        """Start, size and count of entries of the central directory, and the archive's comment."""
        tail_at = max(0, file_size - _END.size - 0xFFFF)
        tail = os.pread(self._fd, file_size - tail_at, tail_at)
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or at + _END.size > len(tail):
            raise ValueError("its end is missing")
        _, disk, first_disk, _, count, size, offset, _ = _END.unpack_from(tail, at)
        end = tail_at + at
        locator_at = at - _END_64_LOCATOR.size
        if locator_at >= 0 and tail[locator_at : locator_at + 4] == b"PK\x06\x07":
            end = _END_64_LOCATOR.unpack_from(tail, locator_at)[2]
            record = _END_64.unpack(os.pread(self._fd, _END_64.size, end))
            if record[0] != b"PK\x06\x06":
                raise ValueError("its zip64 end is missing")
            _, _, _, _, disk, first_disk, _, count, size, offset = record
        if disk or first_disk:
            raise UserError("the archive is one part of several; join them to one zip")
        if offset + size != end:
            raise ValueError("its directory lies outside of it")
        return offset, size, count, tail[at + _END.size :]

    def _check_overlaps(self) -> None:
        """Members that share bytes are how small files unpack to petabytes (Fifield 2019, A better zip bomb)."""
        starts, packed = np.array(self._offsets, np.int64), np.array(self._packed_sizes, np.int64)
        ends = starts + _LOCAL.size + np.array(self._name_lengths) + packed
        order = np.argsort(starts, kind="stable")
        # Each of them, for the sum of two that are too large is negative.
        if max(each.max(initial=0) for each in (starts, packed, ends)) > self.path.stat().st_size:
            raise UserError("the archive is damaged (members lie outside of it); copy or pack it again")
        if (starts[order][1:] < ends[order][:-1]).any():
            raise UserError("the archive is damaged (members overlap); pack it again")

    def _read(self, start: int, stop: int) -> Iterator[bytes | memoryview]:
        first, last = self._offsets[start], stop - 1
        span = self._offsets[last] + self._extent(last) - first
        in_order = all(a < b for a, b in pairwise(self._offsets[start:stop]))
        if in_order and span <= 2 * sum(self._packed_sizes[start:stop]) + (1 << 20):
            block = _pread(self._fd, span, first)
            return (self._unpack(i, block, self._offsets[i] - first) for i in range(start, stop))
        return (self._unpack(i, self._block(i), 0) for i in range(start, stop))

    def _head(self, offset: int, method: int) -> bytes:
        """The first bytes of a member."""
        block = os.pread(self._fd, 1 << 12, offset)
        header = _LOCAL.unpack_from(block, 0)
        data = block[_LOCAL.size + header[9] + header[10] :]
        if method == _DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, MAGIC_BYTES)
        elif method == _DEFLATE64:
            data = _inflated64(data, MAGIC_BYTES)
        return data[:MAGIC_BYTES]

    def copy_member(self, name: str, target: BinaryIO, max_bytes: int) -> None:
        try:
            with zipfile.ZipFile(self.path) as archive:
                member = next(info for info in archive.infolist() if _name_of(info) == name)
                with archive.open(member) as source:
                    copy_bounded(source, target, name, max_bytes)
        except (RuntimeError, NotImplementedError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"the archive's member {name[:120]!r} cannot be unpacked ({why(error)})") from error

    def _block(self, index: int) -> memoryview:
        return _pread(self._fd, self._extent(index), self._offsets[index])

    def _extent(self, index: int) -> int:
        """Bytes of an image's local header, name, extra field and data, at most (or nearly always)."""
        return _LOCAL.size + self._name_lengths[index] + _SLACK + self._packed_sizes[index]

    def _unpack(self, index: int, block: memoryview, at: int) -> bytes | memoryview:
        """One image file out of a block that holds its local header at `at` and what follows it."""
        try:
            header = _LOCAL.unpack_from(block, at)
            if header[0] != b"PK\x03\x04":
                raise ValueError("its header is broken")
            data_at = at + _LOCAL.size + header[9] + header[10]
            packed = self._packed_sizes[index]
            data: bytes | memoryview = block[data_at : data_at + packed]
            if len(data) < packed:  # an extra field longer than _SLACK
                data = os.pread(self._fd, packed, self._offsets[index] + data_at - at)
            size = int(self.sizes[index])
            if self._methods[index] == _DEFLATED:
                unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
                data = unpacker.decompress(data, size + 1)  # never more than the directory promised
            elif self._methods[index] == _DEFLATE64:
                data = _inflated64(data, size)
            if len(data) != size or zlib.crc32(data) != self._checksums[index]:
                raise ValueError("its checksum is wrong")
        except (struct.error, ValueError, zlib.error) as error:
            raise UserError(
                f"the archive is damaged at {self.name(index)!r} ({why(error)}); copy or pack it again"
            ) from error
        return data


def _inflated64(packed: bytes | memoryview, size: int) -> bytes:
    """Unpack what Windows packs above 2 GB: at most a little more than `size` bytes."""
    inflater, unpacked = inflate64.Inflater(), bytearray()
    for at in range(0, len(packed), _PIECE):
        try:
            unpacked += inflater.inflate(bytes(packed[at : at + _PIECE]))
        except Exception as error:  # it has no class of its own
            raise ValueError(f"deflate64: {error}") from error
        if len(unpacked) > size:
            break
    return bytes(unpacked)


def _pread(fd: int, size: int, offset: int) -> memoryview:
    """Bytes at `offset`, fewer at the end of the file; writable, as torch wants them."""
    block = bytearray(size)
    return memoryview(block)[: os.preadv(fd, [block], offset)]


def _decoded(name: bytes, flags: int, extra: bytes) -> tuple[str, bool]:
    """A member's name, and whether it is a guess.

    Many programs write UTF-8 without saying so; the specification's other choice is cp437.
    """
    if _UNICODE_PATH in extra and (unicode_path := _unicode_path(name, extra)):
        return unicode_path, False
    try:
        return name.decode("utf-8"), False
    except UnicodeDecodeError:
        if flags & _UTF8:
            raise
    # Beside slashes a backslash is half a letter of Shift JIS, Big5 or GBK and ends no folder's name.
    return name.decode("cp437").replace("\\", "＼" if b"/" in name else "\\"), True


def _unicode_path(name: bytes, extra: bytes) -> str | None:
    """The name in UTF-8 that the field 0x7075 has, unless somebody renamed the member since."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2sH", extra, at)
        if kind == _UNICODE_PATH and length > 5:
            version, checksum = struct.unpack_from("<BL", extra, at + 4)
            if version == 1 and checksum == zlib.crc32(name):
                return extra[at + 9 : at + 4 + length].decode("utf-8")
        at += 4 + length
    return None


def _name_of(member: zipfile.ZipInfo) -> str:
    """As `_decoded` has it; zipfile keeps what it decoded by the flag alone."""
    raw = member.orig_filename.encode("utf-8" if member.flag_bits & _UTF8 else "cp437")
    return _decoded(raw, member.flag_bits, member.extra)[0]


def _large(extra: bytes, unpacked: int, packed: int, offset: int) -> tuple[int, int, int]:
    """Sizes and offset beyond 32 bits, from the zip64 extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            count = (unpacked, packed, offset).count(0xFFFFFFFF)
            values = iter(struct.unpack_from(f"<{count}Q", extra[at + 4 : at + 4 + length]))
            large = [next(values) if value == 0xFFFFFFFF else value for value in (unpacked, packed, offset)]
            return large[0], large[1], large[2]
        at += 4 + length
    raise ValueError("its zip64 sizes are missing")
