"""Small files of the state folder, readable by their owner only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def private_folder(path: Path) -> Path:
    """Make the folder, and its parents, readable by the owner only (0700)."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


def write_private(path: Path, text: str) -> None:
    """Replace a file at once, readable by the owner only (0600) from its first byte."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file; empty where there is no such file.

    Raises:
        json.JSONDecodeError: the file is not JSON.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return {}
