"""Image files in an archive or a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlpipe.addresses import redact_uri
from mlpipe.config import DataConfig
from mlpipe.data.archives.archive import open_archive
from mlpipe.data.archives.layout import resolve_layout
from mlpipe.data.imageset import ArchivedImages, ImageSet
from mlpipe.data.sources.fetch import SourceRef, fetch_at_uri
from mlpipe.data.storage.store import ObjectStore
from mlpipe.errors import UserError


def fetch(data: DataConfig, store: ObjectStore, *, max_bytes: int) -> SourceRef:
    """Fetch what is at `data.uri`; its classes are checked before it is stored."""
    return fetch_at_uri(data, store, identify, max_bytes=max_bytes)


def identify(path: Path, data: DataConfig) -> str:
    """The kind of source that a file is; one that cannot be used is refused."""
    with open_images(path, data):
        return "images"


@contextmanager
def open_images(path: Path, data: DataConfig, kind: str = "images") -> Iterator[ImageSet]:  # noqa: ARG001 - as all
    """The images of an archive.

    Raises:
        UserError: it cannot be used; the message begins with the parameter and the archive's address.
    """
    try:
        with open_archive(path) as archive:
            yield ArchivedImages(archive, resolve_layout(archive))
    except UserError as error:
        message, shown = str(error), redact_uri(str(data.uri))
        raise UserError(message if message.startswith("data_uri: ") else f"data_uri: {shown}: {message}") from error
