"""Images in a zip or tar, streamed out of it; nothing is ever extracted to disk."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from mlpipe.data.archives.listing import DAMAGED, ArchiveLimits, ImageArchive, why
from mlpipe.data.archives.tar_images import TarImages
from mlpipe.data.archives.zip_images import ZipImages
from mlpipe.data.storage.scratch import scratch_folder
from mlpipe.errors import UserError


def open_archive(path: Path, limits: ArchiveLimits | None = None) -> ImageArchive:
    """List an archive of images; its kind is told by its bytes, not its name.

    Raises:
        UserError: it is not a zip or tar, is damaged or encrypted, or holds what does not belong there.
    """
    archive = _open_one(path, limits or ArchiveLimits())
    if len(archive) or len(archive.inner_archives) != 1:
        return archive
    with archive:
        return _open_inner(archive, archive.inner_archives[0])


def _open_inner(outer: ImageArchive, name: str) -> ImageArchive:
    """The one archive inside another; it is unpacked into a temporary file until it is closed."""
    temporary = ExitStack()
    try:
        path = temporary.enter_context(scratch_folder()) / "archive"
        with path.open("wb") as target:
            outer.copy_member(name, target, outer.limits.unpacked_bytes(outer.path.stat().st_size))
        inner = _open_one(path, outer.limits)
    except UserError as error:
        temporary.close()
        raise UserError(f"{name[:120]!r} in it: {error}") from error
    except BaseException:
        temporary.close()
        raise
    inner.on_close(temporary.close)
    inner.tables_beside = outer.tables
    return inner


def _open_one(path: Path, limits: ArchiveLimits) -> ImageArchive:
    with path.open("rb") as file:
        head = file.read(512)
    try:
        if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            return ZipImages(path, limits)
        if head[:2] == b"\x1f\x8b" or head[:3] == b"BZh" or head[:6] == b"\xfd7zXZ\x00" or head[257:262] == b"ustar":
            return TarImages(path, limits)
    except UserError:
        raise
    except (OSError, *DAMAGED) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the archive's
            raise
        raise UserError(f"the archive is damaged ({why(error)}); copy or pack it again") from error
    raise UserError(f"{_what_it_is(head)}; give a zip, tar, tar.gz, tar.bz2 or tar.xz of image folders")


def _what_it_is(head: bytes) -> str:
    if head.lstrip()[:1] == b"<":
        return "the file is a web page and not an archive (is the address that of a download?)"
    for magic, name in ((b"7z\xbc\xaf", "a 7z archive"), (b"Rar!", "a rar archive"), (b"(\xb5/\xfd", "zstandard data")):
        if head.startswith(magic):
            return f"the file is {name}, which is not read here"
    return "the file is neither a zip nor a tar archive"
