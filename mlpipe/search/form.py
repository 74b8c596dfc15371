"""The form of a search. Only the standard library is loaded: Airflow reads it whenever it parses the DAG."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from mlpipe.config import Form, ModelConfig, NetworkSettings, RecipeName, RunConfig, RunParams, SmallClasses, describe
from mlpipe.errors import UserError
from mlpipe.models.architectures import SCALES, find
from mlpipe.recipes import resolve

NETWORK_SETTINGS = (
    "learning_rate",
    "weight_decay",
    "label_smoothing",
    "batch_size",
    "augmentation",
    "mixing",
    "optimizer",
    *SCALES,
)
LINEAR_SETTINGS = ("inverse_regularization", "num_components")


def as_of_run(name: str, **changes: Any) -> Any:
    """A field with the title and the limits that the form of a run gives it; `changes` are metadata."""
    known = RunParams.__dataclass_fields__[name]
    return field(default=known.default, metadata={**known.metadata, **changes})


@dataclass(frozen=True, kw_only=True)
class TuneParams(Form):
    """A user's choices for a search."""

    sections: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "How to search": ("epochs", "workers", "pruning", "minutes", "study", "seeds", "seed"),
        "Images": ("name", "image_size", "validation_fraction", "max_damaged", "small_classes"),
    }

    dataset: str = as_of_run("dataset")
    data_uri: str | None = as_of_run(
        "data_uri",
        description="Path, file://, http(s):// or s3:// address of a zip, a tar or a folder. Required for images.",
    )
    recipe: RecipeName = describe(
        "quick", "Recipe", "The first trial has its settings. Settings that are not varied keep its values."
    )
    model: str = describe(
        "custom_cnn",
        "Model",
        "One model, with optional initial weights: custom_cnn, logistic_regression, resnet18=imagenet, …",
        maxLength=1024,
        examples=["custom_cnn", "logistic_regression", "hog_logistic_regression", "resnet18=random"],
    )
    vary: str | None = describe(
        None,
        "Vary",
        f"Comma-separated settings to vary. Networks: {', '.join(NETWORK_SETTINGS)}; empty: the first three. Linear "
        f"models: {', '.join(LINEAR_SETTINGS)}; empty: both.",
        maxLength=512,
    )
    trials: int = describe(20, "Trials", "Number of new trials, including pruned ones.", minimum=2, maximum=1000)
    minutes: float | None = describe(
        None,
        "Minutes",
        "No trial begins later than this many minutes after the search began. Empty: no limit.",
        exclusiveMinimum=0,
        maximum=100_000,
    )
    workers: int = describe(
        2, "Workers", "Number of parallel trials; each takes a slot of the executor gpu.", minimum=1, maximum=64
    )
    epochs: int | None = as_of_run(
        "epochs", description="Passes over the training images in each trial. Empty: the recipe's."
    )
    pruning: bool = describe(
        True, "Pruning", "Stop a trial early if others were better at the same epoch (successive halving)."
    )
    study: str | None = describe(
        None,
        "Study",
        "Name of the search. An existing search is continued. Empty: a new search, named after data set, model and DAG "
        "run.",
        pattern="^[a-z0-9][a-z0-9_.-]{0,79}$",
        maxLength=80,
    )
    seeds: int = describe(
        3,
        "Seeds",
        "Number of fresh seeds with which the best settings are trained again. These models are tested and registered.",
        minimum=1,
        maximum=8,
    )
    name: str | None = as_of_run(
        "name", description="Name of the data set. Empty: digits, cifar10, or the name of the archive or folder."
    )
    image_size: int | None = as_of_run("image_size")
    validation_fraction: float = as_of_run("validation_fraction")
    max_damaged: float = as_of_run(
        "max_damaged",
        description="Largest allowed share of damaged images, from 0 to 1. 0: a single damaged image fails the run.",
    )
    small_classes: SmallClasses = as_of_run("small_classes")
    seed: int = as_of_run("seed", description="Seed of the search and of each trial's training.")

    def run_params(self) -> RunParams:
        """The run whose settings are varied."""
        return RunParams(models=self.model, **{name: getattr(self, name) for name in self.fields_of_run()})

    @classmethod
    def fields_of_run(cls) -> tuple[str, ...]:
        """The fields that the form of a run has too."""
        return tuple(each.name for each in fields(cls) if each.name in RunParams.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class Search:
    """A complete search."""

    run: RunConfig
    model: ModelConfig
    """With the recipe's settings, which are the first trial."""
    vary: tuple[str, ...]
    study: str
    trials: int
    minutes: float | None
    workers: int
    pruning: bool
    seeds: int
    seed: int


def resolve_search(params: TuneParams, dag_run_id: str) -> Search:
    """
    Raises:
        UserError: there is not one model, or a setting that is to be varied is none of it.
    """
    run = resolve(params.run_params())
    if len(run.models) != 1:
        raise UserError(f"model: {params.model[:80]!r} names {len(run.models)} models; give one")
    model = run.models[0]
    known = NETWORK_SETTINGS if isinstance(model.train, NetworkSettings) else LINEAR_SETTINGS
    default = known[:3] if known is NETWORK_SETTINGS else known
    vary = tuple(part.strip() for part in params.vary.split(",") if part.strip()) if params.vary else default
    if wrong := [name for name in vary if name not in known]:
        raise UserError(f"vary: {', '.join(wrong)} is not allowed for {model.name}; give some of {', '.join(known)}")
    if lacking := [scale for scale in SCALES if scale in vary and find(model.architecture).surely_lacks(scale)]:
        raise UserError(
            f"vary: {lacking[0]} is not allowed for {model.name}, which has one {lacking[0]}; vary other settings"
        )
    named = re.sub(r"[^a-z0-9_.-]+", "-", f"{run.data.name}-{model.name}".lower())[:70]
    named += f"-{hashlib.sha256(dag_run_id.encode()).hexdigest()[:8]}"
    return Search(
        run=run,
        model=model,
        vary=vary,
        study=params.study or named,
        trials=params.trials,
        minutes=params.minutes,
        workers=params.workers,
        pruning=params.pruning,
        seeds=params.seeds,
        seed=params.seed,
    )
