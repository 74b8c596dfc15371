"""What the tasks of all DAGs share: their form, their errors, and the way to their MLflow run."""

from __future__ import annotations

import logging
import signal
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from airflow.sdk import Asset, AssetAlias, ExceptionRetryPolicy, RetryAction, RetryRule, get_current_context
from airflow.sdk.configuration import conf

from mlpipe.config import RunConfig, RunParams
from mlpipe.errors import ServiceUnavailableError, StoppedError, UserError
from mlpipe.forms import FORMS
from mlpipe.recipes import resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow.sdk import Context

    from mlpipe.stages.messages import ComparedModels
    from mlpipe.tracking.runs import TaskContext

log = logging.getLogger("mlpipe.dags")

EXECUTORS = conf.get("core", "executor", fallback="")

CHAMPIONS = AssetAlias("champions")

VERDICT = "verdict"
"""Key of the sentences that the plugin `cancelled_runs` makes the DAG run's note."""

MISTAKE = RetryRule(exception=SystemExit, action=RetryAction.FAIL, reason="a retry cannot fix this mistake")

RETRIES: dict[str, Any] = {
    "retries": 2,
    "retry_delay": timedelta(seconds=10),
    "retry_exponential_backoff": 2.0,  # the factor: retries begin about 15 and 30 seconds after a failure
    "max_retry_delay": timedelta(minutes=5),
    "retry_policy": ExceptionRetryPolicy(rules=[MISTAKE]),
}
"""Default arguments of all tasks."""


def training_pod(option: str) -> str | None:
    """An option of `[training_pod]`, which only Kubernetes uses."""
    return conf.get("training_pod", option, fallback=None)


def _stop(signal_number: int, _: object) -> NoReturn:
    raise StoppedError(signal.strsignal(signal_number))


@contextmanager
def stage_code() -> Iterator[None]:
    """Log when a stage starts and ends. A user error becomes one log line without a traceback and is not retried.

    A service that does not answer also becomes one line, and is retried. When Airflow stops the task, an exception ends
    the stage's own code, which has five seconds to close its MLflow run.
    """
    log.info("the stage starts")
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except UserError as mistake:
        log.error("%s", mistake)
        _note_failure(mistake)
        raise SystemExit(2) from None
    except ServiceUnavailableError as error:
        log.error("%s", error)
        raise
    except Exception as error:
        _note_failure(error)
        raise
    finally:
        log.info("the stage has ended")


def _note_failure(error: Exception) -> None:
    """Say in MLflow why this task failed, where MLflow can be reached; the task's log has the same."""
    from mlpipe.tracking.dag_runs import note_failure

    with suppress(Exception):
        note_failure(run_config(), origin(), error)


def run_config() -> RunConfig:
    """The run that the DAG's form describes."""
    context = get_current_context()
    return resolve(FORMS[context["dag"].dag_id].from_mapping(context["params"]).run_params())


def origin() -> TaskContext:
    """The current task, for the tags of its MLflow run."""
    from mlpipe.tracking.runs import TaskContext

    context = get_current_context()
    ti, user = context["ti"], context["dag_run"].triggering_user_name
    return TaskContext(
        dag_id=ti.dag_id,
        dag_run_id=ti.run_id,
        task_id=ti.task_id,
        try_number=ti.try_number,
        map_index=-1 if ti.map_index is None else ti.map_index,
        user=user,
    )


def link_to_run(url: str) -> None:
    """Link the running task's button and log to its MLflow run."""
    log.info("MLflow run: %s", url)
    get_current_context()["ti"].xcom_push(key="mlflow_run_url", value=url)


def close_runs(context: Context) -> None:
    """End the MLflow runs that an ended DAG run left open, whatever was cleared, marked or tried again by hand."""
    from mlpipe.tracking.dag_runs import close
    from mlpipe.tracking.runs import TaskContext

    run = context["dag_run"]
    params: RunParams = FORMS[run.dag_id].from_mapping(run.conf or {}).run_params()
    status: Literal["FINISHED", "FAILED"] = "FINISHED" if context.get("reason") == "success" else "FAILED"
    where = TaskContext(dag_id=run.dag_id, dag_run_id=run.run_id, task_id="")
    close(resolve(params).data.name, where, status, "see the failed task's log")


def announce(result: ComparedModels) -> None:
    """Give the task its buttons and the DAG run its note; a new champion is an event of an asset."""
    ti = get_current_context()["ti"]
    ti.xcom_push(key="mlflow_comparison_url", value=result.compare_url)
    ti.xcom_push(key=VERDICT, value=result.summary)
    if result.champion:
        ti.xcom_push(key="mlflow_champion_url", value=result.champion.url)
    if champion := result.promoted:
        asset = Asset(name=champion.name, uri=f"mlflow://registered-models/{champion.name}/champion")
        model = next(each for each in result.models if each.version == champion.version)
        extra: dict[str, Any] = {
            "accuracy": round(model.metrics["test/accuracy"], 4),
            "version": champion.version,
            "url": champion.url,
            "comparison": result.compare_url,
            "summary": result.summary,
        }
        get_current_context()["outlet_events"][CHAMPIONS].add(asset, extra=extra)


def download() -> dict[str, Any]:
    """Copy the source into object storage."""
    from mlpipe.stages import download as stage
    from mlpipe.stages.messages import to_json

    with stage_code():
        return to_json(stage.download(run_config(), origin(), on_run=link_to_run))


def publish(source: dict[str, Any]) -> dict[str, Any]:
    """Decode, check, split and publish the images; log them to MLflow."""
    from mlpipe.data.sources.fetch import SourceRef
    from mlpipe.stages import preprocess as stage
    from mlpipe.stages.messages import from_json, to_json

    with stage_code():
        return to_json(stage.preprocess(run_config(), origin(), from_json(SourceRef, source), on_run=link_to_run))
