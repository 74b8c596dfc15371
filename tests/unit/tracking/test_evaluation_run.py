"""The gate between a run's models and what the aliases name, on a real registry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest

from mlpipe.config import PromotionConfig
from mlpipe.data.dataset import Split
from mlpipe.evaluation.promotion import Overlap, Promotion, promote
from mlpipe.evaluation.result import ModelResult, Unmeasured
from mlpipe.evaluation.scoring import evaluate_predictions
from mlpipe.tracking import registry, runs
from mlpipe.tracking.evaluation_run import remeasure
from mlpipe.tracking.seen_images import data_of

NAME = "letters-classifier"
LABELS = np.arange(200) % 2


def result(name: str, version: str, num_right: int) -> ModelResult:
    """Of a model that is right on the first images."""
    predictions = np.where(np.arange(200) < num_right, LABELS, 1 - LABELS)
    probabilities = np.where(np.eye(2, dtype=bool)[predictions], 0.9, 0.1)
    evaluation = evaluate_predictions(LABELS, probabilities, ("a", "b"), seed=0)
    return ModelResult(name=name, architecture=name, version=version, evaluation=evaluation)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[mlflow.MlflowClient]:
    """A registry with three versions, of which none has an alias."""
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_registry_uri(f"sqlite:///{tmp_path}/mlflow.db")
    client = mlflow.MlflowClient()
    client.create_registered_model(NAME)
    client.create_run("0", tags={"stage": "parent"})
    for _ in range(3):
        client.create_model_version(NAME, source=str(tmp_path), tags={"model": "cnn"})
    yield client
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri("")


def run(
    *models: tuple[str, str, int], remeasured: Any = None, overlap: Overlap | None = None, **rules: Any
) -> Promotion:
    """Promote among models given by name, version and number of right answers."""

    def again(version: str) -> ModelResult | Unmeasured:
        if isinstance(remeasured, int):
            return result("old", version, remeasured)
        return remeasure(NAME, version, Split.of(np.zeros((200, 8, 8, 3), np.uint8), LABELS), ("a", "b"))

    ranked = [result(*model) for model in models]
    parent = mlflow.MlflowClient().search_runs(["0"])[-1]
    aliases = registry.RegistryAliases(NAME, runs.tracked(parent.info.run_id))
    return promote(PromotionConfig(**rules), ranked, aliases, again, lambda _: overlap)


def alias(client: mlflow.MlflowClient, name: str) -> str:
    return str(client.get_model_version_by_alias(NAME, name).version)


def test_the_data_of_a_model_are_known_by_each_of_its_addresses(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    client.create_model_version(NAME, source=str(tmp_path), tags={"data_digest": "abc"})
    client.set_registered_model_alias(NAME, "champion", "4")
    addresses = [f"models:/{NAME}{end}" for end in ("/4", "/latest", "@champion")]
    assert [data_of([address]) for address in addresses] == [{"abc"}] * 3


def test_the_first_models_get_their_aliases(client: mlflow.MlflowClient) -> None:
    promotion = run(("cnn", "1", 190), ("svm", "2", 150))
    assert (alias(client, "champion"), alias(client, "cnn"), alias(client, "svm")) == ("1", "1", "2")
    assert promotion.moved_champion
    assert promotion.champion == "1"


@pytest.mark.parametrize(("num_right", "champion"), [(195, "3"), (182, "1")], ids=["clearly better", "may be chance"])
def test_a_champion_is_replaced_by_a_model_that_is_surely_better(
    client: mlflow.MlflowClient, num_right: int, champion: str
) -> None:
    client.set_registered_model_alias(NAME, "champion", "1")
    promotion = run(("cnn", "3", num_right), remeasured=180)
    assert alias(client, "champion") == champion
    assert promotion.moved_champion is (champion == "3")


def test_an_evaluation_that_is_repeated_decides_alike(client: mlflow.MlflowClient) -> None:
    client.set_registered_model_alias(NAME, "champion", "1")
    first, again = (run(("cnn", "3", 195), ("svm", "2", 150), remeasured=180) for _ in range(2))
    assert again.moved_champion
    assert again.summary == first.summary
    assert (again.decisions, again.champion) == (first.decisions, "3")


def test_the_candidate_is_the_best_by_the_metric_of_the_rules(client: mlflow.MlflowClient) -> None:
    labels = np.repeat([0, 1], [180, 20])

    def of(name: str, version: str, wrong: np.ndarray) -> ModelResult:
        probabilities = np.eye(2)[np.where(wrong, 1 - labels, labels)]
        evaluation = evaluate_predictions(labels, probabilities, ("a", "b"), seed=0)
        return ModelResult(name=name, architecture=name, version=version, evaluation=evaluation)

    accurate, balanced = of("cnn", "1", np.arange(200) >= 185), of("svm", "2", np.arange(200) % 10 == 0)
    aliases = registry.RegistryAliases(NAME, runs.tracked(client.search_runs(["0"])[0].info.run_id))
    rules = PromotionConfig(metric="balanced_accuracy")
    promotion = promote(rules, [accurate, balanced], aliases, lambda _: accurate, lambda _: None)
    assert alias(client, "champion") == promotion.champion == "2"
    assert promotion.summary.startswith("svm is the new champion.")


@pytest.mark.parametrize("mode", ["dry_run", "disabled"])
def test_other_modes_move_nothing(client: mlflow.MlflowClient, mode: str) -> None:
    promotion = run(("cnn", "1", 190), mode=mode)
    assert client.get_registered_model(NAME).aliases == {}
    assert (promotion.champion, promotion.decisions["champion"].promote) == (None, True)


class Foreign(mlflow.pyfunc.PythonModel):
    """A model that anybody wrote."""

    def predict(self, context: Any, model_input: np.ndarray) -> Any:  # noqa: ARG002
        raise TypeError("cannot concatenate object of type 'numpy.ndarray'")


class OtherLetters(mlflow.pyfunc.PythonModel):
    """A classifier of other classes."""

    def predict(self, context: Any, model_input: np.ndarray) -> Any:  # noqa: ARG002
        return pd.DataFrame(np.ones((len(model_input), 2)) / 2, columns=["probability_a", "probability_x"])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Foreign(), "could not be measured on the same images: cannot concatenate object of type 'numpy.ndarray'"),
        (OtherLetters(), "does not know 'b' and knows 'x', which is no class here"),
    ],
    ids=["an error", "other classes"],
)
def test_an_alias_on_a_model_that_anybody_wrote_stays(
    client: mlflow.MlflowClient, model: mlflow.pyfunc.PythonModel, reason: str
) -> None:
    logged = mlflow.pyfunc.log_model(name="foreign", python_model=model, registered_model_name=NAME)
    version = str(logged.registered_model_version)
    client.set_registered_model_alias(NAME, "champion", version)
    promotion = run(("cnn", "3", 200))
    assert alias(client, "champion") == version
    assert f"The champion, a model of unknown name (version {version}), {reason}. Remove the alias" in promotion.summary


def test_a_deleted_champion_leaves_room_for_a_new_one(client: mlflow.MlflowClient) -> None:
    client.set_registered_model_alias(NAME, "champion", "2")
    client.delete_model_version(NAME, "2")
    assert registry.by_alias(NAME, "champion") is None
    assert run(("cnn", "3", 190)).moved_champion


def test_a_champion_of_another_problem_stays_and_is_not_offered(client: mlflow.MlflowClient) -> None:
    client.set_registered_model_alias(NAME, "champion", "1")
    other = Overlap(unseen=np.ones(200, bool), same_problem=False)
    promotion = run(("cnn", "3", 200), remeasured=0, overlap=other)
    assert alias(client, "champion") == "1"
    assert promotion.champion is None
    assert "Give this data set a name of its own" in promotion.summary
