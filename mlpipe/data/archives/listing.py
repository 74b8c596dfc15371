"""What zip and tar archives of images have in common: how members are checked and listed."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import lzma
import struct
import tarfile
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from mlpipe.data.archives.names import begins_as_image, is_hidden, role_of, safe_parts
from mlpipe.errors import UserError

DAMAGED = (
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    gzip.BadGzipFile,
    EOFError,
    struct.error,
    UnicodeError,
    ValueError,
    OverflowError,
    IndexError,
)
"""What damaged archives make the standard library raise."""


ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
MAX_TABLES = 20
"""CSV files that are looked at for labels."""


@dataclass(frozen=True, kw_only=True)
class ArchiveLimits:
    """What an archive of images may be at most; beyond it is a decompression bomb or a mistake."""

    max_images: int = 20_000_000
    max_members: int = 25_000_000
    max_folders: int = 100_000
    max_image_bytes: int = 256 << 20
    """Of one image file, unpacked."""
    max_table_bytes: int = 256 << 20
    """Of a CSV file, unpacked."""
    max_total_bytes: int = 2 << 40
    """Of all of the archive, unpacked."""
    max_ratio: float = 200.0
    """Unpacked over packed bytes, held against archives that unpack to more than `ratio_from_bytes`."""
    ratio_from_bytes: int = 1 << 30

    def unpacked_bytes(self, packed_bytes: int) -> int:
        """What an archive of that size may unpack to."""
        return min(self.max_total_bytes, max(self.ratio_from_bytes, int(self.max_ratio * packed_bytes)))


@dataclass(frozen=True, slots=True)
class Packed:
    """A run of images as they lie in the archive. `read` may be called in any thread, once."""

    start: int
    """Position of the first image in the archive's order of images."""
    count: int
    read: Callable[[], Iterable[bytes | memoryview]]
    """The image files' bytes, best used one by one: many such objects at once set off Python's garbage collector.

    Raises `UserError` where the archive itself is damaged there.
    """


@dataclass
class Listing:
    """What the members' names say, gathered member by member."""

    limits: ArchiveLimits
    folders: dict[tuple[str, ...], int] = field(default_factory=dict)
    folder_ids: array[int] = field(default_factory=lambda: array("i"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    num_others: int = 0
    others: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _name_hashes: array[int] = field(default_factory=lambda: array("q"))
    _known: dict[str, tuple[str, ...] | None] = field(default_factory=dict)
    _num_members: int = 0
    _total: int = 0

    def add(self, name: str, size: int, head: Callable[[], bytes]) -> bool:
        """Take note of a file; whether it is an image.

        Args:
            head: gives the file's first bytes; asked where the name does not say what it is.
        """
        self._count_member()
        folder, _, file_name = name.rpartition("/")
        if is_hidden(file_name) and "\\" not in name:
            return False
        if folder in self._known and "\\" not in name:
            parts = self._known[folder]
            if not file_name.isprintable() or file_name in ("", ".", "..") or len(name) > 250:
                safe_parts(name)
        else:
            *above, file_name = safe_parts(name)
            if len(self._known) >= self.limits.max_folders:
                raise UserError(
                    f"the archive has more than {self.limits.max_folders:,} folders; images belong in one per class"
                )
            parts = None if any(map(is_hidden, [*above, file_name])) else tuple(above)
            if "\\" not in name:
                self._known[folder] = parts
        if parts is None:
            return False
        role = role_of(file_name)
        if role == "unnamed":
            role = "image" if begins_as_image(head()) else "other"
        if role == "other":
            self.num_others += 1
            lower = file_name.lower()
            if lower.endswith(".csv") and len(self.tables) < MAX_TABLES:
                self.tables.append(name)
            if lower.endswith(ARCHIVE_SUFFIXES) and len(self.archives) < 2:
                self.archives.append(name)
            if len(self.others) < 5:
                self.others.append(name)
            return False
        if size > self.limits.max_image_bytes:
            raise UserError(
                f"the archive's image {name!r} has {size / 1e6:,.0f} MB; "
                f"at most {self.limits.max_image_bytes / 1e6:,.0f} MB are read"
            )
        if len(self.folder_ids) >= self.limits.max_images:
            raise UserError(f"the archive has more than {self.limits.max_images:,} images; split it")
        self._total += size
        self.folder_ids.append(self.folders.setdefault(parts, len(self.folders)))
        self.sizes.append(size)
        self._name_hashes.append(hash(name))
        return True

    def add_folder(self, name: str) -> None:
        """Check the name of a folder's own entry."""
        self._count_member()
        safe_parts(name)

    def _count_member(self) -> None:
        self._num_members += 1
        if self._num_members > self.limits.max_members:
            raise UserError(f"the archive has more than {self.limits.max_members:,} members; split it")

    def check(self, packed_bytes: int) -> None:
        """Checks of the whole."""
        if self._total > self.limits.unpacked_bytes(packed_bytes):
            raise UserError(
                f"the archive of {packed_bytes / 1e6:,.0f} MB unpacks to {self._total / 1e6:,.0f} MB: "
                "more than images do; is it a decompression bomb?"
            )
        hashes = np.frombuffer(self._name_hashes, np.int64)
        if len(np.unique(hashes)) != len(hashes):
            raise UserError("the archive has several members of the same name; pack the folder again")


class ImageArchive(ABC):
    """An archive's images in the order in which they lie there. A context manager."""

    def __init__(self, path: Path, limits: ArchiveLimits) -> None:
        self.path = path
        self.limits = limits
        self._closing = contextlib.ExitStack()
        listing = Listing(limits)
        self._list(listing)
        listing.check(path.stat().st_size)
        self.folders = list(listing.folders)
        """Folders, outermost first, of the images."""
        self.folder_ids: NDArray[np.int32] = np.array(listing.folder_ids, np.int32)
        """(N,) which of `folders` each image lies in."""
        self.sizes: NDArray[np.int64] = np.array(listing.sizes, np.int64)
        """(N,) bytes of each image file."""
        self.num_others = listing.num_others
        """Files that are neither images nor hidden."""
        self.others = listing.others
        """The first few of them."""
        self.notes = listing.notes
        """What a user should know of the archive itself, a sentence each."""
        self.tables = listing.tables
        """CSV files among those, 20 at most."""
        self.tables_beside: list[str] = []
        """Those beside this archive, where it lies inside another."""
        self.inner_archives = listing.archives
        """Archives among those, two at most."""

    def read_table(self, name: str) -> tuple[str, list[str]]:
        """Text of a CSV file, and what to note of it.

        Raises:
            UserError: it is too large, or damaged.
        """
        packed = io.BytesIO()
        self.copy_member(name, packed, self.limits.max_table_bytes)
        content = packed.getvalue()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # Excel's "Unicode text"
            return content.decode("utf-16", errors="replace"), []
        try:
            return content.decode("utf-8-sig"), []
        except UnicodeDecodeError:
            note = f"{name} is not UTF-8; it was read as Windows-1252"
            return content.decode("cp1252", errors="replace"), [note]

    def __len__(self) -> int:
        return len(self.folder_ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def on_close(self, act: Callable[[], object]) -> None:
        """Call this, too, when the archive is closed."""
        self._closing.callback(act)

    def close(self) -> None:
        """Close the file."""
        self._closing.close()

    @abstractmethod
    def _list(self, listing: Listing) -> None:
        """Go through the members once."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Full name of the image at `index`."""

    @abstractmethod
    def stream(self, max_count: int, max_bytes: int) -> Iterator[Packed]:
        """All images in order, in runs of at most `max_count` images and about `max_bytes`."""

    @abstractmethod
    def copy_member(self, name: str, target: BinaryIO, max_bytes: int) -> None:
        """Unpack a file of the archive that is no image.

        Raises:
            UserError: it has more than `max_bytes`.
        """

    def _runs(self, max_count: int, max_bytes: int) -> Iterator[tuple[int, int]]:
        """Bounds of runs of at most `max_count` images and `max_bytes`, but at least one image."""
        start = 0
        ends = np.concatenate([[0], np.cumsum(self.sizes)])
        while start < len(self):
            fitting = int(np.searchsorted(ends, ends[start] + max_bytes, side="right")) - 1
            stop = min(start + max_count, max(fitting, start + 1), len(self))
            yield start, stop
            start = stop


def copy_bounded(source: IO[bytes], target: BinaryIO, name: str, max_bytes: int) -> None:
    """
    Raises:
        UserError: there are more bytes than that.
    """
    left = max_bytes
    while piece := source.read(1 << 20):
        left -= len(piece)
        if left < 0:
            raise UserError(f"the archive's member {name[:120]!r} unpacks to more than {max_bytes / 1e6:,.0f} MB")
        target.write(piece)


def why(error: Exception) -> str:
    """An exception in a few words."""
    return " ".join(str(error).split())[:120] or type(error).__name__
