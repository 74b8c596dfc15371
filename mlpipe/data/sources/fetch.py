"""A data set's source: its bytes, brought into object storage under their own hash."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mlpipe.addresses import redact_uri
from mlpipe.config import DataConfig
from mlpipe.data.archives.archive import open_archive
from mlpipe.data.archives.folders import pack_folder, pack_s3_folder, s3_folder_version
from mlpipe.data.archives.layout import Layout, resolve_layout
from mlpipe.data.sources import cifar10
from mlpipe.data.sources.cifar10 import OFFICIAL, OfficialArchive
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
from mlpipe.errors import UserError

logger = logging.getLogger(__name__)

SourceKind = Literal["digits", "cifar10", "images"]


@dataclass(frozen=True, kw_only=True)
class SourceRef:
    """A source in the object store."""

    key: str
    sha256: str
    """Of its bytes, hexadecimal."""
    kind: str
    """A `SourceKind`: scikit-learn's csv.gz, CIFAR-10's tar of pickles, or an archive of images."""


def fetch_source(
    data: DataConfig, store: ObjectStore, *, official: OfficialArchive = OFFICIAL, max_bytes: int = MAX_BYTES
) -> SourceRef:
    """Bring the source into the store, once; listed and checked before, so that mistakes show here.

    A folder becomes one zip. A local file is hashed each time. A remote one is fetched again only if its server says
    that it has changed, or if it says nothing; an address with `#sha256=<hex>` is fetched once.

    Args:
        official: where CIFAR-10's own archive is and what it hashes to.
        max_bytes: larger sources are refused.

    Raises:
        UserError: the source cannot be had or is not what it should be.
        ConnectionError: the other side failed in a way that may heal.
    """
    if data.dataset == "digits":
        return _put_digits(store)
    if data.uri is None:
        return _fetch_official(store, official, max_bytes)
    local = local_path(data.uri)
    if local is not None and local.is_dir():
        with tempfile.TemporaryDirectory(prefix="mlpipe-") as folder:
            path = Path(folder) / "source"
            pack_folder(local, path, field="data_uri", max_bytes=max_bytes)
            return _put_archive(path, file_sha256(path), data, store, official)
    if local is not None and data.uri == str(local):
        check_local(local, field="data_uri")
        return _put_archive(local, file_sha256(local), data, store, official)
    return _fetch_remote(data, store, official, max_bytes)


def _put_digits(store: ObjectStore) -> SourceRef:
    content = digits_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    source = SourceRef(key=f"sources/{sha256}", sha256=sha256, kind="digits")
    store.put_bytes(source.key, content, if_absent=True)
    return source


def digits_bytes() -> bytes:
    """The file of handwritten digits that scikit-learn ships."""
    return resources.files("sklearn.datasets.data").joinpath("digits.csv.gz").read_bytes()


def read_digits(content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 8, 8) with 0..255 for the file's 0..16, and labels (N,).

    https://archive.ics.uci.edu/dataset/80
    """
    table = np.loadtxt(io.BytesIO(gzip.decompress(content)), delimiter=",")
    images_u8 = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return images_u8, table[:, -1].astype(np.int64)


def _fetch_official(store: ObjectStore, official: OfficialArchive, max_bytes: int) -> SourceRef:
    source = SourceRef(key=f"sources/{official.sha256}", sha256=official.sha256, kind="cifar10")
    if store.exists(source.key):
        return source
    logger.info("downloading %s", official.url)
    with tempfile.TemporaryDirectory(prefix="mlpipe-") as folder:
        path = Path(folder) / "source"
        try:
            fetch_uri(official.url, path, field="data_uri", max_bytes=max_bytes)
        except UserError as error:
            raise UserError(
                f"{error}; or give the address of a copy, or of the images packed in class folders"
            ) from error
        found = cifar10.file_md5(path)
        if found != official.md5:
            raise ConnectionError(f"{official.url} came with MD5 {found} instead of {official.md5}")
        store.put_file(source.key, path, official.sha256)
    return source


def _fetch_remote(data: DataConfig, store: ObjectStore, official: OfficialArchive, max_bytes: int) -> SourceRef:
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
    with tempfile.TemporaryDirectory(prefix="mlpipe-") as folder:
        path = Path(folder) / "source"
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
        source = _put_archive(path, sha256, data, store, official)
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


def _put_archive(path: Path, sha256: str, data: DataConfig, store: ObjectStore, official: OfficialArchive) -> SourceRef:
    """Check an archive and store it."""
    kind: SourceKind = "images"
    if data.dataset == "cifar10" and cifar10.is_python_archive(path):
        if (found := cifar10.file_md5(path)) != official.md5:
            raise UserError(
                f"data_uri: {redact_uri(str(data.uri))} has MD5 {found}, but CIFAR-10's archive has {official.md5}; "
                "download it again"
            )
        kind = "cifar10"
    else:
        with named_source(redact_uri(str(data.uri))), open_archive(path) as archive:
            check_classes(resolve_layout(archive), data)
    source = SourceRef(key=f"sources/{sha256}", sha256=sha256, kind=kind)
    if not store.exists(source.key):
        store.put_file(source.key, path, sha256)
    return source


def check_classes(layout: Layout, data: DataConfig) -> None:
    """
    Raises:
        UserError: what is called cifar10 has other classes than CIFAR-10.
    """
    if data.dataset == "cifar10" and layout.classes != cifar10.CLASSES:
        raise UserError(
            f"the archive's classes are {', '.join(layout.classes[:12])} and not those of cifar10; "
            "choose the data set images"
        )


@contextmanager
def named_source(shown: str) -> Iterator[None]:
    """Begin the messages of mistakes in an archive with the parameter and the archive's address."""
    try:
        yield
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith("data_uri: ") else f"data_uri: {shown}: {message}") from error
