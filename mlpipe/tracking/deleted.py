"""What deleted runs leave behind: `mlflow gc` keeps their models' files for ever (mlflow issue 19467)."""

from __future__ import annotations

import mlflow
from mlflow.entities import LifecycleStage, ViewType
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from mlpipe.data.storage.store import ObjectStore


def delete_models_of_deleted_runs() -> int:
    """Mark the logged models of deleted runs as deleted, so that `mlflow gc` removes them; their number.

    A model with a registered version stays.
    """
    client = mlflow.MlflowClient()
    # The source is models:/<id>; a search leaves the field `model_id` empty.
    registered = {(version.source or "").rpartition("/")[2] for version in mlflow.search_model_versions()}
    experiments = [each.experiment_id for each in mlflow.search_experiments(ViewType.ALL)]
    logged = [model for each in experiments for model in mlflow.search_logged_models([each], output_format="list")]
    deleted = [
        model.model_id
        for model in logged
        if model.model_id not in registered and _is_deleted(client, model.source_run_id)
    ]
    for model_id in deleted:
        client.delete_logged_model(model_id)
    return len(deleted)


def delete_checkpoints_of_deleted_runs(store: ObjectStore) -> int:
    """Remove the checkpoints of deleted runs whose training never ended; their number."""
    client = mlflow.MlflowClient()
    deleted = [key for key in store.list("checkpoints") if _is_deleted(client, key.split("/")[1])]
    for key in deleted:
        store.delete(key)
    return len(deleted)


def _is_deleted(client: mlflow.MlflowClient, run_id: str | None) -> bool:
    if not run_id:
        return False
    try:
        return client.get_run(run_id).info.lifecycle_stage == LifecycleStage.DELETED
    except MlflowException as error:  # removed for good
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return True
        raise
