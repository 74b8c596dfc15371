"""What the address of a file of weights has to look like, known without the file."""

from __future__ import annotations

from pathlib import PurePosixPath
from urllib.parse import urlsplit

from mlpipe.addresses import redact_uri
from mlpipe.data.storage.uris import expected_sha256, local_path
from mlpipe.errors import UserError


def suffix_of_weights(address: str) -> str:
    """The file's suffix, `.safetensors`, `.pth` or `.pt`.

    Raises:
        UserError: it has another one, or a remote address demands no checksum.
    """
    shown = redact_uri(address)
    checksum = expected_sha256(address, field="models")
    if address.lower().startswith(("http://", "https://")) and checksum is None:
        raise UserError(f"models: {shown} has no checksum; append #sha256=<64 hex digits> to the address")
    suffix = PurePosixPath(local_path(address) or urlsplit(address).path).suffix.lower()
    if suffix not in (".safetensors", ".pth", ".pt"):
        raise UserError(
            f"models: {shown!r} is neither random nor imagenet nor the address of a .safetensors, .pth or .pt file"
        )
    return suffix
