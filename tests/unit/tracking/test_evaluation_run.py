"""The gate between a run's models and what the aliases name, on a real registry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from mlpipe.config import PromotionConfig
from mlpipe.evaluation.metrics import evaluate_predictions
from mlpipe.tracking import registry
from mlpipe.tracking.evaluation_run import Promotion, Result, promote

NAME = "letters-classifier"
LABELS = np.arange(200) % 2


def result(num_right: int) -> Result:
    """Of a model that is right on the first images."""
    correct = np.arange(200) < num_right
    predictions = np.where(correct, LABELS, 1 - LABELS)
    probabilities = np.where(np.eye(2, dtype=bool)[predictions], 0.9, 0.1)
    evaluation = evaluate_predictions(LABELS, probabilities, ("a", "b"), seed=0)
    return Result(evaluation=evaluation, probabilities=probabilities, correct=correct)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[mlflow.MlflowClient]:
    """A registry with three versions, of which none has an alias."""
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_registry_uri(f"sqlite:///{tmp_path}/mlflow.db")
    client = mlflow.MlflowClient()
    client.create_registered_model(NAME)
    for _ in range(3):
        client.create_model_version(NAME, source=str(tmp_path), tags={"model": "cnn"})
    yield client
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri("")


def run(*models: tuple[str, str, int], remeasured: Any = None, **rules: Any) -> Promotion:
    """Promote among models given by name, version and number of right answers."""

    def remeasure(_: str) -> Result:
        if isinstance(remeasured, Exception):
            raise remeasured
        return result(remeasured)

    ranked = [({"name": name, "architecture": name, "version": version}, result(n)) for name, version, n in models]
    return promote(PromotionConfig(**rules), NAME, ranked, remeasure, lambda _: None, LABELS)


def alias(client: mlflow.MlflowClient, name: str) -> str:
    return str(client.get_model_version_by_alias(NAME, name).version)


def test_the_first_models_get_their_aliases(client: mlflow.MlflowClient) -> None:
    promotion = run(("cnn", "1", 190), ("svm", "2", 150))
    assert (alias(client, "champion"), alias(client, "cnn"), alias(client, "svm")) == ("1", "1", "2")
    assert promotion.moved_champion
    assert promotion.champion == {"name": NAME, "version": "1", "model_uri": f"models:/{NAME}/1"}


@pytest.mark.parametrize(("num_right", "champion"), [(195, "3"), (182, "1")], ids=["clearly better", "may be chance"])
def test_a_champion_is_replaced_by_a_model_that_is_surely_better(
    client: mlflow.MlflowClient, num_right: int, champion: str
) -> None:
    client.set_registered_model_alias(NAME, "champion", "1")
    promotion = run(("cnn", "3", num_right), remeasured=180)
    assert alias(client, "champion") == champion
    assert promotion.moved_champion is (champion == "3")


@pytest.mark.parametrize("mode", ["dry_run", "disabled"])
def test_other_modes_move_nothing(client: mlflow.MlflowClient, mode: str) -> None:
    promotion = run(("cnn", "1", 190), mode=mode)
    assert client.get_registered_model(NAME).aliases == {}
    assert (promotion.champion, promotion.decisions["champion"]["promote"]) == (None, True)


def test_an_alias_on_a_model_that_anybody_wrote_stays(client: mlflow.MlflowClient) -> None:
    client.set_registered_model_alias(NAME, "champion", "2")
    promotion = run(("cnn", "3", 200), remeasured=TypeError("cannot concatenate object of type 'numpy.ndarray'"))
    assert alias(client, "champion") == "2"
    assert "cannot concatenate object of type 'numpy.ndarray'. Remove the alias" in promotion.summary


def test_a_deleted_champion_leaves_room_for_a_new_one(client: mlflow.MlflowClient) -> None:
    client.set_registered_model_alias(NAME, "champion", "2")
    client.delete_model_version(NAME, "2")
    assert registry.by_alias(NAME, "champion") is None
    assert run(("cnn", "3", 190)).moved_champion
