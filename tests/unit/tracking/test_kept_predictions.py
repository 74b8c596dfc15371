"""No model is asked the same twice; answers that do not fit are not used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from botocore.exceptions import ClientError

from mlpipe.data.dataset import Split
from mlpipe.data.storage.store import ObjectStore
from mlpipe.tracking.evaluation_run import measure, remeasure
from mlpipe.tracking.kept_predictions import KeptPredictions

LABELS = np.arange(6) % 2
TEST = Split.of(np.zeros((6, 8, 8, 3), np.uint8), LABELS)
MODEL = "m-0123"


class Answers(mlflow.pyfunc.PythonModel):
    """Counts how often it was asked."""

    def __init__(self, asked: Path) -> None:
        self.asked = asked

    def predict(self, context: Any, model_input: Any, params: Any = None) -> pd.DataFrame:  # noqa: ARG002
        with self.asked.open("a") as file:
            file.write("x")
        return pd.DataFrame({"probability_cat": 0.75, "probability_dog": 0.25}, index=range(len(model_input)))


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """One letter for each time the model at `tmp_path / "model"` was asked."""
    file = tmp_path / "asked"
    file.touch()
    mlflow.pyfunc.save_model(str(tmp_path / "model"), python_model=Answers(file), pip_requirements=[])
    return file


def accuracy(folder: Path, kept: KeptPredictions, *classes: str) -> float:
    evaluation, _ = measure(str(folder / "model"), TEST, classes, kept, MODEL)
    return evaluation.accuracy


def test_a_model_is_asked_once(store: ObjectStore, tmp_path: Path, asked: Path) -> None:
    kept = KeptPredictions(store, "digest-once")
    first, again = (measure(str(tmp_path / "model"), TEST, ("cat", "dog"), kept, MODEL)[0] for _ in range(2))
    assert asked.read_text() == "x"
    np.testing.assert_array_equal(first.predictions.probabilities, again.predictions.probabilities)
    swapped, _ = measure(str(tmp_path / "model"), TEST, ("dog", "cat"), kept, MODEL)
    np.testing.assert_array_equal(swapped.predictions.probabilities[:, ::-1], first.predictions.probabilities)
    assert asked.read_text() == "x"


def test_other_images_another_model_and_other_libraries_are_asked(
    store: ObjectStore, tmp_path: Path, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy(tmp_path, KeptPredictions(store, "digest-a"), "cat", "dog")
    accuracy(tmp_path, KeptPredictions(store, "digest-b"), "cat", "dog")
    measure(str(tmp_path / "model"), TEST, ("cat", "dog"), KeptPredictions(store, "digest-a"), "m-4567")
    assert asked.read_text() == "xxx"
    monkeypatch.setattr("mlpipe.models.libraries.version", lambda _: "99")
    accuracy(tmp_path, KeptPredictions(store, "digest-a"), "cat", "dog")
    assert asked.read_text() == "xxxx"


def test_damaged_answers_are_replaced(store: ObjectStore, tmp_path: Path, asked: Path) -> None:
    kept = KeptPredictions(store, "digest-damaged")
    accuracy(tmp_path, kept, "cat", "dog")
    (key,) = store.list("predictions/digest-damaged/")
    store.put_bytes(key, store.get_bytes(key)[:40])
    for _ in range(2):
        assert accuracy(tmp_path, kept, "cat", "dog") == 0.5
    assert asked.read_text() == "xx"


def test_a_store_that_fails_is_not_the_models_fault(
    s3_endpoint: str,  # noqa: ARG001 - a server without that bucket
    tmp_path: Path,
    asked: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_registry_uri(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        logged = mlflow.pyfunc.log_model(name="model", python_model=Answers(asked), pip_requirements=[])
        client = mlflow.MlflowClient()
        client.create_registered_model("pets-classifier")
        client.create_model_version("pets-classifier", source=logged.model_uri, model_id=logged.model_id)
        with pytest.raises(ClientError):
            remeasure("pets-classifier", "1", TEST, ("cat", "dog"), KeptPredictions(ObjectStore("gone"), "digest"))
    finally:
        mlflow.end_run()
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri("")
