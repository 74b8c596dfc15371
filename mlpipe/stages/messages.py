"""What passes between the stages: small and frozen, with JSON both ways, for that is what Airflow keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")


def to_json(message: Any) -> dict[str, Any]:
    """A message as what `json.dumps` takes."""
    values: dict[str, Any] = TypeAdapter(type(message)).dump_python(message, mode="json")
    return values


def from_json(kind: type[T], values: Mapping[str, Any]) -> T:
    """The inverse of `to_json`.

    Raises:
        ValueError: a field is missing, or of another type.
    """
    return TypeAdapter(kind).validate_python(values)


@dataclass(frozen=True, kw_only=True)
class PublishedData:
    """Of `preprocess`: the data set of this run."""

    name: str
    digest: str
    uri: str
    """Where its arrays are."""
    num_train: int
    num_val: int
    num_test: int
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """What was found in it and what was left out, a sentence each."""


@dataclass(frozen=True, kw_only=True)
class RegisteredModel:
    """Of `train`: one model, and how its training went."""

    name: str
    """Unique in the run."""
    architecture: str
    weights: str
    """What it started from."""
    run_id: str
    run_url: str
    model_uri: str
    """`models:/<registered model>/<version>`"""
    model_id: str | None
    version: str
    train_seconds: float
    images_per_second: float
    metrics: Mapping[str, float]
    """On the validation images; after `evaluate` on the test images, too."""


@dataclass(frozen=True, kw_only=True)
class TrainedVersion:
    """Of `train`: a model and what it was trained on."""

    model: RegisteredModel
    dataset: PublishedData
    is_reused: bool = False
    """Whether an earlier run trained it, in the same way."""


@dataclass(frozen=True, kw_only=True)
class Champion:
    """The registered version with the alias `champion`."""

    name: str
    """Of the registered model."""
    version: str
    model_uri: str
    url: str
    """Its page in the MLflow UI."""


@dataclass(frozen=True, kw_only=True)
class ComparedModels:
    """Of `evaluate`: the result of the run."""

    parent_run_id: str
    parent_url: str
    compare_url: str
    dataset: PublishedData
    models: tuple[RegisteredModel, ...]
    """By falling accuracy."""
    failed: Mapping[str, str]
    """Reasons by name of the model."""
    champion: Champion | None
    promoted: Champion | None
    """The champion, if it became that now."""
    summary: str


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One trial of a search."""

    number: int
    state: str
    """complete, pruned, failed, running or waiting."""
    value: float | None
    """Accuracy on the validation images, 0 to 1; of a pruned trial that of its last epoch."""
    params: Mapping[str, Any]
    """The settings that it tried."""
    run_id: str
    """Of its MLflow run; empty: it has not begun."""
    epochs: int
    """Epochs that were trained."""


@dataclass(frozen=True, kw_only=True)
class FoundSettings:
    """Of `conclude`: what a search found."""

    study: str
    settings: Mapping[str, Any]
    """The best ones by validation."""
    trials: tuple[TrialResult, ...]
    default: TrialResult | None
    """The trial with the recipe's own settings."""
    best: TrialResult
