"""The form of a search. Only the standard library is loaded: Airflow reads it whenever it parses the DAG."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mlpipe.config import Form, ModelConfig, NetworkSettings, RecipeName, RunConfig, RunParams, SmallClasses, describe
from mlpipe.data.sources import catalog
from mlpipe.errors import UserError
from mlpipe.recipes import resolve

NETWORK_SETTINGS = ("learning_rate", "weight_decay", "label_smoothing", "batch_size", "augmentation", "optimizer")
LINEAR_SETTINGS = ("inverse_regularization", "num_components")


@dataclass(frozen=True, kw_only=True)
class TuneParams(Form):
    """A user's choices for a search."""

    sections: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "How to search": ("epochs", "workers", "pruning", "minutes", "study", "seeds", "seed"),
        "Images": ("name", "image_size", "max_damaged", "small_classes"),
    }

    dataset: str = describe(
        "digits",
        "Data set",
        " ".join(f"{source.name}: {source.description}." for source in catalog.KNOWN),
        enum=[source.name for source in catalog.KNOWN],
    )
    data_uri: str | None = describe(
        None,
        "Data URI",
        "Path, file://, http(s):// or s3:// address of a zip, a tar or a folder. Required for images.",
        maxLength=2048,
    )
    recipe: RecipeName = describe(
        "quick", "Recipe", "Whose settings are the first trial, and stay where none is varied."
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
        f"Comma-separated settings: {', '.join(NETWORK_SETTINGS)}; of linear models {', '.join(LINEAR_SETTINGS)}. "
        "Empty: learning_rate, weight_decay and label_smoothing; inverse_regularization and num_components.",
        maxLength=512,
    )
    trials: int = describe(20, "Trials", "Trainings to make, pruned ones included.", minimum=2, maximum=1000)
    minutes: float | None = describe(
        None, "Minutes", "No trial begins after so many minutes. Empty: no limit.", exclusiveMinimum=0, maximum=100_000
    )
    workers: int = describe(
        2, "Workers", "Trials side by side, each on a slot of the executor gpu.", minimum=1, maximum=64
    )
    epochs: int | None = describe(
        None, "Epochs", "Passes over the training images in each trial. Empty: the recipe's.", minimum=1, maximum=1000
    )
    pruning: bool = describe(True, "Pruning", "Stop a trial early where others were better at the same epoch.")
    study: str | None = describe(
        None,
        "Study",
        "Name of the search; an existing one is continued. Empty: a new one, named after data set, model and DAG run.",
        pattern="^[a-z0-9][a-z0-9_.-]{0,79}$",
        maxLength=80,
    )
    seeds: int = describe(
        3,
        "Seeds",
        "Trainings of the best settings on fresh seeds, which are tested and registered.",
        minimum=1,
        maximum=8,
    )
    name: str | None = describe(
        None,
        "Name",
        "Name of the data set. Empty: digits, cifar10, or the name of the archive or folder.",
        pattern="^[a-z0-9][a-z0-9_-]{0,47}$",
        maxLength=48,
    )
    image_size: int | None = describe(
        None,
        "Image size",
        "Height and width of all images after resizing, in pixels. Empty: 32.",
        minimum=8,
        maximum=512,
    )
    max_damaged: float = describe(
        0.01, "Damaged images", "Largest allowed share of unusable images. 0 refuses any.", minimum=0, maximum=1
    )
    small_classes: SmallClasses = describe("refuse", "Small classes", "As of image_classification.")
    seed: int = describe(0, "Seed", "Of the search, and of the trials' trainings.", minimum=0, maximum=2**31 - 1)

    def run_params(self) -> RunParams:
        """The run whose settings are varied."""
        return RunParams(
            dataset=self.dataset,
            data_uri=self.data_uri,
            name=self.name,
            recipe=self.recipe,
            models=self.model,
            epochs=self.epochs,
            image_size=self.image_size,
            max_damaged=self.max_damaged,
            small_classes=self.small_classes,
            seed=self.seed,
        )


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
    named = re.sub(r"[^a-z0-9_.-]+", "-", f"{run.data.name}-{model.name}-{dag_run_id}".lower())[:80]
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
