"""`python mlflow_server.py HOST PORT`: MLflow's server, of the local stack and of the image mlflow/Dockerfile.

`mlflow server` migrates and imports in one process and serves from another: it takes twice as long to start, and when
it is killed its child keeps the port, so that a supervisor could not restart it. This file is copied into the image
alone: with a database of users it imports nothing of mlpipe.

    MLFLOW_BACKEND_STORE_URI       database of runs and of the registry
    MLFLOW_ARTIFACTS_DESTINATION   where artifacts go that clients send through this server, such as s3://mlflow
    MLFLOW_AUTH_DATABASE_URI       database of users; without it there is one user, the local stack's
    MLFLOW_WORKERS                 processes, 1 where it is not set

The local stack's users log in as they do to Airflow (mlpipe/stack/mlflow_login.py).
"""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

AUTH_DATABASE = "MLFLOW_AUTH_DATABASE_URI"
AUTH_FILE = "auth.ini"


def main(host: str, port: int) -> None:
    """Bring the databases up to date, then serve until told to stop."""
    database = os.environ["MLFLOW_BACKEND_STORE_URI"]
    if database.startswith("sqlite:///"):
        # In this mode a reader never waits for a writer. It is kept in the file.
        path = database.removeprefix("sqlite:///").partition("?")[0]
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    if users := os.environ.get(AUTH_DATABASE):
        _write_auth_settings(users)
    from mlflow.server import constants

    os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = database
    os.environ[constants.REGISTRY_STORE_URI_ENV_VAR] = database
    os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"
    os.environ[constants.ARTIFACTS_DESTINATION_ENV_VAR] = os.environ["MLFLOW_ARTIFACTS_DESTINATION"]
    os.environ[constants.SERVE_ARTIFACTS_ENV_VAR] = "true"
    os.environ["_MLFLOW_SGI_NAME"] = "uvicorn"
    migrate(database)
    if users:
        from mlflow.server import auth

        auth.bootstrap_admin_user()
    import uvicorn

    num_workers = int(os.environ.get("MLFLOW_WORKERS", "1"))
    application = create_app() if num_workers == 1 else f"{Path(__file__).stem}:create_app"
    uvicorn.run(
        application,
        factory=num_workers > 1,
        host=host,
        port=port,
        workers=num_workers,
        log_level="info" if users else "warning",
        timeout_graceful_shutdown=5,
    )


def _write_auth_settings(database: str) -> None:
    """What MLflow reads about logins from a file only, when it is imported.

    Checking a password is slow on purpose, some tenths of a second: too slow for each of a task's hundred requests.
    """
    path = Path(AUTH_FILE).resolve()
    path.touch(mode=0o600)  # it holds the password of the database
    lines = ["[mlflow]", "default_permission = READ", f"database_uri = {database}", "auth_cache_ttl_seconds = 300"]
    path.write_text("\n".join(lines) + "\n")
    os.environ["MLFLOW_AUTH_CONFIG_PATH"] = str(path)


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
    """The application of one process."""
    from mlflow.server import handlers
    from mlflow.store.artifact import s3_artifact_repo

    # MLflow makes a client of S3 every five minutes and keeps the last 64, which are 200 MB after some hours.
    make_client = s3_artifact_repo._cached_get_s3_client.__wrapped__
    s3_artifact_repo._cached_get_s3_client = functools.lru_cache(maxsize=1)(make_client)
    if AUTH_DATABASE not in os.environ:
        from mlflow.server import fastapi_app

        database = os.environ["MLFLOW_BACKEND_STORE_URI"]
        handlers.initialize_backend_stores(database, database, "mlflow-artifacts:/")
        from mlpipe.stack.mlflow_login import Login

        fastapi_app.app.add_middleware(
            Login,
            user=os.environ["MLFLOW_TRACKING_USERNAME"],
            password=os.environ["MLFLOW_TRACKING_PASSWORD"],
            airflow_url=os.environ["MLPIPE_AIRFLOW_UI_URL"],
        )
        return _without_assistant(fastapi_app.app)
    from mlflow.server import auth

    class NoStore:
        """No artifact repository is one of these: none is offered for direct access.

        MLflow offers clients the object store's own address for what they download (and for uploads over 500 MB), even
        where only this server can reach it: a client elsewhere would try for ten minutes and fail.
        """

    handlers.MultipartDownloadMixin = NoStore  # type: ignore[assignment, misc]
    handlers.MultipartUploadMixin = NoStore  # type: ignore[misc, assignment]
    return _without_assistant(auth.create_app())


def _without_assistant(app: FastAPI) -> FastAPI:
    """MLflow's assistant runs shell commands on the server's machine for whoever reaches it there."""
    app.router.routes = [route for route in app.router.routes if "/assistant" not in str(getattr(route, "path", ""))]
    return app


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
