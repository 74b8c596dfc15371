"""Recipes: named sets of models and settings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar
from urllib.parse import unquote

from mlpipe.addresses import redact_address, redact_text, redact_uri
from mlpipe.config import (
    MAX_MODELS,
    MODEL_NAME,
    DataConfig,
    LinearSettings,
    ModelConfig,
    NetworkSettings,
    PromotionConfig,
    RecipeName,
    RunConfig,
    RunParams,
    given,
)
from mlpipe.data.sources import catalog
from mlpipe.errors import UserError
from mlpipe.models.architectures import OWN_FILE, RESNETS, SCALES, TIMM, Architecture, find
from mlpipe.training.optimizers import check_optimizer

Settings = TypeVar("Settings", NetworkSettings, LinearSettings)

MAX_SMALL_IMAGE = 64
"""Largest height and width of small images, pixels."""
MIN_LARGE_IMAGE = 96
"""Smallest height and width of images that pretrained networks do not enlarge, pixels."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A set of models and their training settings."""

    models: str
    """Names with optional initial weights, as in the form field."""
    default_weights: str
    """Initial weights of networks without given weights."""
    network: NetworkSettings
    """Settings of every network."""
    linear: LinearSettings = field(default_factory=LinearSettings)
    """Settings of every linear model."""
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of single networks with random weights; these override `network`."""
    pretrained: Mapping[str, Any] = field(default_factory=dict)
    """Settings of networks with other initial weights; these override `network`."""
    pretrained_input_size: int | None = None
    """Height and width to which pretrained networks enlarge their images, pixels."""
    small_images_variants: bool = False
    """Whether networks with random weights use their form for small images, if they have one."""


RECIPES: dict[RecipeName, Recipe] = {
    "quick": Recipe(
        models="custom_cnn,logistic_regression,resnet18",
        default_weights="random",
        network=NetworkSettings(num_epochs=5, batch_size=64, schedule="one_cycle", learning_rate=3e-3),
        overrides={
            "custom_cnn": {
                "batch_size": 128,
                "optimizer": "muon",
                "learning_rate": 0.04,
                "progressive_resizing": True,
            },
        },
    ),
    "report": Recipe(
        models="custom_cnn,logistic_regression,resnet18",
        default_weights="imagenet",
        network=NetworkSettings(num_epochs=10, batch_size=64, learning_rate=1e-3, optimizer="adam"),
    ),
    "strong": Recipe(
        models="custom_cnn,logistic_regression,hog_logistic_regression,resnet18",
        default_weights="random",
        network=NetworkSettings(
            num_epochs=10,
            batch_size=128,
            min_steps=20,
            optimizer="sgd",
            learning_rate=0.1,
            weight_decay=5e-4,
            schedule="one_cycle",
            label_smoothing=0.1,
            augmentation="flip_crop",
            test_time_averaging="flip",
        ),
        linear=LinearSettings(num_components=512, inverse_regularization=1e-3, augmentation="flip"),
        overrides={
            **{
                resnet: {
                    "batch_size": 256,
                    "optimizer": "muon",
                    "learning_rate": 0.07,
                    "weight_decay": 0.1,
                    "progressive_resizing": True,
                    "test_time_averaging": "flip_shift",
                }
                for resnet in RESNETS
            },
            "custom_cnn": {
                "num_epochs": 8,
                "batch_size": 512,
                "min_steps": 10,
                "optimizer": "normalized_muon",
                "learning_rate": 0.16,
                "weight_decay": 0.006,
                "schedule": "linear",
                "augmentation": "flip_crop_color",
                "test_time_averaging": "flip_shift",
                "precise_batch_norm": True,
            },
        },
        small_images_variants=True,
        # From the literature, because no ImageNet weights were available: enlarge images below 96×96 to 128×128, no
        # weight decay (Kolesnikov et al., "Big Transfer", ECCV 2020); SGD with Nesterov momentum, batches of 256 and a
        # rate of 0.01 (Kornblith et al., "Do Better ImageNet Models Transfer Better?", CVPR 2019).
        pretrained={"batch_size": 256, "learning_rate": 0.01, "weight_decay": 0.0},
        pretrained_input_size=128,
    ),
}


def resolve(params: RunParams) -> RunConfig:
    """Fill in empty fields from the recipe.

    Raises:
        UserError: the model list is malformed, or fields contradict each other.
    """
    source = catalog.find(params.dataset)
    if source.data_uri == "required" and params.data_uri is None:
        raise UserError(
            f"data_uri: empty, but the data set {source.name!r} needs the address of a zip, a tar or a folder"
        )
    if source.data_uri == "unused" and params.data_uri is not None:
        raise UserError(
            f"data_uri: {redact_text(params.data_uri)!r} is not used by the data set {source.name!r}; "
            "leave it empty, or choose images"
        )
    teachers = _model_addresses(params.teacher, "teacher")
    if len(teachers) > 1:
        raise UserError(f"teacher: {len(teachers)} models are given; give one")
    params = replace(params, teacher=teachers[0] if teachers else None)
    image_size = params.image_size or 32
    return RunConfig(
        recipe=params.recipe,
        data=DataConfig(
            dataset=params.dataset,
            name=params.name or dataset_name(params.dataset, params.data_uri),
            uri=params.data_uri and params.data_uri.strip(),
            image_size=image_size,
            validation_fraction=params.validation_fraction,
            max_damaged=params.max_damaged,
            small_classes=params.small_classes,
        ),
        models=_models(params, image_size),
        compare_with=_model_addresses(params.compare_with, "compare_with"),
        folds=params.folds or 0,
        retrain=params.retrain,
        promotion=PromotionConfig(mode=params.promotion, metric=params.promotion_metric),
        form=given(params.to_mapping()),
    )


def _model_addresses(text: str | None, field_name: str) -> tuple[str, ...]:
    """
    Raises:
        UserError: one is no address of a registered model.
    """
    addresses = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    for address in addresses:
        if not address.startswith("models:/"):
            raise UserError(
                f"{field_name}: {redact_text(address)[:80]!r} is not allowed; give models:/<name>/<version> or "
                "models:/<name>@<alias>"
            )
    return addresses


ARCHIVE_SUFFIX = re.compile(r"(\.(zip|tar|tgz|tbz2?|txz|gz|bz2|xz))+$", re.IGNORECASE)
MAX_NAME = 48
"""Maximum number of characters in a data set's name."""
OF_THE_FORM = {"seed": "seed", "num_devices": "devices", "teacher": "teacher", "fine_tuning": "fine_tuning"}
"""Settings that the form's field `settings` may not have, and the fields that they have of their own."""
RANGES: Mapping[str, tuple[float, float]] = {
    "num_epochs": (1, 10_000),
    "batch_size": (1, 65_536),
    "min_steps": (1, 1_000_000),
    "width": (0.01, 16),
    "depth": (1, 100),
    "weight_decay": (0, 100),
    "label_smoothing": (0, 0.99),
    "num_components": (1, 100_000),
    "max_iterations": (1, 1_000_000),
    "early_stopping_patience": (1, 10_000),
}
"""Least and largest values of settings."""
ABOVE_ZERO = ("learning_rate", "inverse_regularization")


def dataset_name(dataset: str, data_uri: str | None) -> str:
    """Default name of a data set: `pets` for images at `s3://bucket/Pets.tar.gz`.

    Raises:
        UserError: the address gives no valid name.
    """
    if catalog.find(dataset).data_uri != "required" or data_uri is None:
        return dataset
    last = re.split(r"[?#]", redact_uri(data_uri.strip()))[0].rstrip("/").rsplit("/", 1)[-1]
    name = re.sub(r"[^a-z0-9_]+", "-", ARCHIVE_SUFFIX.sub("", unquote(last)).lower()).strip("-_")[:MAX_NAME]
    if not name:
        raise UserError(f"name: {redact_text(data_uri)[:80]!r} gives the data set no name; set one, like pets")
    return name


def _models(params: RunParams, image_size: int) -> tuple[ModelConfig, ...]:
    recipe = RECIPES[params.recipe]
    if not catalog.find(params.dataset).mirror_images_keep_label:
        recipe = _without_flips(recipe)
    parsed = parse_models(params.models or recipe.models, recipe.default_weights)
    architectures = [architecture for _, architecture, _ in parsed]
    models: list[ModelConfig] = []
    for written, architecture, weights in parsed:
        name = architecture.name
        if architectures.count(architecture) > 1:
            name += f"_{weights_slug(weights)}"
        if name in (model.name for model in models):
            raise UserError(
                f"models: two models would be called {name!r}; leave one out, or rename its class or its weights' file"
            )
        pretrained = weights not in ("random", "none")
        small = recipe.small_images_variants and not pretrained and image_size <= MAX_SMALL_IMAGE
        models.append(
            ModelConfig(
                architecture=written,
                weights=weights,
                name=name,
                variant="small_images" if small and "small_images" in architecture.variants else "standard",
                input_size=recipe.pretrained_input_size if pretrained and image_size < MIN_LARGE_IMAGE else None,
                train=_settings(params, recipe, architecture, pretrained=pretrained),
            )
        )
    _check_all_are_used(params, models)
    _check_devices(params.devices or 1, models)
    return tuple(models)


def _settings(
    params: RunParams, recipe: Recipe, architecture: Architecture, *, pretrained: bool
) -> NetworkSettings | LinearSettings:
    """The recipe's settings; the form's values override them.

    Raises:
        UserError: the settings name an unknown optimizer, or contradict each other.
    """
    more = parse_settings(params.settings)
    if architecture.kind == "estimator":
        return _checked(recipe.linear, {**_of(LinearSettings, more), "seed": params.seed}, architecture.name)
    only_head = pretrained and params.fine_tuning == "head"  # which is fitted at once, on one device
    form = {
        "num_epochs": params.epochs,
        "batch_size": params.batch_size,
        "find_batch_size": (params.find_batch_size and not only_head) or None,
        "find_learning_rate": (params.find_learning_rate and not only_head) or None,
        "min_steps": 1 if params.batch_size else None,
        "learning_rate": params.learning_rate,
        "early_stopping_patience": params.early_stopping,
        "num_devices": None if only_head else params.devices,
        "teacher": None if only_head else params.teacher,
        "fine_tuning": params.fine_tuning if pretrained else None,
        "seed": params.seed,
    }
    chosen = {name: value for name, value in form.items() if value is not None}
    own = recipe.pretrained if pretrained else recipe.overrides.get(architecture.name, {})
    settings = _checked(recipe.network, {**own, **_of(NetworkSettings, more), **chosen}, architecture.name)
    check_optimizer(settings.optimizer)
    for scale in SCALES:
        if (value := getattr(settings, scale)) != 1 and architecture.surely_lacks(scale):
            raise UserError(
                f"{scale}: {value:g} is not allowed for {architecture.name}, which has one {scale}; it is for "
                f"custom_cnn and for networks of your own whose builder takes `{scale}`"
            )
    for finder, value in (("find_batch_size", params.batch_size), ("find_learning_rate", params.learning_rate)):
        if getattr(settings, finder) and value:
            raise UserError(f"{finder}: {finder[5:]} is {value:g} already; leave one of them out")
    if settings.teacher and settings.mixing != "none":
        raise UserError("teacher: it answers unmixed images, so it is not allowed with mixing; leave one of them out")
    return settings


def parse_settings(text: str | None) -> dict[str, Any]:
    """The form's field `settings`.

    Raises:
        UserError: it is no JSON object, or names a setting that no model has.
    """
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f'settings: {text[:80]!r} is not JSON ({error}); write {{"weight_decay": 0.001}}') from None
    known = {each.name for kind in (NetworkSettings, LinearSettings) for each in fields(kind)} - OF_THE_FORM.keys()
    if isinstance(values, dict) and (own := sorted(OF_THE_FORM.keys() & set(values))):
        raise UserError(f"settings: {own[0]} has a field of its own, {OF_THE_FORM[own[0]]}; set it there")
    if not isinstance(values, dict) or not set(values) <= known:
        wrong = ", ".join(sorted(set(values) - known)) if isinstance(values, dict) else text[:80]
        raise UserError(f"settings: {wrong} is unknown; known settings are {', '.join(sorted(known))}")
    return values


def _check_ranges(settings: NetworkSettings | LinearSettings) -> None:
    values = asdict(settings)
    for name in values.keys() & ABOVE_ZERO:
        if not 0 < values[name] < math.inf:
            raise UserError(f"settings: {name}: {values[name]:g} is not allowed; give a number above 0")
    for name in values.keys() & RANGES.keys():
        least, most = RANGES[name]
        if values[name] is not None and not least <= values[name] <= most:
            raise UserError(f"settings: {name}: {values[name]:g} is not allowed; give {least:g} to {most:g}")


def _of(kind: type[NetworkSettings | LinearSettings], values: Mapping[str, Any]) -> dict[str, Any]:
    names = {each.name for each in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _checked(settings: Settings, changes: Mapping[str, Any], model: str) -> Settings:
    """The settings with changes, of which each value has the right type.

    Raises:
        UserError: one has not.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        checked = TypeAdapter(type(settings)).validate_python({**asdict(settings), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        allowed = first["msg"].removeprefix("Input should be ")
        raise UserError(f"settings: {name}: {first['input']!r} is not allowed for {model}; give {allowed}") from None
    _check_ranges(checked)
    return checked


def _check_all_are_used(params: RunParams, models: Sequence[ModelConfig]) -> None:
    """
    Raises:
        UserError: a field was filled in that no model of the run looks at.
    """
    used = {each.name for model in models for each in fields(model.train)}
    if unused := [name for name in parse_settings(params.settings) if name not in used]:
        raise UserError(f"settings: no model of this run has {unused[0]}; leave it out, or add a model that has it")
    networks = [model.train for model in models if isinstance(model.train, NetworkSettings)]
    if params.fine_tuning == "head" and not any(train.fine_tuning == "head" for train in networks):
        raise UserError(
            "fine_tuning: head is for pretrained networks, and none is among the models; write resnet18=imagenet"
        )
    if params.teacher and not any(train.teacher for train in networks):
        raise UserError("teacher: no model of this run learns from one; add a network that trains all its layers")


def _check_devices(num_devices: int, models: Sequence[ModelConfig]) -> None:
    batch_sizes = [model.train.batch_size for model in models if isinstance(model.train, NetworkSettings)]
    if batch_sizes and num_devices * 2 > (smallest := min(batch_sizes)):
        raise UserError(
            f"devices: {num_devices} is not allowed with batches of {smallest} images, since each needs 2 of every "
            f"batch; give at most {smallest // 2}, or a larger batch_size"
        )


def _without_flips(recipe: Recipe) -> Recipe:
    """The recipe for images whose mirror images mean something else, as those of characters do."""
    shifted = "crop" in recipe.network.augmentation
    network = replace(recipe.network, augmentation="crop" if shifted else "none", test_time_averaging="none")
    flips = ("augmentation", "test_time_averaging")
    overrides = {
        name: {setting: value for setting, value in own.items() if setting not in flips}
        for name, own in recipe.overrides.items()
    }
    linear = replace(recipe.linear, augmentation="none")
    return replace(recipe, network=network, overrides=overrides, linear=linear)


def parse_models(text: str, default_weights: str) -> list[tuple[str, Architecture, str]]:
    """Parse `custom_cnn,resnet18=imagenet` into each model's written name, architecture and initial weights.

    Raises:
        UserError: the list is empty or too long, a name is malformed or unknown, or a model has no such weights.
    """
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries or len(entries) > MAX_MODELS:
        raise UserError(
            f"models: {len(entries)} models in {redact_text(text)[:80]!r}; give 1 to {MAX_MODELS}, separated by commas"
        )
    parsed = []
    for position, entry in enumerate(entries):
        name, equals, weights = (part.strip() for part in entry.partition("="))
        if not any(pattern.fullmatch(name) for pattern in (MODEL_NAME, OWN_FILE, TIMM)):
            if any("://" in before for before in entries[:position]):  # it may be part of an address
                raise UserError(
                    f"models: entry {position + 1} of the list is not a model name; write a comma in an address as %2C"
                )
            raise UserError(
                f"models: {redact_text(name)[:80]!r} is not a model name; examples are custom_cnn, "
                "logistic_regression, resnet18, resnet18=random, timm/<name> or mynets.py:TinyNet"
            )
        if equals and not weights:
            raise UserError(f"models: {entry!r} names no weights after '='; give random, imagenet or a URI")
        architecture = find(name)
        if architecture.default_weights == "none" and weights:
            raise UserError(f"models: {redact_text(entry)!r}: {name} has no initial weights; write only {name}")
        weights = weights or architecture.default_weights or default_weights
        if weights == "imagenet" and not architecture.has_imagenet_weights:
            raise UserError(f"models: '{name}=imagenet': no ImageNet weights exist for {name}; use random or a URI")
        parsed.append((name, architecture, weights))
    return parsed


def write_model(architecture: str, weights: str) -> str:
    """An entry of `models`, with its weights whatever the recipe, and without secrets of an address."""
    return architecture if weights == "none" else f"{architecture}={redact_address(weights)}"


def weights_slug(weights: str) -> str:
    """Name part for initial weights: `imagenet`, `random`, or the last part of a URI."""
    last = re.split(r"[?#]", redact_uri(weights))[0].rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^a-z0-9]+", "_", last.lower()).strip("_")[:40] or "weights"
