"""Whether each component does its work, asked as its clients would ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import requests

from mlpipe.airflow_api import log_in
from mlpipe.stack.components import STORAGE, TRACKING
from mlpipe.stack.credentials import Credentials
from mlpipe.stack.local import ARTIFACT_BUCKET, DATA_BUCKET, StackSettings

DAG_ID = "image_classification"
TIMEOUT = 5
"""Seconds for one question."""

HEARTBEATS = {"scheduler": "scheduler", "dag-processor": "dag_processor", "triggerer": "triggerer"}


class Health:
    """Asks the components of one stack.

    Args:
        settings: the stack.
        credentials: its login and keys.
        since: time (`time.time()`) of its start: an older sign of life is that of a predecessor.
    """

    def __init__(self, settings: StackSettings, credentials: Credentials, since: float = 0.0) -> None:
        self._settings = settings
        self._credentials = credentials
        self._since = since
        self._http = requests.Session()
        self._http.trust_env = False  # this machine is not behind the proxy that the environment may name

    def problem(self, component: str) -> str | None:
        """Why a component cannot be used yet; `None` when it can."""
        checks: dict[str, Callable[[], str | None]] = {STORAGE: self._storage, TRACKING: self._tracking}
        try:
            return checks.get(component, lambda: self._airflow(component))()
        except requests.RequestException as error:
            return f"does not answer ({type(error).__name__})"

    def dag_problem(self) -> str | None:
        """Why the DAG cannot be triggered yet; `None` when it can, or when there is none in the folder."""
        if not (self._settings.dags / f"{DAG_ID}.py").is_file():
            return None
        try:
            if self._get(f"/api/v2/dags/{DAG_ID}").ok:
                return None
            errors = self._get("/api/v2/importErrors").json().get("import_errors", [])
        except requests.RequestException as error:
            return f"Airflow does not answer ({type(error).__name__})"
        if errors:
            last = errors[-1]["stack_trace"].strip().splitlines()[-1]
            return f"{errors[-1]['filename']} cannot be imported: {last}"
        return "not parsed yet"

    def _storage(self) -> str | None:
        if self._http.get(self._settings.s3_url, timeout=TIMEOUT).status_code >= 500:
            return "starting"
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            buckets = s3_client(self._settings.service_addresses(self._credentials)).list_buckets()["Buckets"]
        except (BotoCoreError, ClientError) as error:
            return f"refuses to list its buckets ({error})"
        present = {bucket["Name"] for bucket in buckets}
        missing = {DATA_BUCKET, ARTIFACT_BUCKET} - present
        return f"has no bucket {', '.join(sorted(missing))} yet" if missing else None

    def _tracking(self) -> str | None:
        answer = self._http.get(f"{self._settings.mlflow_url}/health", timeout=TIMEOUT)
        return None if answer.ok else f"answers {answer.status_code}"

    def _airflow(self, component: str) -> str | None:
        answer = self._http.get(f"{self._settings.airflow_url}/api/v2/monitor/health", timeout=TIMEOUT)
        if not answer.ok:
            return f"answers {answer.status_code}"
        report = answer.json()
        if component not in HEARTBEATS:
            return None if report["metadatabase"]["status"] == "healthy" else "cannot use its database"
        name = HEARTBEATS[component]
        if report[name]["status"] != "healthy":
            return "no heartbeat yet"
        beat = datetime.fromisoformat(report[name][f"latest_{name}_heartbeat"])
        return None if beat.timestamp() >= self._since else "no heartbeat since its start"

    def _get(self, path: str) -> requests.Response:
        if "Authorization" not in self._http.headers:
            user, password = self._credentials.airflow_user, self._credentials.airflow_password
            log_in(self._http, self._settings.airflow_url, user, password).raise_for_status()
        return self._http.get(self._settings.airflow_url + path, timeout=TIMEOUT)


def s3_client(environ: Mapping[str, str], read_timeout: float = 30) -> Any:
    """A client of the object store that these variables name."""
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "s3",
        endpoint_url=environ["AWS_ENDPOINT_URL_S3"],
        region_name=environ.get("AWS_DEFAULT_REGION"),
        aws_access_key_id=environ.get("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=environ.get("AWS_SECRET_ACCESS_KEY"),
        config=Config(proxies={}, connect_timeout=TIMEOUT, read_timeout=read_timeout, retries={"max_attempts": 1}),
    )
