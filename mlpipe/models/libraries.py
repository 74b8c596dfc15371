"""The installed packages that a model's answers depend on."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution, version

from mlpipe.models.architectures import find

LIBRARIES = ("torch", "torchvision", "timm", "scikit-learn", "numpy")


def installed_libraries(*more: str) -> list[str]:
    """Names and versions of the libraries that a model's answers depend on, and of `more` packages."""
    return [_installed(name) for name in (*LIBRARIES, *more)]


def package_of(architecture: str) -> str:
    """Name of the package that declares an architecture as its own; empty: it is none of a package."""
    return (find(architecture).distribution or "").partition("==")[0]


def is_editable(package: str) -> bool:
    """Whether it is installed from a folder of sources, which may change under the same version."""
    try:
        origin = distribution(package).read_text("direct_url.json")
    except PackageNotFoundError:
        return False
    return bool(origin and json.loads(origin).get("dir_info", {}).get("editable"))


def _installed(name: str) -> str:
    try:
        return f"{name}=={version(name)}"
    except (PackageNotFoundError, ValueError):
        return name
