"""Where this process finds the other services. Read when a stage runs, never at import.

The object store's address and keys are boto3's own variables (AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION), the tracking server's is MLflow's (MLFLOW_TRACKING_URI).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mlpipe.addresses import without_login


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Settings of the place a stage runs in, as opposed to those of the run."""

    s3_bucket: str
    """Bucket of data sets, sources, weights and checkpoints (MLPIPE_S3_BUCKET)."""
    cache_dir: Path
    """Folder of this machine for copies of what is in the bucket (MLPIPE_CACHE_DIR)."""
    mlflow_ui_url: str | None
    """MLflow as a browser reaches it (MLPIPE_MLFLOW_UI_URL, else MLFLOW_TRACKING_URI), without user and password, which
    are the client's, and without a final slash."""
    airflow_ui_url: str | None
    """Airflow as a browser reaches it (MLPIPE_AIRFLOW_UI_URL), without a final slash."""

    @classmethod
    def from_env(cls) -> Self:
        """Read the process's environment variables; an empty one counts as not set."""
        mlflow_ui_url = os.environ.get("MLPIPE_MLFLOW_UI_URL") or os.environ.get("MLFLOW_TRACKING_URI")
        airflow_ui_url = os.environ.get("MLPIPE_AIRFLOW_UI_URL")
        return cls(
            s3_bucket=os.environ.get("MLPIPE_S3_BUCKET") or "mlpipe",
            cache_dir=Path(os.environ.get("MLPIPE_CACHE_DIR") or Path.home() / ".cache" / "mlpipe").expanduser(),
            mlflow_ui_url=without_login(mlflow_ui_url).rstrip("/") if mlflow_ui_url else None,
            airflow_ui_url=airflow_ui_url.rstrip("/") if airflow_ui_url else None,
        )
