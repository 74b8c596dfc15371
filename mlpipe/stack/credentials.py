"""Secrets of one local stack: generated once, kept in one file that only its owner can read."""

from __future__ import annotations

import base64
import json
import secrets
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Self

from mlpipe.errors import UserError
from mlpipe.stack.files import read_json, write_private


def _token() -> str:
    return secrets.token_urlsafe(48)


def _fernet_key() -> str:
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What the components of one stack, and its user, identify themselves with."""

    airflow_user: str = "admin"
    """Login of the Airflow UI and API."""
    airflow_password: str = field(default_factory=lambda: secrets.token_urlsafe(12), repr=False)
    """Its password."""
    airflow_fernet_key: str = field(default_factory=_fernet_key, repr=False)
    """Encrypts connections in Airflow's database (32 bytes, base64)."""
    airflow_jwt_secret: str = field(default_factory=lambda: secrets.token_urlsafe(64), repr=False)
    """Signs the tokens of the API and of tasks (at least 64 bytes for HS512)."""
    airflow_api_secret_key: str = field(default_factory=_token, repr=False)
    """Signs the sessions of the Airflow UI."""
    mlflow_secret_passphrase: str = field(default_factory=_token, repr=False)
    """Encrypts what MLflow's gateway would store; without it MLflow uses a passphrase that is public."""
    s3_access_key: str = field(default_factory=lambda: secrets.token_hex(10), repr=False)
    """S3 key of everything in this stack."""
    s3_secret_key: str = field(default_factory=lambda: secrets.token_hex(20), repr=False)
    """Its secret half."""
    storage_write_key: str = field(default_factory=_token, repr=False)
    """Signs writes between the parts of SeaweedFS, whose inner ports would answer anyone otherwise."""
    storage_read_key: str = field(default_factory=_token, repr=False)
    """The same for reads."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what an earlier start generated.

        Raises:
            UserError: there is no such file, or it is damaged.
        """
        if not path.exists():
            raise UserError(f"no local stack was started yet ({path} does not exist); run `mlpipe up`")
        try:
            values = read_json(path)
        except ValueError:
            values = {}
        names = [entry.name for entry in fields(cls)]
        if sorted(values) != sorted(names) or not all(values.values()):
            raise UserError(
                f"{path}: damaged, or of another version; run `mlpipe down`, move the file away and run `mlpipe up`, "
                "which generates new secrets (data is kept)"
            )
        return cls(**values)

    @classmethod
    def load_or_create(cls, path: Path) -> Self:
        """Read what an earlier start generated, or generate it.

        Raises:
            UserError: the file is damaged.
        """
        if not path.exists():
            write_private(path, json.dumps(asdict(cls()), indent=2) + "\n")
        return cls.load(path)
