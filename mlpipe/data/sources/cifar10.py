"""CIFAR-10's official archive, and what is special to that data set.

Its batches are Python pickles, and a pickle can run any code. They are read by an unpickler that knows four harmless
names, after the archive's checksum has been compared. https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import io
import logging
import pickle
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpipe.addresses import redact_uri
from mlpipe.config import DataConfig
from mlpipe.data.archives.listing import DAMAGED, ArchiveLimits
from mlpipe.data.archives.tar_images import open_tar
from mlpipe.data.imageset import ArrayImages, ImageSet
from mlpipe.data.sources import images
from mlpipe.data.sources.fetch import SourceRef, fetch_at_uri
from mlpipe.data.storage.scratch import scratch_folder
from mlpipe.data.storage.store import ObjectStore, file_sha256
from mlpipe.data.storage.uris import fetch_uri
from mlpipe.errors import UserError

logger = logging.getLogger(__name__)

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""In the order of the official labels, which is the alphabet's."""

MAX_MEMBER_BYTES = 256 << 20
_META = "batches.meta"
_TRAINING = tuple(f"data_batch_{i}" for i in range(1, 6))
_TEST = "test_batch"
_SIDE = 32


@dataclass(frozen=True, kw_only=True)
class OfficialArchive:
    """Where the archive is and what it hashes to."""

    url: str
    sha256: str


OFFICIAL = OfficialArchive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
)


def fetch(data: DataConfig, store: ObjectStore, *, max_bytes: int, official: OfficialArchive = OFFICIAL) -> SourceRef:
    """Download the official archive, or fetch what is at `data.uri`: a copy of that, or its images in class folders.

    Args:
        official: where the archive is and what it hashes to.
    """
    if data.uri is None:
        return _download(store, official, max_bytes)
    return fetch_at_uri(data, store, lambda path, data: _identify(path, data, official), max_bytes=max_bytes)


@contextmanager
def open_images(path: Path, data: DataConfig, kind: str) -> Iterator[ImageSet]:
    """The images of the official archive (kind cifar10) or of an archive of image files (kind images).

    Raises:
        UserError: the archive cannot be used, or has other classes than CIFAR-10.
    """
    if kind == "cifar10":
        yield read_python_archive(path)
        return
    with images.open_images(path, data) as opened:
        if opened.classes != CLASSES:
            raise UserError(
                f"data_uri: {redact_uri(str(data.uri))}: the archive's classes are {', '.join(opened.classes[:12])} "
                "and not those of cifar10; choose the data set images"
            )
        yield opened


def _download(store: ObjectStore, official: OfficialArchive, max_bytes: int) -> SourceRef:
    source = SourceRef(key=f"sources/{official.sha256}", sha256=official.sha256, kind="cifar10")
    if store.exists(source.key):
        return source
    logger.info("downloading %s", official.url)
    with scratch_folder() as folder:
        path = folder / "source"
        try:
            found = fetch_uri(official.url, path, field="data_uri", max_bytes=max_bytes).sha256
        except UserError as error:
            raise UserError(
                f"{error}; or give the address of a copy, or of the images packed in class folders"
            ) from error
        if found != official.sha256:
            raise ConnectionError(f"{official.url} came with sha256 {found} instead of {official.sha256}")
        store.put_file(source.key, path, official.sha256)
    return source


def _identify(path: Path, data: DataConfig, official: OfficialArchive) -> str:
    if not is_python_archive(path):
        with open_images(path, data, "images"):
            return "images"
    if (found := file_sha256(path)) != official.sha256:
        raise UserError(
            f"data_uri: {redact_uri(str(data.uri))} has sha256 {found}, but CIFAR-10's archive has {official.sha256}; "
            "download it again"
        )
    return "cifar10"


def is_python_archive(path: Path) -> bool:
    """Whether a file has the official layout: a tar with pickled batches. Nothing of them is read."""
    try:
        with open_tar(path, ArchiveLimits()) as (tar, _):
            for member in tar:
                if Path(member.name).name == _META:
                    return True
                if Path(member.name).suffix.lower() in (".png", ".jpg", ".jpeg"):
                    return False  # spares a large tar of images
    except (OSError, *DAMAGED):
        return False  # the reader of image archives will say what is wrong
    return False


def read_python_archive(path: Path) -> ArrayImages:
    """Read the official layout: the training batches in their order, then the test batch; 0.2 GB of pixels.

    Raises:
        UserError: something is missing, damaged, or a pickle asks for more than arrays.
    """
    with _damage_named():
        contents = _unpickled(path, {_META, *_TRAINING, _TEST})
        classes = _classes(_entry(contents[_META], "label_names"))
        parts = [_batch(name, contents.pop(name), len(classes)) for name in (*_TRAINING, _TEST)]
    images_u8 = np.concatenate([images for images, _ in parts])
    is_test = np.zeros(len(images_u8), bool)
    is_test[len(images_u8) - len(parts[-1][1]) :] = True
    return ArrayImages(classes, images_u8, np.concatenate([labels for _, labels in parts]), is_test)


def _classes(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str | bytes) for name in names):
        raise pickle.UnpicklingError("no usable label names")
    return tuple(name.decode() if isinstance(name, bytes) else name for name in names)


def _batch(name: str, content: Any, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    flat, labels = np.asarray(_entry(content, "data")), np.asarray(_entry(content, "labels"), np.int64)
    if flat.dtype != np.uint8 or flat.ndim != 2 or flat.shape != (len(labels), 3 * _SIDE * _SIDE):
        raise pickle.UnpicklingError(f"{name} has an unexpected form")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise pickle.UnpicklingError(f"{name} has labels without a name")
    return flat.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1), labels  # the file has planes


def _entry(content: Any, key: str) -> Any:
    for spelled in (key, key.encode()):  # written by Python 2: its strings are bytes here
        if isinstance(content, dict) and spelled in content:
            return content[spelled]
    raise pickle.UnpicklingError(f"{key!r} is missing")


def _unpickled(path: Path, names: set[str]) -> dict[str, Any]:
    """The pickles of those file names, in one pass: going back in a gzip means unpacking it again."""
    contents = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = Path(member.name).name
            if name in names and member.isreg() and member.size <= MAX_MEMBER_BYTES:
                reader = tar.extractfile(member)
                contents[name] = _HarmlessUnpickler(
                    io.BytesIO(reader.read() if reader else b""), encoding="bytes"
                ).load()
    if missing := sorted(names - set(contents)):
        raise pickle.UnpicklingError(f"{', '.join(missing)} missing")
    return contents


class _HarmlessUnpickler(pickle.Unpickler):
    """Builds lists, dictionaries, strings, numbers and numpy arrays of numbers; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        raise pickle.UnpicklingError(f"the pickle wants {module}.{name}")


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """What Python 3 writes where a protocol-2 pickle holds bytes; no other codec is looked up."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the pickle wants the codec {encoding!r}")
    return text.encode("latin1")


@contextmanager
def _damage_named() -> Iterator[None]:
    """Turns what damaged archives raise into one line."""
    try:
        yield
    except (pickle.UnpicklingError, OSError, AttributeError, KeyError, TypeError, *DAMAGED) as error:
        raise UserError(
            f"data_uri: the CIFAR-10 archive is damaged ({' '.join(str(error).split())[:120]}); download it again"
        ) from error
