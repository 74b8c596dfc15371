"""A data set's source: its bytes, brought into object storage under their own hash."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpipe.addresses import redact_uri
from mlpipe.config import DataConfig
from mlpipe.data.archives.folders import pack_folder, pack_s3_folder, s3_folder_version
from mlpipe.data.imageset import ImageSet
from mlpipe.data.sources import catalog
from mlpipe.data.storage.allowed import check_file
from mlpipe.data.storage.scratch import scratch_folder
from mlpipe.data.storage.store import ObjectStore, file_sha256
from mlpipe.data.storage.uris import (
    MAX_BYTES,
    check_local,
    expected_sha256,
    fetch_uri,
    is_s3_folder,
    local_path,
    version_of,
)

logger = logging.getLogger(__name__)

Identify = Callable[[Path, DataConfig], str]
"""Which kind of source a file is; raises UserError for one that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class SourceRef:
    """A source in the object store."""

    key: str
    sha256: str
    """Of its bytes, hexadecimal."""
    kind: str
    """The form of its bytes, as its source's `open_images` takes it."""


def fetch_source(data: DataConfig, store: ObjectStore, *, max_bytes: int = MAX_BYTES) -> SourceRef:
    """Bring the source into the store, once; listed and checked before, so that mistakes show here.

    Args:
        max_bytes: larger sources are refused.

    Raises:
        UserError: the source cannot be had or is not what it should be.
        ConnectionError: the other side failed in a way that may heal.
    """
    source: SourceRef = _module(data).fetch(data, store, max_bytes=max_bytes)
    return source


def open_source(path: Path, data: DataConfig, kind: str) -> AbstractContextManager[ImageSet]:
    """The images in a file that `fetch_source` stored.

    Raises:
        UserError: they cannot be used.
    """
    opened: AbstractContextManager[ImageSet] = _module(data).open_images(path, data, kind)
    return opened


def _module(data: DataConfig) -> Any:
    """The module of a data set's source, with `fetch` and `open_images`."""
    return importlib.import_module(catalog.find(data.dataset).module)


def fetch_at_uri(data: DataConfig, store: ObjectStore, identify: Identify, *, max_bytes: int) -> SourceRef:
    """Bring what is at `data.uri` into the store, once.

    A folder becomes one zip. A local file is hashed each time. A remote one is fetched again only if its server says
    that it has changed, or if it says nothing; an address with `#sha256=<hex>` is fetched once.
    """
    uri = str(data.uri)
    local = local_path(uri)
    if local is not None:
        check_file(local, field="data_uri")
    if local is not None and local.is_dir():
        with scratch_folder() as folder:
            path = folder / "source"
            pack_folder(local, path, field="data_uri", max_bytes=max_bytes)
            return _put(path, file_sha256(path), data, store, identify)
    if local is not None and uri == str(local):
        check_local(local, field="data_uri")
        return _put(local, file_sha256(local), data, store, identify)
    return _fetch_remote(data, store, identify, max_bytes)


def _fetch_remote(data: DataConfig, store: ObjectStore, identify: Identify, max_bytes: int) -> SourceRef:
    """Fetch, unless the object store has what is at the address."""
    uri = str(data.uri)
    shown = redact_uri(uri)
    demanded = expected_sha256(uri, field="data_uri")
    folder_of_s3 = is_s3_folder(uri)
    if folder_of_s3:
        version: str | None = s3_folder_version(uri, field="data_uri")
    else:
        version = None if local_path(uri) is not None else version_of(uri, field="data_uri")
    known = _Known(store, uri)
    sha256 = demanded or (known.recall(version) if version else None)
    with scratch_folder() as folder:
        path = folder / "source"
        if sha256 is not None and store.exists(f"sources/{sha256}"):
            logger.info("%s is in the object store already", shown)
            if (kind := known.kind(sha256, data.dataset)) is not None:
                return SourceRef(key=f"sources/{sha256}", sha256=sha256, kind=kind)
            store.get_file(f"sources/{sha256}", path, sha256)
        else:
            logger.info("fetching %s", shown)
            if folder_of_s3:
                pack_s3_folder(uri, path, field="data_uri", max_bytes=max_bytes)
                sha256 = file_sha256(path)
            else:
                sha256 = fetch_uri(uri, path, field="data_uri", max_bytes=max_bytes).sha256
        source = _put(path, sha256, data, store, identify)
    known.remember(version, sha256, data.dataset, source.kind)
    return source


class _Known:
    """What was found at an address, as a small object of the store: its version there, its hash, what it is."""

    def __init__(self, store: ObjectStore, uri: str) -> None:
        self._store = store
        self._key = f"sources/addresses/{hashlib.sha256(uri.encode()).hexdigest()}.json"
        try:
            self._record: dict[str, str | None] = json.loads(store.get_bytes(self._key))
        except FileNotFoundError:
            self._record = {}

    def recall(self, version: str) -> str | None:
        """The hash of what had this version."""
        return self._record.get("sha256") if self._record.get("version") == version else None

    def kind(self, sha256: str, dataset: str) -> str | None:
        """What those bytes turned out to be as a source of that data set."""
        same = self._record.get("sha256") == sha256 and self._record.get("dataset") == dataset
        return self._record.get("kind") if same else None

    def remember(self, version: str | None, sha256: str, dataset: str, kind: str) -> None:
        """Overwrite the record."""
        record = {"version": version, "sha256": sha256, "dataset": dataset, "kind": kind}
        self._store.put_bytes(self._key, json.dumps(record).encode())


def _put(path: Path, sha256: str, data: DataConfig, store: ObjectStore, identify: Identify) -> SourceRef:
    """Check a file and store it."""
    source = SourceRef(key=f"sources/{sha256}", sha256=sha256, kind=identify(path, data))
    if not store.exists(source.key):
        store.put_file(source.key, path, sha256)
    return source
