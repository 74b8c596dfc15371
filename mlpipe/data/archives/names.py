"""Names of archive members: which are safe, and what role they have."""

from __future__ import annotations

import unicodedata
from typing import Literal

from mlpipe.errors import UserError

SUFFIXES = frozenset(
    {
        *(".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".mpo", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
        *(".heic", ".heif", ".avif"),
    }
)
"""Files that are images, by the end of their names in lower case."""

Role = Literal["image", "other", "unnamed"]
"""unnamed: it has no suffix; its first bytes say what it is."""

_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"GIF8", b"II*\0", b"MM\0*")
MAGIC_BYTES = 12

_LITTER = frozenset(
    {"__MACOSX", "Icon\r", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information", "@eaDir"}
)
MAX_NAME_BYTES = 1024


def safe_parts(name: str) -> tuple[str, ...]:
    """Split a member's name into folders and file, in Unicode's composed form (NFC, as macOS does not write).

    Nothing is ever extracted; but an archive with such names was made to do harm or is damaged.

    Raises:
        UserError: the name is absolute, climbs out by `..`, or holds control characters.
    """
    plain = name.replace("\\", "/")
    shown = repr(name[:120])
    parts = tuple(unicodedata.normalize("NFC", part) for part in plain.split("/") if part not in ("", "."))
    if plain.startswith("/") or ".." in parts or (parts and len(parts[0]) == 2 and parts[0][1] == ":"):
        raise UserError(f"the archive's member {shown} points outside of the archive; pack the folder again")
    if not parts or len(name.encode(errors="surrogatepass")) > MAX_NAME_BYTES:
        raise UserError(f"the archive's member {shown} has no usable name (1 to {MAX_NAME_BYTES} bytes); rename it")
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in plain):
        raise UserError(f"the archive's member {shown} has control characters in its name, or is not UTF-8; rename it")
    return parts


def is_hidden(part: str) -> bool:
    """Whether a folder or file is one that systems leave behind: a leading dot, `__MACOSX`, thumbnails, waste."""
    return part.startswith(".") or part in _LITTER


def role_of(file_name: str) -> Role:
    """What a file is to us, by its name alone."""
    dot = file_name.rfind(".")
    if dot < 0:
        return "unnamed"
    return "image" if file_name[dot:].lower() in SUFFIXES else "other"


def begins_as_image(head: bytes) -> bool:
    """Whether a file of these first `MAGIC_BYTES` is an image."""
    return head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[4:8] == b"ftyp"
