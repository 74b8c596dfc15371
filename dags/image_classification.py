"""Download and preprocess images, train the chosen models side by side, evaluate and compare them.

This file only wires tasks: their order and parameters. `mlpipe.stages` does the work.
"""

from __future__ import annotations

from typing import Any

from airflow.sdk import Asset, AssetAlias, Param, dag, get_current_context, task
from pipeline_tasks import (
    CHAMPIONS,
    EXECUTORS,
    RETRIES,
    announce,
    close_runs,
    download,
    link_to_run,
    origin,
    publish,
    run_config,
    stage_code,
    training_pod,
)

from mlpipe.config import RunParams
from mlpipe.executors import evaluation_task, training_task

HELP = """
Compares image classifiers: downloads and checks images, trains the chosen models side by side, tests them on images
that none of them has seen, and publishes the best one in MLflow as `@champion`.

**First click:** *Trigger*, at the top right. The defaults train three models on handwritten digits in a minute or two.
Then open the DAG run: its tab *Report* shows the progress, then the verdict, the mistakes and next steps.

| recipe | what it is for | digits, two cores | CIFAR-10, two cores |
| --- | --- | --- | --- |
| `quick` | a first look, offline | about a minute | minutes |
| `report` | the settings of the report: Adam, 0.001, ten epochs | minutes | a quarter of an hour |
| `strong` | the best accuracy in ten epochs on photographs | minutes | one or two hours with resnet18 |

Your own images: data set `images`, and the path or address of a zip, a tar or a folder with `<class>/…` as *Data URI*.
Your own network: `/path/mynets.py:TinyNet` under *Models*. If a run fails, its tab *Report* and the task's log say why.
Clear the task to resume it after its last epoch.
"""

DATASETS = AssetAlias("image_datasets")


@dag(
    schedule=None,
    catchup=False,
    params={name: Param(**schema) for name, schema in RunParams.json_schema().items()},
    default_args=RETRIES,
    on_failure_callback=close_runs,
    on_success_callback=close_runs,
    max_active_runs=16,
    doc_md=HELP,
    tags=["image-classification", "mlflow"],
)
def image_classification() -> None:
    @task(
        doc_md="Decode, check, split and publish the images; log them to MLflow.",
        outlets=[DATASETS],
        # One at a time, so the second of two tasks with the same images finds them published. Also, Airflow 3.3 fails a
        # task if another task's event names the same new asset at the same moment.
        max_active_tis_per_dag=1,
    )
    def preprocess(source: dict[str, Any]) -> list[dict[str, Any]]:
        dataset = publish(source)
        asset = Asset(name=dataset["name"], uri=f"mlpipe://datasets/{dataset['name']}")
        get_current_context()["outlet_events"][DATASETS].add(
            asset, extra={"digest": dataset["digest"], "uri": dataset["uri"]}
        )
        return [{"model": model.name, "dataset": dataset} for model in run_config().models]

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
        announce(result)
        return to_json(result)

    source = task(doc_md=download.__doc__, multiple_outputs=False)(download)()
    evaluate(train.expand_kwargs(preprocess(source)))  # type: ignore[arg-type]  # an XComArg each


image_classification()
