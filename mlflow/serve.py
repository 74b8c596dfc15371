"""`python serve.py`: MLflow's server with logins, on port 5000. Settings: see docker-compose.yml.

`mlflow server` does the same, but for one thing: it offers clients the object store's own address for what they
download (and for uploads over 500 MB), even where only this server can reach it. A client elsewhere would try for ten
minutes and fail. Here every artifact goes through the server.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

AUTH_FILE = Path(__file__).with_name("auth.ini")


def main() -> None:
    """Bring both databases up to date, then serve until told to stop."""
    # Before MLflow is imported: it reads both then. The file holds a password: for the owner only.
    os.environ["MLFLOW_AUTH_CONFIG_PATH"] = str(AUTH_FILE)
    AUTH_FILE.touch(mode=0o600)
    AUTH_FILE.write_text(auth_settings(os.environ["MLFLOW_AUTH_DATABASE_URI"]))
    from mlflow.server import auth, constants

    database = os.environ["MLFLOW_BACKEND_STORE_URI"]
    os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = database
    os.environ[constants.REGISTRY_STORE_URI_ENV_VAR] = database
    os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"
    os.environ[constants.ARTIFACTS_DESTINATION_ENV_VAR] = os.environ["MLFLOW_ARTIFACTS_DESTINATION"]
    os.environ[constants.SERVE_ARTIFACTS_ENV_VAR] = "true"
    os.environ["_MLFLOW_SGI_NAME"] = "uvicorn"
    migrate(database)
    auth.bootstrap_admin_user()
    import uvicorn

    uvicorn.run(
        "serve:create_app",
        factory=True,
        host="0.0.0.0",  # noqa: S104 - of the container
        port=5000,
        workers=int(os.environ["MLFLOW_WORKERS"]),
        timeout_graceful_shutdown=5,
    )


def auth_settings(database: str) -> str:
    """What MLflow reads about logins from a file only.

    Checking a password is slow on purpose, some tenths of a second: too slow for each of a task's hundred requests.
    """
    lines = ["[mlflow]", "default_permission = READ", f"database_uri = {database}", "auth_cache_ttl_seconds = 300"]
    return "\n".join(lines) + "\n"


def migrate(database: str) -> None:
    """Make the tables, or those of a newer version."""
    from mlflow import db
    from mlflow.store.db import utils

    engine = utils.create_sqlalchemy_engine_with_retry(database)
    outdated = utils._get_schema_version(engine) != utils._get_latest_schema_revision()
    engine.dispose()
    if outdated:
        db.upgrade.main([database], standalone_mode=False)


def create_app() -> FastAPI:
    """The application of one worker process."""
    from mlflow.server import auth, handlers

    class NoStore:
        """No artifact repository is one of these: none is offered for direct access."""

    handlers.MultipartDownloadMixin = NoStore
    handlers.MultipartUploadMixin = NoStore
    return auth.create_app()


if __name__ == "__main__":
    main()
