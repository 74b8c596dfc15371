"""Download and preprocess images, train the chosen models side by side, evaluate and compare them.

This file only wires tasks: their order and parameters. `mlpipe.stages` does the work.
"""

from __future__ import annotations

import logging
import signal
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from airflow.sdk import (
    Asset,
    AssetAlias,
    ExceptionRetryPolicy,
    Param,
    RetryAction,
    RetryRule,
    dag,
    get_current_context,
    task,
)
from airflow.sdk.configuration import conf

from mlpipe.config import RunConfig, RunParams
from mlpipe.errors import ServiceUnavailableError, StoppedError, UserError
from mlpipe.executors import evaluation_task, training_task
from mlpipe.recipes import resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow.sdk import Context

    from mlpipe.tracking.runs import TaskContext

log = logging.getLogger(__name__)

EXECUTORS = conf.get("core", "executor", fallback="")


def training_pod(option: str) -> str | None:
    """An option of `[training_pod]`, which only Kubernetes uses."""
    return conf.get("training_pod", option, fallback=None)


VERDICT = "verdict"
"""Key of the sentences that the plugin `cancelled_runs` makes the DAG run's note."""

HELP = """
Compares image classifiers: downloads and checks images, trains the chosen models side by side, tests them on images
that none of them has seen, and publishes the best one in MLflow as `@champion`.

**First click:** *Trigger*, at the top right. The defaults train three models on handwritten digits in a minute or two.
Then open the DAG run: its tab *Report* shows the progress, then the verdict, the mistakes and what to do next.

| recipe | what it is for | digits, two cores | CIFAR-10, two cores |
| --- | --- | --- | --- |
| `quick` | a first look, offline | about a minute | minutes |
| `report` | the settings of the report: Adam, 0.001, ten epochs | minutes | half an hour |
| `strong` | the best accuracy in ten epochs on photographs | minutes | hours with resnet18 |

Your own images: data set `images`, and the path or address of a zip, a tar or a folder with `<class>/…` as *Data URI*.
Your own network: `/path/mynets.py:TinyNet` under *Models*. A run that fails says why in its note and in the task's log;
clear the task to resume it from its last epoch.
"""

DATASETS = AssetAlias("image_datasets")
CHAMPIONS = AssetAlias("champions")

MISTAKE = RetryRule(exception=SystemExit, action=RetryAction.FAIL, reason="a retry cannot fix this mistake")


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
    """The run that its form describes."""
    return resolve(RunParams.from_mapping(get_current_context()["params"]))


def origin() -> TaskContext:
    """The current task, for the tags of its MLflow run."""
    from mlpipe.tracking.runs import TaskContext

    context = get_current_context()
    ti, user = context["ti"], context["dag_run"].triggering_user_name
    return TaskContext(dag_id=ti.dag_id, dag_run_id=ti.run_id, task_id=ti.task_id, try_number=ti.try_number, user=user)


def link_to_run(url: str) -> None:
    """Link the running task's button and log to its MLflow run."""
    log.info("MLflow run: %s", url)
    get_current_context()["ti"].xcom_push(key="mlflow_run_url", value=url)


def close_runs(context: Context) -> None:
    """End the MLflow runs that an ended DAG run left open, whatever was cleared, marked or tried again by hand."""
    from mlpipe.tracking.dag_runs import close
    from mlpipe.tracking.runs import TaskContext

    run = context["dag_run"]
    dataset = resolve(RunParams.from_mapping(run.conf or {})).data.name
    status: Literal["FINISHED", "FAILED"] = "FINISHED" if context.get("reason") == "success" else "FAILED"
    close(
        dataset, TaskContext(dag_id=run.dag_id, dag_run_id=run.run_id, task_id=""), status, "see the failed task's log"
    )


@dag(
    schedule=None,
    catchup=False,
    params={name: Param(**schema) for name, schema in RunParams.json_schema().items()},
    default_args={
        "retries": 2,
        "retry_delay": timedelta(seconds=10),
        "retry_exponential_backoff": 2.0,  # the factor: retries begin about 15 and 30 seconds after a failure
        "max_retry_delay": timedelta(minutes=5),
        "retry_policy": ExceptionRetryPolicy(rules=[MISTAKE]),
    },
    on_failure_callback=close_runs,
    on_success_callback=close_runs,
    max_active_runs=16,
    doc_md=HELP,
    tags=["image-classification", "mlflow"],
)
def image_classification() -> None:
    @task(doc_md="Copy the source into object storage.", multiple_outputs=False)
    def download() -> dict[str, Any]:
        from mlpipe.stages import download as stage
        from mlpipe.stages.messages import to_json

        with stage_code():
            return to_json(stage.download(run_config(), origin(), on_run=link_to_run))

    @task(
        doc_md="Decode, check, split and publish the images; log them to MLflow.",
        outlets=[DATASETS],
        # One at a time, so the second of two tasks with the same images finds them published. Also, Airflow 3.3 fails a
        # task if another task's event names the same new asset at the same moment.
        max_active_tis_per_dag=1,
    )
    def preprocess(source: dict[str, Any]) -> list[dict[str, Any]]:
        from mlpipe.data.sources.fetch import SourceRef
        from mlpipe.stages import preprocess as stage
        from mlpipe.stages.messages import from_json, to_json

        with stage_code():
            config = run_config()
            dataset = stage.preprocess(config, origin(), from_json(SourceRef, source), on_run=link_to_run)
        asset = Asset(name=dataset.name, uri=f"mlpipe://datasets/{dataset.name}")
        get_current_context()["outlet_events"][DATASETS].add(
            asset, extra={"digest": dataset.digest, "uri": dataset.uri}
        )
        return [{"model": model.name, "dataset": to_json(dataset)} for model in config.models]

    @task(
        doc_md="Train one model, log and register it.",
        multiple_outputs=False,
        map_index_template="{{ task.op_kwargs['model'] }}",
        **training_task(EXECUTORS, training_pod),
    )
    def train(model: str, dataset: dict[str, Any]) -> dict[str, Any]:
        from mlpipe.stages import train as stage
        from mlpipe.stages.messages import PublishedData, from_json, to_json

        with stage_code():
            data = from_json(PublishedData, dataset)
            return to_json(stage.train(run_config(), origin(), model, data, on_run=link_to_run))

    @task(
        doc_md="Measure the models on the test images, compare them, promote the best.",
        multiple_outputs=False,
        trigger_rule="all_done_min_one_success",
        outlets=[CHAMPIONS],
        # One at a time: MLflow cannot compare with the champion and move aliases in one step.
        max_active_tis_per_dag=1,
        **evaluation_task(EXECUTORS, training_pod),
    )
    def evaluate(trained: list[dict[str, Any]]) -> dict[str, Any]:
        from mlpipe.stages import evaluate as stage
        from mlpipe.stages.messages import TrainedVersion, from_json, to_json

        with stage_code():
            versions = [from_json(TrainedVersion, each) for each in trained]
            result = stage.evaluate(run_config(), origin(), versions, on_run=link_to_run)
        ti = get_current_context()["ti"]
        ti.xcom_push(key="mlflow_comparison_url", value=result.compare_url)
        ti.xcom_push(key=VERDICT, value=result.summary)
        if result.champion:
            ti.xcom_push(key="mlflow_champion_url", value=result.champion.url)
        if champion := result.promoted:
            asset = Asset(name=champion.name, uri=f"mlflow://registered-models/{champion.name}/champion")
            best = result.models[0].metrics["test/accuracy"]
            extra: dict[str, Any] = {
                "accuracy": round(best, 4),
                "version": champion.version,
                "url": champion.url,
                "comparison": result.compare_url,
                "summary": result.summary,
            }
            get_current_context()["outlet_events"][CHAMPIONS].add(asset, extra=extra)
        return to_json(result)

    evaluate(train.expand_kwargs(preprocess(download())))  # type: ignore[arg-type]  # an XComArg each


image_classification()
