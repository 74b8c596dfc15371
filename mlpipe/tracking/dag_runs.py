"""What the stages share: the MLflow experiment and parent run of a DAG run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from mlflow import MlflowClient
from mlflow.entities import Run

from mlpipe.config import RunConfig
from mlpipe.tracking import runs
from mlpipe.tracking.runs import TaskContext

OnRun = Callable[[str], None]
"""Told the address of the MLflow run as soon as there is one."""


def experiment_name(dataset: str) -> str:
    """Name of the MLflow experiment that holds all runs on a data set."""
    return f"image-classification-{dataset}"


def experiment(config: RunConfig) -> str:
    """Id of the run's MLflow experiment."""
    return runs.experiment_id(experiment_name(config.data.name))


def parent_run(config: RunConfig, origin: TaskContext) -> Run:
    """The MLflow run of the whole DAG run."""
    names = ", ".join(model.name for model in config.models)
    run = runs.open_run(
        experiment(config),
        origin.key("parent"),
        name=f"{config.recipe} · {config.data.name} · {origin.dag_run_id}",
        tags={
            **origin.tags(),
            "stage": "parent",
            "recipe": config.recipe,
            "dataset": config.data.name,
            "models": names,
        },
        description=f"{origin.link}\n\n{names} on {config.data.name}: not compared yet.",
    )
    if origin.error_tag in run.data.tags:
        MlflowClient().delete_tag(run.info.run_id, origin.error_tag)
    return run


def note_failure(config: RunConfig, origin: TaskContext, error: BaseException) -> None:
    """Say on the parent run which task failed and why; the task's next attempt removes it."""
    experiment = MlflowClient().get_experiment_by_name(experiment_name(config.data.name))
    if experiment and (run := runs.find_run(experiment.experiment_id, origin.key("parent"))):
        trained = [model.name for model in config.models] if origin.task_id == "train" else []
        # A search trains one model several times: of the others the task's name must do.
        who = trained[origin.map_index] if 0 <= origin.map_index < len(trained) else origin.task_id
        runs.tracked(run.info.run_id).set_tags({origin.error_tag: f"{who}: {error}"[:5000]})


def close(dataset: str, origin: TaskContext, status: Literal["FINISHED", "FAILED", "KILLED"], reason: str) -> None:
    """End the MLflow runs that an ended DAG run left open.

    Of a DAG run that succeeded, that is the parent; any other was left by a task that was killed, and has failed.

    Args:
        reason: for runs that do not say themselves why they failed.
    """
    client = MlflowClient()
    experiment = client.get_experiment_by_name(experiment_name(dataset))
    if experiment is None:
        return
    filter_string = f"tags.dag_run_key = '{origin.key('all')}' and attributes.status = 'RUNNING'"
    for run in client.search_runs([experiment.experiment_id], filter_string):
        is_left = status == "FINISHED" and run.data.tags.get("stage") != "parent"
        ended = "FAILED" if is_left else status
        if ended != "FINISHED" and not any(tag.startswith("error") for tag in run.data.tags):
            client.set_tag(run.info.run_id, "error", reason[:5000])
        client.set_terminated(run.info.run_id, ended)
