"""MLflow runs: one parent per DAG run, one child for the data and for each model.

A run is found again by its tag `run_key`, a hash of who asked for it. A retry thus reopens the run of the
try before it, on whatever machine it comes to.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import mlflow
import requests
from mlflow.entities import LifecycleStage, Run, RunStatus, RunTag
from mlflow.environment_variables import (
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR,
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT,
)
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_COMMIT,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NAME,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)

from mlpipe.addresses import without_login
from mlpipe.environment import Environment
from mlpipe.errors import SupersededError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.data.dataset import Dataset

logger = logging.getLogger(__name__)

TRAINING_VIEW = "workflowType=machine_learning"
"""In an address of the MLflow UI: its view for model training. A new browser begins with the one for GenAI."""

SYSTEM_METRICS_INTERVAL = 5
"""Seconds between two samples of CPU, memory and GPU."""


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """Who asks for a stage: Airflow's ids of the task that runs it."""

    dag_id: str
    dag_run_id: str
    task_id: str
    try_number: int = 1
    map_index: int = -1
    """Which copy of a mapped task; -1: the task is not mapped."""
    user: str | None = None
    """Who triggered the DAG run; `None`: nobody, or it is not known."""

    @property
    def url(self) -> str | None:
        """Address of the DAG run in the Airflow UI, where that is known."""
        base = Environment.from_env().airflow_ui_url
        return f"{base.rstrip('/')}/dags/{self.dag_id}/runs/{self.dag_run_id}" if base else None

    @property
    def link(self) -> str:
        """Markdown for a run's description."""
        return f"[Airflow run `{self.dag_run_id}`]({self.url})" if self.url else f"Airflow run `{self.dag_run_id}`"

    @property
    def error_tag(self) -> str:
        """Tag of the parent run that says why this task failed. Each task has its own: others run beside it."""
        return f"error/{self.task_id}" + (f"/{self.map_index}" if self.map_index >= 0 else "")

    def key(self, part: str) -> str:
        """Identity of one part (`parent`, `data`, a model's name) of the DAG run."""
        return key_of(self.dag_id, self.dag_run_id, part)

    def tags(self) -> dict[str, str]:
        """Tags by which a run is traced back to its task and code."""
        tags = {
            "dag_id": self.dag_id,
            "dag_run_id": self.dag_run_id,
            "dag_run_key": self.key("all"),
            "task_id": self.task_id,
            "try_number": str(self.try_number),
            "git_sha": git_sha(),
            MLFLOW_SOURCE_NAME: f"Airflow DAG {self.dag_id}",
            MLFLOW_SOURCE_TYPE: "JOB",
            MLFLOW_GIT_COMMIT: git_sha().removesuffix("-dirty"),
            **({MLFLOW_USER: self.user} if self.user else {}),
        }
        return tags | ({"airflow_url": self.url} if self.url else {})


def key_of(*parts: str) -> str:
    """Identity of what the parts name together, by which a retry finds its run."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def git_sha() -> str:
    """Commit of this code, with `-dirty` where it was changed since; `unknown` outside a checkout.

    An image without a checkout sets MLPIPE_GIT_SHA when it is built.
    """
    if known := os.environ.get("MLPIPE_GIT_SHA"):
        return known
    git = ["git", "-C", str(Path(__file__).parent)]
    of_this_code = [*git, "ls-files", "--error-unmatch", Path(__file__).name]  # else of a checkout around a .venv
    describe = [*git, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        subprocess.run(of_this_code, capture_output=True, timeout=10, check=True)
        return subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def run_url(run: Run) -> str:
    """Address of a run in the MLflow UI."""
    return f"{ui_url()}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?{TRAINING_VIEW}"


def compare_url(parent_run_id: str, experiment: str) -> str:
    """Address of MLflow's charts of the models below a parent run, by accuracy on the test images.

    Its page for comparing runs begins with a system metric.
    """
    asked = {
        "compareRunsMode": "CHART",
        "searchFilter": f"tags.mlflow.parentRunId = '{parent_run_id}' and metrics.`test/accuracy` >= 0",
        "orderByKey": "metrics.`test/accuracy`",
        "orderByAsc": "false",
    }
    return f"{ui_url()}/#/experiments/{experiment}/runs?{TRAINING_VIEW}&{urlencode(asked, quote_via=quote)}"


def version_url(name: str, version: str) -> str:
    """Address of a registered version in the MLflow UI."""
    return f"{ui_url()}/#/models/{quote(name)}/versions/{version}?{TRAINING_VIEW}"


def ui_url() -> str:
    """MLflow's address for a browser; links are logged and go to XCom, so the client's login is no part of them."""
    return Environment.from_env().mlflow_ui_url or without_login(mlflow.get_tracking_uri()).rstrip("/")


def experiment_id(name: str) -> str:
    """Id of the experiment, which is created on first use, also when several runs start at once.

    One that somebody deleted is restored: its runs are wanted again, and MLflow allows no second one of that name.
    """
    client = mlflow.MlflowClient()
    if known := client.get_experiment_by_name(name):
        if known.lifecycle_stage == LifecycleStage.DELETED:
            logger.warning("the MLflow experiment %s had been deleted; it is restored", name)
            try:
                client.restore_experiment(known.experiment_id)
            except MlflowException as error:  # another task has restored it meanwhile
                if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                    raise
        return known.experiment_id
    try:
        return client.create_experiment(name, tags={"mlflow.experimentKind": "custom_model_development"})
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    return experiment_id(name)


def find_run(experiment: str, key: str) -> Run | None:
    """The run of that key, if an earlier attempt left it."""
    runs = mlflow.MlflowClient().search_runs([experiment], f"tags.run_key = '{key}'", max_results=1)
    return runs[0] if runs else None


SET_ASIDE = "set aside"
"""Tag `stage` of a run that is no part of its DAG run's results any more."""


def set_aside(experiment: str, origin: TaskContext, wanted: str) -> None:
    """Take runs that the DAG run made before, from other data or settings, out of its results.

    Args:
        wanted: what they are, as MLflow's filters say it.
    """
    client = mlflow.MlflowClient()
    of_the_dag_run = f"tags.dag_run_key = '{origin.key('all')}' and tags.stage != '{SET_ASIDE}'"
    for run in client.search_runs([experiment], f"{of_the_dag_run} and {wanted}"):
        tags = [RunTag("former_stage", run.data.tags["stage"]), RunTag("stage", SET_ASIDE)]
        client.log_batch(run.info.run_id, tags=tags)
        client.delete_tag(run.info.run_id, MLFLOW_PARENT_RUN_ID)


def stage_of(run: Run) -> str:
    """The stage that made the run, also if it was set aside."""
    stage = run.data.tags["stage"]
    return run.data.tags.get("former_stage", "train") if stage == SET_ASIDE else stage


def take_back(run: Run, parent_run_id: str) -> None:
    """Make a run that was set aside a part of its DAG run's results again."""
    tags = [RunTag("stage", stage_of(run)), RunTag(MLFLOW_PARENT_RUN_ID, parent_run_id)]
    mlflow.MlflowClient().log_batch(run.info.run_id, tags=tags)


def open_run(
    experiment: str, key: str, *, name: str, tags: Mapping[str, str], description: str, parent_run_id: str | None = None
) -> Run:
    """Reopen the run of that key, or create it. `name` and `description` are those of a new run."""
    client = mlflow.MlflowClient()
    if parent_run_id:
        tags = {**tags, MLFLOW_PARENT_RUN_ID: parent_run_id}
    if run := find_run(experiment, key):
        client.update_run(run.info.run_id, status=RunStatus.to_string(RunStatus.RUNNING))
        client.log_batch(run.info.run_id, tags=[RunTag(tag, value) for tag, value in tags.items()])
        if "error" in run.data.tags:
            client.delete_tag(run.info.run_id, "error")
        return client.get_run(run.info.run_id)
    first = {"run_key": key, MLFLOW_RUN_NAME: name, MLFLOW_RUN_NOTE: description}
    client.create_run(experiment, tags={**first, **tags})
    # A server that dies between writing and answering is asked again by MLflow's client, and then has written twice.
    by_age = ["attributes.start_time ASC", "attributes.run_id ASC"]
    run, *copies = client.search_runs([experiment], f"tags.run_key = '{key}'", order_by=by_age)
    for copy in copies:
        client.delete_run(copy.info.run_id)
    return run


class TrackedRun:
    """What a stage writes to its MLflow run. Satisfies `mlpipe.training.protocol.TrainingLogger`."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._last_steps: dict[str, int] = {}

    @property
    def run_id(self) -> str:
        return self._run.info.run_id

    @property
    def experiment_id(self) -> str:
        return self._run.info.experiment_id

    @property
    def url(self) -> str:
        return run_url(self._run)

    @property
    def tags(self) -> Mapping[str, str]:
        """As they were when this attempt opened the run."""
        return self._run.data.tags

    @property
    def started(self) -> datetime:
        """When the run began, in this machine's time zone."""
        return datetime.fromtimestamp(self._run.info.start_time / 1000).astimezone()

    @cached_property
    def _client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient()

    def log_metrics(
        self,
        metrics: Mapping[str, float],
        step: int = 0,
        model_id: str | None = None,
        dataset: Dataset | None = None,
    ) -> None:
        """Write metrics at one step (an epoch, from 1; or 0 for a result). What an earlier attempt wrote stays.

        Args:
            model_id: of the logged model that they are of, which shows them, too.
            dataset: what they were measured on.
        """
        fresh = {name: value for name, value in metrics.items() if step > self._last_step_before(name)}
        if fresh:
            mlflow.log_metrics(
                fresh, step=step, run_id=self.run_id, model_id=model_id, dataset=dataset, synchronous=True
            )

    def replace_metrics(self, metrics: Mapping[str, float]) -> None:
        """Write results that may differ from those of an earlier attempt, where they do."""
        changed = {name: value for name, value in metrics.items() if self._run.data.metrics.get(name) != value}
        mlflow.log_metrics(changed, run_id=self.run_id, synchronous=True)

    def history(self, metric: str) -> list[tuple[int, float]]:
        """Steps and values of a metric, by step."""
        entries = self._client.get_metric_history(self.run_id, metric)
        return sorted((entry.step, entry.value) for entry in entries)

    def last_logged_step(self, metric: str) -> int:
        """The largest step at which the metric was written; 0 if never."""
        return max((step for step, _ in self.history(metric)), default=0)

    def _last_step_before(self, metric: str) -> int:
        """The largest step that the metric had when this attempt opened the run; -1: none."""
        if metric not in self._run.data.metrics:  # as they were then
            return -1
        if metric not in self._last_steps:
            self._last_steps[metric] = self.last_logged_step(metric)
        return self._last_steps[metric]

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Write parameters; those that an earlier attempt wrote stay as they are, being immutable."""
        known = self._client.get_run(self.run_id).data.params
        fresh = {name: str(value) for name, value in params.items() if name not in known}
        if fresh:
            mlflow.log_params(fresh, run_id=self.run_id, synchronous=True)

    def log_figure(self, figure: Figure, name: str) -> None:
        """Write a figure in the format that the name ends with."""
        self._client.log_figure(self.run_id, figure, name)

    def log_text(self, text: str, path: str) -> None:
        self._client.log_text(self.run_id, text, path)

    def log_dict(self, value: Mapping[str, Any], path: str) -> None:
        self._client.log_dict(self.run_id, dict(value), path)

    def log_table(self, columns: Mapping[str, Sequence[object]], path: str) -> None:
        """Write a table that the run's page shows, in place of an earlier attempt's."""
        import pandas as pd

        table = pd.DataFrame({name: list(values) for name, values in columns.items()})
        if path in {file.path for file in self._client.list_artifacts(self.run_id)}:  # MLflow would append to it
            self.log_text(table.to_json(orient="split", index=False), path)
        else:
            self._client.log_table(self.run_id, table, path)

    def ensure_current(self) -> None:
        """See that no later attempt of the task has opened the run.

        Raises:
            SupersededError: one has; this attempt was believed dead.
        """
        _ensure_still_of(self._run)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._client.log_batch(self.run_id, tags=[RunTag(tag, value) for tag, value in tags.items()])

    def describe(self, markdown: str) -> None:
        """Set the description that the run's page shows."""
        self.set_tags({MLFLOW_RUN_NOTE: markdown})


def _ensure_still_of(run: Run) -> None:
    """See that nobody has opened the run since.

    Raises:
        SupersededError: another task, or a later attempt of this one, has.
    """
    names = ("task_id", "try_number")
    now = mlflow.MlflowClient().get_run(run.info.run_id)
    (task, own), (other, last) = (tuple(each.data.tags.get(name) for name in names) for each in (run, now))
    if (task, own) != (other, last):
        who = f"attempt {last} of this task" if task == other else f"the task {other}"
        raise SupersededError(f"{who} has taken over; attempt {own} ends and writes nothing")


def tracked(run_id: str) -> TrackedRun:
    """A run to add to, also after it has ended."""
    return TrackedRun(mlflow.MlflowClient().get_run(run_id))


def _keep_quiet() -> None:
    """Keep MLflow's notices and progress bars from stderr, which Airflow shows as errors."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.set(True)


def is_unreachable(error: BaseException) -> bool:
    """Whether a call failed because MLflow's server did not answer, however often it was tried."""
    return isinstance(error, MlflowException) and isinstance(
        error.__cause__ or error.__context__, requests.RequestException
    )


@contextmanager
def _impatient() -> Iterator[None]:
    """Ask MLflow's server once, not for minutes."""
    before = MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()
    MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(0)
    try:
        yield
    finally:
        MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(before)


@contextmanager
def active(run: Run, *, system_metrics: bool = False) -> Iterator[TrackedRun]:
    """Make `run` the active one; end it as FINISHED, as FAILED on an error, as KILLED when stopped from outside.

    What stops a task from outside stops its DAG run as well, or is followed by a retry, which opens the parent again:
    with a killed run its parent ends, too. While MLflow's server is away the run stays open, for the next attempt.
    """
    if system_metrics:
        mlflow.set_system_metrics_sampling_interval(SYSTEM_METRICS_INTERVAL)
        from mlpipe.tracking.gpu_metrics import watch_visible_devices  # only what trains has NVIDIA's library

        watch_visible_devices()
    _keep_quiet()
    mlflow.start_run(run_id=run.info.run_id, log_system_metrics=system_metrics)
    try:
        yield TrackedRun(run)
    except Exception as error:
        if is_unreachable(error):
            with _impatient(), suppress(MlflowException):
                mlflow.end_run(RunStatus.to_string(RunStatus.FAILED))
        else:
            mlflow.set_tag("error", str(error)[:5000])
            mlflow.end_run(RunStatus.to_string(RunStatus.FAILED))
        raise
    except SupersededError as error:  # the run is the later attempt's
        logger.warning("%s", error)
        raise
    except BaseException:  # stopped from outside; who does that does not wait long
        killed = RunStatus.to_string(RunStatus.KILLED)
        with _impatient(), suppress(MlflowException, SupersededError):
            _ensure_still_of(run)
            mlflow.end_run(killed)
            if parent := run.data.tags.get(MLFLOW_PARENT_RUN_ID):
                mlflow.MlflowClient().set_terminated(parent, killed)
        raise
    mlflow.end_run(RunStatus.to_string(RunStatus.FINISHED))
