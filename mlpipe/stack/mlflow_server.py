"""`python -m mlpipe.stack.mlflow_server DATABASE DESTINATION HOST PORT`: MLflow's server in one process.

`mlflow server` migrates and imports in one process and serves from another: it takes twice as long to start, and
when it is killed its child keeps the port, so that a supervisor could not restart it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
from pathlib import Path


def main(database: Path, destination: str, host: str, port: int) -> None:
    """Bring the SQLite schema up to date and serve until told to stop.

    Args:
        database: SQLite file, made when missing.
        destination: where artifacts go that clients send through this server, such as s3://mlflow.
        host: address to listen on.
        port: TCP port.
    """
    # In this mode a reader never waits for a writer. It is kept in the file.
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    from mlflow.server import constants  # loads MLflow: only here, in the process that serves

    uri = f"sqlite:///{database}?timeout=60"
    os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = uri
    os.environ[constants.REGISTRY_STORE_URI_ENV_VAR] = uri
    os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"
    os.environ[constants.ARTIFACTS_DESTINATION_ENV_VAR] = destination
    os.environ[constants.SERVE_ARTIFACTS_ENV_VAR] = "true"
    _migrate(uri)
    import uvicorn

    uvicorn.run("mlflow.server.fastapi_app:app", host=host, port=port, log_level="warning", timeout_graceful_shutdown=5)


def _migrate(uri: str) -> None:
    from mlflow import db
    from mlflow.server.handlers import initialize_backend_stores
    from mlflow.store.db import utils

    engine = utils.create_sqlalchemy_engine_with_retry(uri)
    outdated = utils._get_schema_version(engine) != utils._get_latest_schema_revision()
    engine.dispose()
    if outdated:
        db.upgrade.main([uri], standalone_mode=False)
    initialize_backend_stores(uri, uri, "mlflow-artifacts:/")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
