"""Files that a user's machine hands to workers elsewhere, by way of the MLflow server.

It is the one service that both reach and that asks for a login. An upload lies under its own hash, outside all runs;
the first task copies it into the object store, and the same file is not sent twice.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow.artifacts import download_artifacts
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from mlpipe.addresses import redact_uri
from mlpipe.errors import UserError

SCHEME = "mlflow-artifacts"
# No host: the tracking server's login goes to the tracking server only.
_ADDRESS = re.compile(rf"{SCHEME}:///uploads/[0-9a-f]{{64}}/[A-Za-z0-9._-]+")


def upload(path: Path, sha256: str) -> str:
    """Send a file to the tracking server, unless it is there; its address, with its checksum.

    Raises:
        MlflowException, requests.RequestException: the server does not answer, or refuses it.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", path.name)[-100:]
    repository = get_artifact_repository(f"{SCHEME}:/uploads/{sha256}")
    if not any(item.path == name and item.file_size == path.stat().st_size for item in repository.list_artifacts()):
        with tempfile.TemporaryDirectory(prefix="mlpipe-") as folder:
            link = Path(folder) / name
            link.symlink_to(path)
            repository.log_artifact(str(link))
    return f"{SCHEME}:///uploads/{sha256}/{name}#sha256={sha256}"


@contextmanager
def downloaded(address: str, *, field: str) -> Iterator[Path]:
    """The uploaded file as a temporary local one.

    Raises:
        UserError: the address is none that `upload` returned, or nothing is there.
    """
    if not _ADDRESS.fullmatch(address):
        raise UserError(
            f"{field}: {redact_uri(address)[:200]} is no upload of `mlpipe run`; "
            "give it the path of the archive instead"
        )
    folder, _, name = address.rpartition("/")
    if name not in {item.path for item in get_artifact_repository(folder).list_artifacts()}:
        raise UserError(f"{field}: {address} is not on the MLflow server any more; run `mlpipe run` again")
    with tempfile.TemporaryDirectory(prefix="mlpipe-") as local:
        yield Path(download_artifacts(artifact_uri=address, dst_path=local))
