"""Networks that are built by files of their users, who may edit these at any time."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from mlpipe.config import ModelConfig
from mlpipe.data.storage.store import file_sha256
from mlpipe.data.storage.uris import check_local
from mlpipe.models import architectures


def code_of(architecture: str) -> str:
    """What tells the code of an architecture from others: its name, or a user's file by content and the name in it."""
    own_file = architectures.find(architecture).own_file
    if own_file is None:
        return architecture
    return f"{file_sha256(own_file)}:{architecture.rpartition(':')[2]}"


def with_own_copy(model: ModelConfig, cache_dir: Path) -> ModelConfig:
    """The model, built by a copy of the user's file where it has one: its user may edit that during the training."""
    own_file = architectures.find(model.architecture).own_file
    if own_file is None:
        return model
    check_local(own_file, field="models")
    content = own_file.read_bytes()
    # The same path for the same content, so that a retry resumes where the file is as it was, and only there.
    copy = cache_dir / "networks" / hashlib.sha256(content).hexdigest() / own_file.name
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f"{copy.name}.{os.getpid()}.partial")
        partial.write_bytes(content)
        partial.replace(copy)
    return replace(model, architecture=f"{copy}:{model.architecture.rpartition(':')[2]}")
