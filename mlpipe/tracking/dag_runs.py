"""What the stages share: the MLflow experiment and parent run of a DAG run."""

from __future__ import annotations

from collections.abc import Callable

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
    return runs.open_run(
        experiment(config),
        origin.key("parent"),
        name=f"{config.recipe} · {config.data.name} · {origin.dag_run_id}",
        tags={**origin.tags(), "stage": "parent", "recipe": config.recipe, "dataset": config.data.name},
        description=f"{origin.link}\n\n{names} on {config.data.name}: not compared yet.",
    )


def abandon(dataset: str, origin: TaskContext, reason: str, *, killed: bool = False) -> None:
    """End the MLflow runs that a DAG run left open: they become FAILED or KILLED, with the reason."""
    runs.abandon(experiment_name(dataset), origin, reason, killed=killed)
