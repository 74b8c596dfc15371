"""Files that a user's machine hands to workers elsewhere, by way of the MLflow server.

It is the one service that both reach and that asks for a login. An upload lies in parts under its own hash, outside all
runs; the first task joins them in the object store. A part that has arrived is not sent again.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from mlpipe.addresses import redact_uri
from mlpipe.errors import UserError

SCHEME = "mlflow-artifacts"
PART_BYTES = 32 << 20
"""Size of all parts but the last; a request of one takes seconds, where the server gives up after two minutes."""

# No host: the tracking server's login goes to the tracking server only.
_ADDRESS = re.compile(rf"{SCHEME}:///uploads/[0-9a-f]{{64}}/[A-Za-z0-9._-]+")


def upload(path: Path, sha256: str, on_progress: Callable[[int], None]) -> str:
    """Send a file to the tracking server; its address, with its checksum.

    Args:
        on_progress: called with the number of bytes that are there, as each part arrives.

    Raises:
        MlflowException, requests.RequestException: the server does not answer, or refuses it.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", path.name)[-100:]
    repository = get_artifact_repository(f"{SCHEME}:/uploads/{sha256}/{name}")
    there = {item.path: item.file_size for item in repository.list_artifacts()}
    num_bytes = path.stat().st_size
    num_parts = -(-num_bytes // PART_BYTES)
    with tempfile.TemporaryDirectory(prefix="mlpipe-") as folder, path.open("rb") as file:
        for number in range(num_parts):
            start = number * PART_BYTES
            size = min(PART_BYTES, num_bytes - start)
            part = Path(folder) / _part(number, num_parts)
            if there.get(part.name) != size:
                file.seek(start)
                part.write_bytes(file.read(size))
                repository.log_artifact(str(part))
                part.unlink()
            on_progress(start + size)
    return f"{SCHEME}:///uploads/{sha256}/{name}#sha256={sha256}"


def read_upload(address: str, *, field: str) -> Iterator[bytes]:
    """An upload's bytes, part by part.

    Raises:
        UserError: the address is none that `upload` returned, or not all of it is there.
    """
    if not _ADDRESS.fullmatch(address):
        raise UserError(
            f"{field}: {redact_uri(address)[:200]} is no upload of `mlpipe run`; "
            "give it the path of the archive instead"
        )
    repository = get_artifact_repository(address)
    parts = sorted(item.path for item in repository.list_artifacts())
    if not parts or parts != [_part(number, len(parts)) for number in range(len(parts))]:
        raise UserError(f"{field}: {address} is not, or not all, on the MLflow server; run `mlpipe run` again")
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="mlpipe-") as folder:
            yield Path(repository.download_artifacts(part, folder)).read_bytes()


def _part(number: int, num_parts: int) -> str:
    return f"{number:05}-of-{num_parts:05}"
