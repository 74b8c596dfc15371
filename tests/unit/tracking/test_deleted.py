"""Which logged models `mlpipe gc` removes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from mlpipe.data.storage.store import ObjectStore
from mlpipe.tracking.deleted import delete_checkpoints_of_deleted_runs, delete_models_of_deleted_runs


@pytest.fixture
def client(tmp_path: Path) -> Iterator[mlflow.MlflowClient]:
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(None)


def test_models_of_deleted_runs_go_but_for_registered_ones(client: mlflow.MlflowClient) -> None:
    experiment = client.create_experiment("pets")
    runs = {name: client.create_run(experiment).info.run_id for name in ("kept", "deleted", "registered")}
    models = {name: client.create_logged_model(experiment, source_run_id=run) for name, run in runs.items()}
    alone = client.create_logged_model(experiment)
    client.create_registered_model("pets-classifier")
    registered = models["registered"].model_id
    client.create_model_version("pets-classifier", f"models:/{registered}", model_id=registered)
    for name in ("deleted", "registered"):
        client.delete_run(runs[name])

    assert delete_models_of_deleted_runs() == 1
    assert delete_models_of_deleted_runs() == 0

    left = {model.model_id for model in client.search_logged_models([experiment])}
    assert left == {models["kept"].model_id, registered, alone.model_id}


def test_checkpoints_of_deleted_runs_go(client: mlflow.MlflowClient, store: ObjectStore) -> None:
    experiment = client.create_experiment("pets")
    kept, deleted = (client.create_run(experiment).info.run_id for _ in range(2))
    for place in (kept, f"{kept}/2", deleted, f"{deleted}/2", "0" * 32):  # of a cross-validation's second training
        store.put_bytes(f"checkpoints/{place}/last.pt", b"state")
    client.delete_run(deleted)
    assert delete_checkpoints_of_deleted_runs(store) == 3
    assert store.list("checkpoints") == [f"checkpoints/{kept}/2/last.pt", f"checkpoints/{kept}/last.pt"]
