"""The calls to Airflow's REST API that the command line needs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self
from urllib.parse import quote

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from mlpipe.errors import UserError

TIMEOUT = 30
"""Seconds to wait for an answer to a call."""


THIS_MACHINE = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?(/|$)", re.IGNORECASE)

AIRFLOWS_OWN_LOGGERS = ("task", "task.stderr")
"""Airflow's own loggers: their error lines are not the task's own messages."""


@dataclass(frozen=True, kw_only=True)
class TaskInstance:
    """One task of a DAG run."""

    task_id: str
    map_index: int
    label: str
    """`train [resnet18]` for a mapped task, else the task's id."""
    state: str | None
    try_number: int
    seconds: float | None
    """Duration of the last attempt."""
    started: datetime | None
    """When the process of the last attempt began."""


class PausedError(UserError):
    """A DAG is paused."""


class RefusedError(UserError):
    """Airflow refused a call."""


class NoAnswerError(UserError):
    """Airflow gave no answer to a call, which may have had its effect all the same."""


KILLED = (
    "the task was killed, most likely by the system for memory; lower batch_size or image_size, or give it more memory"
)


class AirflowApi:
    """A client of one Airflow server, logged in as one user."""

    VARIABLES = ("MLPIPE_AIRFLOW_URL", "MLPIPE_AIRFLOW_USER", "MLPIPE_AIRFLOW_PASSWORD")
    """Where it is, and its login."""

    def __init__(self, url: str, user: str, password: str, *, retries: int = 6) -> None:
        """
        Args:
            retries: of a question that was not answered, over half a minute where it is 6.
        """
        self.url = url.rstrip("/")
        self._login = user, password
        self._session = requests.Session()
        # The proxy that the environment may name does not reach this machine, and must not be told the password.
        self._session.trust_env = THIS_MACHINE.match(self.url) is None
        retry = Retry(
            total=retries,
            backoff_factor=0.5,
            status_forcelist=(500, 502, 503, 504),
            allowed_methods=("GET",),
            raise_on_status=False,
        )
        self._session.mount(self.url, HTTPAdapter(max_retries=retry))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ, *, retries: int = 6) -> Self:
        """The server named by MLPIPE_AIRFLOW_URL, _USER and _PASSWORD.

        Raises:
            UserError: one of them is not set.
        """
        values = [environ.get(name) for name in cls.VARIABLES]
        for name, value in zip(cls.VARIABLES, values, strict=True):
            if not value:
                raise UserError(f"{name}: not set, and no local stack is up; run `mlpipe up`, or set it")
        return cls(*(value or "" for value in values), retries=retries)

    def check_dag(self, dag_id: str) -> None:
        """
        Raises:
            UserError: the DAG does not run when it is triggered: it was not parsed, it cannot be imported, it is
                paused, or the server is away.
        """
        try:
            dag = self._call("GET", f"/api/v2/dags/{quote(dag_id)}")
        except RefusedError as error:
            for failed in self._call("GET", "/api/v2/importErrors")["import_errors"]:
                last = failed["stack_trace"].strip().splitlines()[-1]
                raise UserError(f"{failed['filename']} cannot be imported: {last}") from error
            raise
        if dag["is_paused"]:
            raise PausedError(
                f"the DAG {dag_id} is paused, so its runs wait until somebody unpauses it: in Airflow, or by "
                f"`mlpipe {'tune' if dag_id == 'tune' else 'run'} --unpause`"
            )

    def unpause(self, dag_id: str) -> None:
        """Let the DAG's runs begin."""
        self._call("PATCH", f"/api/v2/dags/{quote(dag_id)}", {"is_paused": False})

    def trigger(self, dag_id: str, conf: dict[str, Any], run_id: str | None = None) -> str:
        """Start a DAG run; returns its id.

        Args:
            run_id: the id that it shall have; `None`: Airflow names it.

        Raises:
            NoAnswerError: no answer came, and no DAG run of that id began.
            UserError: the server refuses the parameters or does not have the DAG.
        """
        body = {"logical_date": None, "conf": conf} | ({"dag_run_id": run_id} if run_id else {})
        try:
            answer = self._call("POST", f"/api/v2/dags/{quote(dag_id)}/dagRuns", body)
        except NoAnswerError:
            if run_id is None or run_id not in [run["dag_run_id"] for run in self.dag_runs(dag_id, 100)]:
                raise
            return run_id
        return str(answer["dag_run_id"])

    def dag_runs(self, dag_id: str, number: int) -> list[dict[str, Any]]:
        """The newest DAG runs, as Airflow describes them."""
        path = f"/api/v2/dags/{quote(dag_id)}/dagRuns?order_by=-run_after&limit={number}"
        return list(self._call("GET", path)["dag_runs"])

    def stop(self, dag_id: str, run_id: str) -> None:
        """Set a DAG run to failed, which stops its tasks.

        Raises:
            UserError: it has ended.
        """
        if (state := self.dag_run_state(dag_id, run_id)) in ("success", "failed"):
            raise UserError(f"RUN_ID: the DAG run {run_id} has ended ({state}), so there is nothing to stop")
        self._call("PATCH", _run_path(dag_id, run_id), {"state": "failed"})

    def dag_run_state(self, dag_id: str, run_id: str) -> str:
        """`queued`, `running`, `success` or `failed`."""
        return str(self.dag_run(dag_id, run_id)["state"])

    def dag_run(self, dag_id: str, run_id: str) -> dict[str, Any]:
        """Airflow's description of the DAG run: `state`, `queued_at`, `start_date`, `end_date` and more."""
        return dict(self._call("GET", _run_path(dag_id, run_id)))

    def task_instances(self, dag_id: str, run_id: str) -> list[TaskInstance]:
        """All tasks of the DAG run, in the order of their starts."""
        rows = self._call("GET", f"{_run_path(dag_id, run_id)}/taskInstances?limit=100")["task_instances"]
        rows.sort(key=lambda row: (row["start_date"] or "9", row["task_id"], row["map_index"]))
        return [
            TaskInstance(
                task_id=row["task_id"],
                map_index=row["map_index"],
                label=f"{row['task_id']} [{row.get('rendered_map_index') or row['map_index']}]"
                if row["map_index"] >= 0
                else row["task_id"],
                state=row["state"],
                try_number=row["try_number"],
                seconds=row["duration"],
                started=datetime.fromisoformat(row["start_date"]) if row["start_date"] else None,
            )
            for row in rows
        ]

    def progress(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """What each model has reached, from the plugin `report_page`; nothing where that is not installed."""
        try:
            return list(self._call("GET", f"{_report_path(dag_id, run_id)}/progress"))
        except UserError:
            return []

    def report(self, dag_id: str, run_id: str) -> str:
        """The report of a DAG run as HTML.

        Raises:
            UserError: it has none.
        """
        return self._request("GET", f"{_report_path(dag_id, run_id)}/report.html").text

    def xcom(self, dag_id: str, run_id: str, task_id: str, key: str = "return_value") -> Any:
        """What an unmapped task returned, or pushed under a key; `None`: nothing."""
        path = f"{_run_path(dag_id, run_id)}/taskInstances/{quote(task_id)}/xcomEntries/{quote(key)}?deserialize=false"
        try:
            return self._call("GET", path)["value"]
        except UserError:
            return None

    def last_error(self, dag_id: str, run_id: str, task: TaskInstance) -> str | None:
        """The last error line of a task's log."""
        try:
            events = self.log(dag_id, run_id, task)
        except UserError:
            return None
        errors = [event for event in events if event.get("level") in ("error", "critical")]
        told = [str(event["event"]) for event in errors if str(event.get("logger")) not in AIRFLOWS_OWN_LOGGERS]
        if told:
            return told[-1]
        if any("SIGKILL" in str(event) for event in errors):
            return KILLED
        for event in errors:
            if detail := event.get("error_detail"):
                return f"{detail[-1].get('exc_type')}: {detail[-1].get('exc_value')}"
        return None

    def log(self, dag_id: str, run_id: str, task: TaskInstance) -> list[dict[str, Any]]:
        """Log lines of a task's last attempt, each with `timestamp`, `level`, `event` and more."""
        path = (
            f"{_run_path(dag_id, run_id)}/taskInstances/{quote(task.task_id)}/logs/{task.try_number}"
            f"?map_index={task.map_index}&full_content=true"
        )
        return [event for event in self._call("GET", path)["content"] if isinstance(event, dict)]

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return self._request(method, path, body).json()

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, fresh: bool = False
    ) -> requests.Response:
        try:
            if fresh or "Authorization" not in self._session.headers:
                self._log_in()
            answer = self._session.request(method, self.url + path, json=body, timeout=TIMEOUT)
        except requests.RequestException as error:
            raise NoAnswerError(
                f"Airflow at {self.url} does not answer ({type(error).__name__}); is it up? See `mlpipe status`"
            ) from error
        if answer.status_code == requests.codes.unauthorized and not fresh:
            return self._request(method, path, body, fresh=True)
        if answer.status_code >= requests.codes.server_error:
            raise NoAnswerError(f"Airflow at {self.url} fails: {answer.status_code} {_detail(answer)}")
        if not answer.ok:
            raise RefusedError(
                f"Airflow refused {method} {path.partition('?')[0]}: {answer.status_code} {_detail(answer)}"
            )
        return answer

    def _log_in(self) -> None:
        answer = log_in(self._session, self.url, *self._login)
        if answer.status_code in (requests.codes.unauthorized, requests.codes.forbidden):
            raise UserError(f"MLPIPE_AIRFLOW_PASSWORD: Airflow at {self.url} refuses the login of this user")
        if not answer.ok:
            raise RefusedError(f"Airflow at {self.url} answers {answer.status_code} {answer.reason} to a login")


def log_in(session: requests.Session, url: str, user: str, password: str) -> requests.Response:
    """Give a session a token of Airflow's simple login; the answer to the request for it."""
    login = {"username": user, "password": password}
    answer = session.post(f"{url}/auth/token", json=login, timeout=TIMEOUT)
    if answer.ok:
        session.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
    return answer


def _run_path(dag_id: str, run_id: str) -> str:
    return f"/api/v2/dags/{quote(dag_id)}/dagRuns/{quote(run_id, safe='')}"


def _report_path(dag_id: str, run_id: str) -> str:
    return f"/mlpipe-report/{quote(dag_id)}/{quote(run_id, safe='')}"


def _detail(answer: requests.Response) -> str:
    try:
        return str(answer.json().get("detail", ""))[:500]
    except ValueError:
        return answer.reason
