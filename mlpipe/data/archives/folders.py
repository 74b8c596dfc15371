"""Folders of images as sources: packed into one zip whose bytes depend on names, contents and the number of links."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO

from mlpipe.addresses import redact_uri
from mlpipe.data.archives.names import is_hidden
from mlpipe.data.archives.zip_images import LINKS
from mlpipe.data.storage.store import s3_client
from mlpipe.data.storage.uris import list_s3_folder, open_s3
from mlpipe.errors import UserError

_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say
_PIECE = 1 << 20

READ_AHEAD, SMALL_FILE = 32, 8 << 20
"""Files of an S3 folder that are read before they are asked for, and the bytes of the largest such: 256 MiB at most."""
READERS = 8

Member = tuple[str, int, Callable[[], IO[bytes]]]
"""Name within the folder, size in bytes, and what opens it."""


def pack_folder(folder: Path, target: Path, *, field: str, max_bytes: int) -> None:
    """Pack the files below a folder of this machine; links and hidden files are left out.

    Raises:
        UserError: it has no files, more than `max_bytes`, or one that may not be read; begins with `field`.
    """
    links: list[str] = []
    _pack(_files_below(folder, field, links), target, f"{field}: {folder}", max_bytes, links)


def pack_s3_folder(uri: str, target: Path, *, field: str, max_bytes: int) -> None:
    """Pack the objects below `s3://bucket/prefix/`.

    Raises:
        UserError: there are none, more than `max_bytes`, or they may not be read.
        ConnectionError: the object store failed in a way that may heal.
    """
    prefix_length = len(uri)
    opened = partial(open_s3, field=field, client=s3_client())
    with ThreadPoolExecutor(READERS) as pool:
        members = (
            (address[prefix_length:], size, partial(opened, address))
            for address, size, _ in list_s3_folder(uri, field=field)
            if not any(map(is_hidden, address[prefix_length:].split("/")))
        )
        _pack(_read_ahead(members, pool), target, f"{field}: {redact_uri(uri)}", max_bytes)


def _read_ahead(members: Iterable[Member], pool: ThreadPoolExecutor) -> Iterator[Member]:
    """The same in order; small files are read before they are asked for, since each is a request to wait for."""

    def content(opened: Callable[[], IO[bytes]]) -> IO[bytes]:
        with opened() as source:
            return io.BytesIO(source.read())

    waiting: deque[Member] = deque()
    for name, size, opened in members:
        is_small = size <= SMALL_FILE
        waiting.append((name, size, pool.submit(content, opened).result if is_small else opened))
        if len(waiting) == READ_AHEAD:
            yield waiting.popleft()
    yield from waiting


def s3_folder_version(uri: str, *, field: str) -> str:
    """What changes when an object below the prefix does.

    Raises:
        UserError: there are none, or they may not be listed.
    """
    listed = "\n".join(f"{address} {size} {etag}" for address, size, etag in list_s3_folder(uri, field=field))
    return hashlib.sha256(listed.encode()).hexdigest()


def _files_below(folder: Path, field: str, links: list[str]) -> Iterator[Member]:
    """The files in order; names of what is passed over are appended to `links`."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{field}: {error.filename} cannot be read ({error.strerror}); change its permissions")

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        links += [name for name in folders if (Path(place) / name).is_symlink()]
        for name in sorted(name for name in files if not is_hidden(name)):
            path = Path(place) / name
            if path.is_symlink() or not path.is_file():
                links.append(name)
                continue
            inside = path.relative_to(folder).as_posix()
            try:
                inside.encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{field}: the name of {os.fsencode(path)!r} is not UTF-8; rename it (`convmv` renames many)"
                ) from None
            yield inside, path.stat().st_size, partial(_open, path)


def _pack(members: Iterable[Member], target: Path, shown: str, max_bytes: int, links: Sequence[str] = ()) -> None:
    """
    Args:
        links: what has no content here, known when all members are.
    """
    total = 0
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, size, opened in members:
            total += size
            if total > max_bytes:
                raise UserError(f"{shown} has more than {max_bytes / 1e9:.3g} GB; at most that are fetched")
            with _opened(opened, shown, name) as source, archive.open(_entry(name, size), "w") as packed:
                while piece := source.read(_PIECE):
                    packed.write(piece)
        if links:
            archive.comment = LINKS + str(len(links)).encode()
    if not total and links:
        raise UserError(
            f"{shown} has links and special files alone, {len(links):,}; copy it with `cp -rL` and give that"
        )
    if not total:
        raise UserError(f"{shown} has no files with something in them; check the address")


def _entry(name: str, size: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _TIME)
    entry.create_system = 0  # no permissions
    entry.file_size = size
    return entry


def _open(path: Path) -> IO[bytes]:
    return path.open("rb")


def _opened(opened: Callable[[], IO[bytes]], shown: str, name: str) -> IO[bytes]:
    try:
        return opened()
    except PermissionError as error:
        raise UserError(f"{shown}: {name!r} may not be read by this process; change its permissions") from error
