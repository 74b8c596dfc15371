"""Search for a model's settings, train the best ones anew, test them and publish the best.

This file only wires tasks: their order and parameters. `mlpipe.stages` does the work.
"""

from __future__ import annotations

from typing import Any

from airflow.sdk import Param, dag, get_current_context, task
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
    stage_code,
    training_pod,
)

from mlpipe.executors import evaluation_task, training_task
from mlpipe.search.form import Search, TuneParams, resolve_search

HELP = """
Searches for the settings of one model with the best accuracy on the **validation** images (Optuna: TPE, successive
halving). The first trial has the recipe's own settings and is never pruned, so the result on these images is never
worse than the recipe's. The model is then trained again with the best settings and fresh seeds. These models are tested
once, registered, and must pass the same gate as all others.

**First click:** *Trigger*. The tab *Report* shows the final trainings, then their comparison. In MLflow, each trial is
a child of the DAG run's parent run, which has the figures of the search and `best_settings.json`. To use the settings,
paste that file's text into *Settings* of `image_classification`, or run `mlpipe run --tuned STUDY`.
"""


def search_config() -> Search:
    """The search that the form describes."""
    context = get_current_context()
    return resolve_search(TuneParams.from_mapping(context["params"]), context["ti"].run_id)


@dag(
    schedule=None,
    catchup=False,
    params={name: Param(**schema) for name, schema in TuneParams.json_schema().items()},
    default_args=RETRIES,
    on_failure_callback=close_runs,
    on_success_callback=close_runs,
    max_active_runs=4,
    doc_md=HELP,
    tags=["image-classification", "mlflow"],
)
def tune() -> None:
    @task(task_id="download", doc_md=download.__doc__, multiple_outputs=False)
    def check_and_download() -> dict[str, Any]:
        with stage_code():
            search_config()
        return download()

    @task(doc_md=publish.__doc__, max_active_tis_per_dag=1)
    def preprocess(source: dict[str, Any]) -> list[dict[str, Any]]:
        dataset = publish(source)
        with stage_code():
            return [{"worker": worker, "dataset": dataset} for worker in range(search_config().workers)]

    @task(
        doc_md="Try settings until all trials are taken.",
        multiple_outputs=False,
        map_index_template="worker {{ task.op_kwargs['worker'] }}",
        **training_task(EXECUTORS, training_pod),
    )
    def search(worker: int, dataset: dict[str, Any]) -> dict[str, Any]:
        from mlpipe.stages import search as stage
        from mlpipe.stages.messages import PublishedData, from_json

        with stage_code():
            data = from_json(PublishedData, dataset)
            stage.search(search_config(), origin(), worker, data, on_run=link_to_run)
        return dataset

    @task(
        doc_md="Choose the best settings by validation.",
        trigger_rule="all_done_min_one_success",
        **evaluation_task(EXECUTORS, training_pod),
    )
    def conclude(datasets: list[dict[str, Any]]) -> list[dict[str, Any]]:
        from mlpipe.stages import search as stage
        from mlpipe.stages.messages import to_json

        with stage_code():
            config = search_config()
            found = stage.conclude(config, origin(), on_run=link_to_run)
            names = [model.name for model in stage.winners(config, found.settings).models]
        dataset = next(iter(datasets))
        get_current_context()["ti"].xcom_push(key="search", value=to_json(found))
        return [{"model": name, "settings": dict(found.settings), "dataset": dataset} for name in names]

    @task(
        doc_md="Train the best settings on a fresh seed, log and register the model.",
        multiple_outputs=False,
        map_index_template="{{ task.op_kwargs['model'] }}",
        **training_task(EXECUTORS, training_pod),
    )
    def train(model: str, settings: dict[str, Any], dataset: dict[str, Any]) -> dict[str, Any]:
        from mlpipe.stages import search, train
        from mlpipe.stages.messages import PublishedData, from_json, to_json

        with stage_code():
            config = search.winners(search_config(), settings)
            data = from_json(PublishedData, dataset)
            return to_json(train.train(config, origin(), model, data, on_run=link_to_run)) | {"settings": settings}

    @task(
        doc_md="Test the final models once, and publish the best if it passes the gate.",
        multiple_outputs=False,
        trigger_rule="all_done_min_one_success",
        outlets=[CHAMPIONS],
        max_active_tis_per_dag=1,
        **evaluation_task(EXECUTORS, training_pod),
    )
    def evaluate(trained: list[dict[str, Any]]) -> dict[str, Any]:
        from mlpipe.stages import evaluate, search
        from mlpipe.stages.messages import TrainedVersion, from_json, to_json

        with stage_code():
            versions = [{name: value for name, value in each.items() if name != "settings"} for each in trained]
            config = search.winners(search_config(), next(iter(trained))["settings"])
            models = [from_json(TrainedVersion, each) for each in versions]
            result = evaluate.evaluate(config, origin(), models, on_run=link_to_run)
        announce(result)
        return to_json(result)

    final = conclude(search.expand_kwargs(preprocess(check_and_download())))  # type: ignore[arg-type]  # an XComArg each
    evaluate(train.expand_kwargs(final))  # type: ignore[arg-type]


tune()
