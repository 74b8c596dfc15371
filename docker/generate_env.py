"""`python docker/generate_env.py [FILE]`: write .env from .env.example, with a generated value for each secret.

Needs nothing but Python. The file is readable by its owner only; one that exists is left alone.
"""

from __future__ import annotations

import base64
import os
import secrets
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[1] / ".env.example"


def generated(name: str) -> str:
    """A secret: hexadecimal, which is fit for a URL, a configuration file and a shell; Fernet asks for base64."""
    if name.endswith("FERNET_KEY"):
        return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    return secrets.token_hex(32)


def filled(example: str) -> str:
    """The example with a secret behind each name that has no value."""
    lines = [f"{line}{generated(line[:-1])}" if line.endswith("=") else line for line in example.splitlines()]
    return "\n".join(lines) + "\n"


def main(path: Path) -> None:
    """Write the file, readable by the owner only from its first byte."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        sys.exit(f"{path} exists: it is kept, with the secrets that the volumes were made with")
    with os.fdopen(descriptor, "w") as file:
        file.write(filled(EXAMPLE.read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else EXAMPLE.with_name(".env")))
