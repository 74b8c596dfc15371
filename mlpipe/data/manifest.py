"""What is known of a published data set. It is written last: where it is, the data set is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from mlpipe.config import DataConfig
from mlpipe.data.storage.npy import StoredFile
from mlpipe.data.storage.store import ObjectStore

FORMAT_VERSION = 7
"""Raised whenever the same source and settings would give other arrays or another manifest."""

TRAIN_FILES = (
    "train_images.npy",
    "train_labels.npy",
    "train_hashes.npy",
    "train_groups.npy",
    "train_indices.npy",
    "val_indices.npy",
)
TEST_FILES = ("test_images.npy", "test_labels.npy", "test_hashes.npy", "test_indices.npy", "test_names.npy")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A data set: `train_*` arrays hold training and validation images, which the index arrays tell apart.

    Rows that no index names are of images that could not be used.
    """

    dataset: str
    digest: str
    """32 hexadecimal digits; covers the source's bytes, the settings and the format."""
    image_size: int
    """Height and width, pixels."""
    classes: tuple[str, ...]
    """Names in the order of the labels."""
    num_train: int
    """Images trained on, without validation."""
    num_val: int
    num_test: int
    class_counts: Mapping[str, tuple[int, ...]]
    """Images of each class, in the order of the labels, for `train`, `val` and `test`."""
    channel_mean: tuple[float, float, float]
    """Red, green, blue over all pixels of the images trained on, 0 to 1."""
    channel_std: tuple[float, float, float]
    """Likewise, 0 to 1."""
    files: Mapping[str, StoredFile]
    """By name."""
    source_sha256: str
    notes: tuple[str, ...]
    """What the checks found, a sentence each."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Images that could not be used: name and reason."""
    near_duplicates: tuple[tuple[str, str], ...] = ()
    """Names of a test image and of a training or validation image that show the same, in splits that were given."""
    num_known_test: int = 0
    """Test images of which a training or validation image shows the same; `near_duplicates` may list fewer."""
    format_version: int = FORMAT_VERSION

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of accuracies has to know of the data, a sentence each."""
        found = []
        if self.left_out:
            total = self.num_train + self.num_val + self.num_test + len(self.left_out)
            found.append(f"{len(self.left_out):,} of {total:,} images could not be used and were left out.")
        if self.num_known_test:
            found.append(
                f"{self.num_known_test:,} of {self.num_test:,} test images are also among the training or validation "
                "images, so accuracies are too high."
            )
        return tuple(found)

    def key(self, name: str) -> str:
        """Where an array lies in the object store."""
        return array_key(self.digest, name)

    def to_json(self) -> bytes:
        """For the object store."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """The inverse of `to_json`."""
        values: dict[str, Any] = json.loads(content)
        for name in ("classes", "notes", "channel_mean", "channel_std"):
            values[name] = tuple(values[name])
        for name in ("left_out", "near_duplicates"):
            values[name] = tuple(map(tuple, values[name]))
        values["class_counts"] = {part: tuple(counts) for part, counts in values["class_counts"].items()}
        values["files"] = {name: StoredFile(**file) for name, file in values["files"].items()}
        return cls(**values)


def array_key(digest: str, name: str) -> str:
    """Where a data set's array lies."""
    return f"datasets/{digest}/{name}"


def manifest_key(digest: str) -> str:
    """Where a data set's manifest lies."""
    return f"datasets/{digest}/manifest.json"


def dataset_digest(data: DataConfig, kind: str, source_sha256: str) -> str:
    """Content address of what comes out of a source with these settings; where the source came from plays no part."""
    content = {
        "source": source_sha256,
        "kind": kind,
        "format": FORMAT_VERSION,
        **{name: value for name, value in asdict(data).items() if name != "uri"},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def load_manifest(digest: str, store: ObjectStore) -> Manifest:
    """
    Raises:
        FileNotFoundError: no such data set is published.
    """
    return Manifest.from_json(store.get_bytes(manifest_key(digest)))
