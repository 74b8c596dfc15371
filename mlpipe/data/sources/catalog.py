"""The registry of data sources: what each is, known without loading it.

Only the standard library is loaded: Airflow reads this module whenever it parses the DAG. To add a source, write one
file with the functions `fetch` and `open_images`, and one entry in `KNOWN`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A source of the registry."""

    name: str
    """As it is written in the form's field `dataset`."""
    description: str
    """What it is, for the form."""
    module: str
    """Module with two functions.

    `fetch(data, store, *, max_bytes) -> SourceRef` brings the bytes into the object store, once.
    `open_images(path, data, kind)` is a context manager over the `ImageSet` in the file that `fetch` stored.
    """
    data_uri: Literal["unused", "optional", "required"] = "unused"
    """Whether the source reads the form's field `data_uri`."""
    mirror_images_keep_label: bool = True
    """Whether the mirror image of an image belongs to the same class; else recipes flip nothing."""


KNOWN: tuple[DataSource, ...] = (
    DataSource(
        name="digits",
        description="scikit-learn's handwritten digits (offline)",
        module="mlpipe.data.sources.digits",
        mirror_images_keep_label=False,
    ),
    DataSource(
        name="cifar10",
        description="the official archive (downloaded, or a copy at the data URI), or its images at the data URI",
        module="mlpipe.data.sources.cifar10",
        data_uri="optional",
    ),
    DataSource(
        name="images",
        description="your own zip, tar or folder at the data URI",
        module="mlpipe.data.sources.images",
        data_uri="required",
    ),
)


def find(name: str) -> DataSource:
    """The entry of that name.

    Raises:
        KeyError: there is none; the form offers only known names.
    """
    return {source.name: source for source in KNOWN}[name]
