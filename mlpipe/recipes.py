"""Named runs: what we ran, apart from what exists."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlpipe.config import (
    ESTIMATORS,
    MAX_MODELS,
    MODEL_NAME,
    DataConfig,
    ModelConfig,
    PromotionConfig,
    RecipeName,
    RunConfig,
    RunParams,
    TrainConfig,
)
from mlpipe.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A set of models and the settings that they are trained with."""

    models: str
    """As in the form's field: names with optional initial weights."""
    default_weights: str
    """Initial weights of networks that name none."""
    train: TrainConfig
    """Settings of every model."""
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of single architectures, over `train`."""


RECIPES: dict[RecipeName, Recipe] = {
    "quick": Recipe(
        models="custom_cnn,logistic_regression,resnet18",
        default_weights="random",
        train=TrainConfig(num_epochs=5, batch_size=64, schedule="one_cycle", learning_rate=3e-3),
    ),
    "report": Recipe(
        models="custom_cnn,logistic_regression,resnet18",
        default_weights="imagenet",
        train=TrainConfig(num_epochs=10, batch_size=64, learning_rate=1e-3, optimizer="adam"),
    ),
}


def resolve(params: RunParams) -> RunConfig:
    """Fill in what the user left open from the recipe.

    Raises:
        UserError: the model list is malformed, or fields contradict each other.
    """
    if params.dataset == "images" and params.data_uri is None:
        raise UserError("data_uri: empty, but the data set 'images' needs the address of a zip or tar archive")
    if params.dataset == "digits" and params.data_uri is not None:
        raise UserError(
            f"data_uri: {params.data_uri!r} is not used by the data set 'digits'; leave it empty, or choose images"
        )
    recipe = RECIPES[params.recipe]
    chosen = {
        "num_epochs": params.epochs,
        "batch_size": params.batch_size,
        "learning_rate": params.learning_rate,
        "early_stopping_patience": params.early_stopping,
        "seed": params.seed,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    parsed = parse_models(params.models or recipe.models, recipe.default_weights)
    architectures = [architecture for architecture, _ in parsed]
    models = tuple(
        ModelConfig(
            architecture=architecture,
            weights=weights,
            name=architecture if architectures.count(architecture) == 1 else f"{architecture}_{weights_slug(weights)}",
            train=replace(recipe.train, **{**recipe.overrides.get(architecture, {}), **chosen}),
        )
        for architecture, weights in parsed
    )
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"models: {name!r} is given more than once; each model and its weights may appear once")
    return RunConfig(
        recipe=params.recipe,
        data=DataConfig(dataset=params.dataset, uri=params.data_uri, image_size=params.image_size or 32),
        models=models,
        promotion=PromotionConfig(mode=params.promotion),
    )


def parse_models(text: str, default_weights: str) -> list[tuple[str, str]]:
    """Read `custom_cnn,resnet18=imagenet` into pairs of architecture and initial weights.

    Raises:
        UserError: an empty list, too many models, a malformed name, or weights for an estimator that has none.
    """
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries or len(entries) > MAX_MODELS:
        raise UserError(f"models: {len(entries)} models in {text[:80]!r}; give 1 to {MAX_MODELS}, separated by commas")
    parsed = []
    for entry in entries:
        architecture, equals, weights = (part.strip() for part in entry.partition("="))
        if not MODEL_NAME.fullmatch(architecture):
            raise UserError(
                f"models: {architecture[:80]!r} is not a model name; names are like custom_cnn, logistic_regression, "
                "resnet18 or resnet18=random"
            )
        if equals and not weights:
            raise UserError(f"models: {entry!r} names no weights after '='; give random, imagenet or a URI")
        if architecture in ESTIMATORS:
            if weights:
                raise UserError(f"models: {entry!r}: {architecture} has no initial weights; write {architecture} alone")
            weights = "none"
        elif not weights:
            weights = "random" if architecture == "custom_cnn" else default_weights
        if architecture == "custom_cnn" and weights == "imagenet":
            raise UserError(
                "models: 'custom_cnn=imagenet': no ImageNet weights exist for custom_cnn; use random or a URI"
            )
        parsed.append((architecture, weights))
    return parsed


def weights_slug(weights: str) -> str:
    """A name part for initial weights: `imagenet`, `random`, or the last part of a URI."""
    last = weights.split("#")[0].rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^a-z0-9]+", "_", last.lower()).strip("_")[:40] or "weights"
