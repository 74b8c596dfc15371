"""The run's form, and the validated configuration that the stages use.

`RunParams` is the single source of the trigger form, the command-line options and their checks.
`mlpipe.recipes.resolve` turns it into a complete `RunConfig`.
Airflow loads this module each time it parses the DAG, so it imports only the standard library.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from mlpipe.addresses import redact_address, redact_models, redact_text
from mlpipe.data.sources import catalog
from mlpipe.errors import UserError

RecipeName = Literal["quick", "report", "strong"]
PromotionMode = Literal["disabled", "dry_run", "enabled"]
PromotionMetric = Literal["accuracy", "balanced_accuracy"]
FineTuning = Literal["all", "head"]
Augmentation = Literal["none", "crop", "flip", "flip_crop", "flip_crop_color", "trivial"]
Mixing = Literal["none", "mixup", "cutmix"]
SmallClasses = Literal["refuse", "leave_out"]
Variant = Literal["standard", "small_images"]
"""standard: as published. small_images: for about 32 pixels; custom_cnn becomes a network after airbench94;
torchvision's resnets begin with a 3×3 convolution without stride and halve their maps by pooling."""

MODEL_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
MAX_MODELS = 16


def describe(default: Any, title: str, description: str, **limits: Any) -> Any:
    """A form field: JSON-schema keywords (`minimum`, `maximum`, `pattern`, …) go into `limits`."""
    return field(default=default, metadata={"title": title, "description": description, **limits})


@dataclass(frozen=True, kw_only=True)
class Form:
    """Fields that a user fills in: in Airflow's form, a JSON body or a command line."""

    sections: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Sections of the form, folded until the user opens them. Fields in no section say what to run."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Check values from a form, a JSON body or a command line.

        Raises:
            UserError: a key is unknown, or a value has the wrong type or is out of range; the message names the
                field, the value and what is allowed.
        """
        known = cls.json_schema()
        for key in values:
            if key not in known:
                raise UserError(f"{key}: unknown parameter; known parameters are {', '.join(known)}")
        return cls(**{key: _checked(key, value, known[key]) for key, value in values.items()})

    @classmethod
    def json_schema(cls) -> dict[str, dict[str, Any]]:
        """JSON schema and default of each field, as the arguments of an Airflow `Param`."""
        hints = get_type_hints(cls)
        return {
            f.name: {"default": f.default, **cls._section(f.name), **_schema_of(hints[f.name]), **f.metadata}
            for f in fields(cls)
        }

    def run_params(self) -> RunParams:
        """The run that the form is about."""
        raise NotImplementedError

    def to_mapping(self) -> dict[str, Any]:
        """The inverse of `from_mapping`."""
        return asdict(self)

    @classmethod
    def _section(cls, field_name: str) -> dict[str, str]:
        return next(({"section": title} for title, names in cls.sections.items() if field_name in names), {})


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a form's values those that are not empty, to be shown: addresses are without login and query."""
    redacted = {"models": redact_models, "model": redact_models, "data_uri": redact_address}
    return {
        name: redacted.get(name, redact_text)(value) if isinstance(value, str) else value
        for name, value in values.items()
        if value is not None
    }


@dataclass(frozen=True, kw_only=True)
class RunParams(Form):
    """A user's choices for a run. `None`: the recipe or the data set decides."""

    sections: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "How to train": (
            "epochs",
            "batch_size",
            "learning_rate",
            "find_batch_size",
            "find_learning_rate",
            "early_stopping",
            "settings",
            "fine_tuning",
            "teacher",
            "devices",
            "seed",
            "folds",
            "retrain",
        ),
        "Images and promotion": (
            "image_size",
            "validation_fraction",
            "max_damaged",
            "small_classes",
            "compare_with",
            "promotion",
            "promotion_metric",
        ),
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
        "Path, file://, http(s):// or s3:// address of a zip, a tar or a folder (s3://bucket/folder/) with <class>/…, "
        "train/<class>/… and test/<class>/…, or images and a CSV. Required for images.",
        maxLength=2048,
    )
    name: str | None = describe(
        None,
        "Name",
        "Name of the data set, also used for its experiment, registered model and asset. "
        "Empty: digits, cifar10, or the name of the archive or folder.",
        pattern="^[a-z0-9][a-z0-9_-]{0,47}$",
        maxLength=48,
    )
    recipe: RecipeName = describe(
        "quick",
        "Recipe",
        "quick: minutes on a laptop, offline, random weights. report: a plain baseline: Adam, learning rate 0.001, 10 "
        "epochs, resnet18 from ImageNet weights. strong: best accuracy in ten epochs on photographs.",
    )
    models: str | None = describe(
        None,
        "Models",
        "Comma-separated names, each with optional initial weights: custom_cnn, logistic_regression, resnet18=random, "
        "resnet18=imagenet, any torchvision classification network, e.g. efficientnet_b0=s3://bucket/weights.pth, any "
        "network of timm as timm/<name>, or your own network, e.g. /home/me/mynets.py:TinyNet. Empty: custom_cnn, "
        "logistic_regression and resnet18; with strong also hog_logistic_regression.",
        maxLength=4096,
        examples=[
            "custom_cnn",
            "custom_cnn,logistic_regression,resnet18=random",
            "custom_cnn,resnet18=imagenet",
            "resnet18=imagenet,resnet18=random",
            "efficientnet_b0=imagenet",
            "hog_logistic_regression,logistic_regression",
        ],
    )
    epochs: int | None = describe(
        None,
        "Epochs",
        "Passes over the training images. Empty: 5 (quick), 10 (report), 10 (strong; custom_cnn 8).",
        minimum=1,
        maximum=1000,
    )
    batch_size: int | None = describe(
        None,
        "Batch size",
        "Images in one optimizer step. Empty: 64 (report), 64 (quick; custom_cnn 128), 128 (strong; custom_cnn 512, "
        "resnets and pretrained networks 256). Small data sets get smaller batches with strong, so that an epoch has "
        "at least 20 steps (custom_cnn: 10).",
        minimum=2,
        maximum=4096,
    )
    learning_rate: float | None = describe(
        None,
        "Learning rate",
        "Step size of the optimizer; with a schedule, its peak. Empty: 0.001 (report), 0.003 (quick; custom_cnn 0.04), "
        "0.1 (strong; custom_cnn 0.16, resnets 0.07, pretrained networks 0.01).",
        exclusiveMinimum=0,
        maximum=10,
    )
    find_batch_size: bool = describe(
        False,
        "Find batch size",
        "Each network trains with the largest batch that fits into half of the memory: a power of two, at most 4096 "
        "(on each GPU), of which an epoch has at least ten.",
    )
    find_learning_rate: bool = describe(
        False,
        "Find learning rate",
        "Before training, a copy of each network takes up to 100 steps with growing learning rates. The network then "
        "trains with the rate at which the loss fell fastest.",
    )
    early_stopping: int | None = describe(
        None,
        "Early stopping",
        "Training stops after this many epochs without a better validation accuracy. Empty: never.",
        minimum=1,
        maximum=1000,
    )
    image_size: int | None = describe(
        None,
        "Image size",
        "Height and width of all images after resizing, in pixels. Empty: 32.",
        minimum=8,
        maximum=512,
    )
    validation_fraction: float = describe(
        0.1,
        "Validation fraction",
        "Share of the training images held out to choose the epoch and to calibrate the probabilities. Not used if the "
        "data set has validation images of its own.",
        minimum=0.01,
        maximum=0.5,
    )
    max_damaged: float = describe(
        0.01,
        "Damaged images",
        "Largest allowed share of damaged images, from 0 to 1. They are left out and listed. 0: a single damaged image "
        "fails the run.",
        minimum=0,
        maximum=1,
    )
    small_classes: SmallClasses = describe(
        "refuse",
        "Small classes",
        "What to do with classes that have too few images, or that train/ or test/ lacks. refuse: the run fails and "
        "names them. leave_out: the data set excludes them.",
    )
    devices: int | None = describe(
        None,
        "Devices",
        "Devices that train one network together: GPUs of one host or, without GPUs, processes. Empty: 1.",
        minimum=1,
        maximum=64,
    )
    settings: str | None = describe(
        None,
        "Settings",
        'Further settings as JSON, e.g. {"weight_decay": 0.001, "label_smoothing": 0.1}. They override the recipe. '
        "`mlpipe tune` searches for good ones. Empty: none.",
        maxLength=4096,
    )
    fine_tuning: FineTuning = describe(
        "all",
        "Fine-tuning",
        "Layers of pretrained networks that are trained. all: every layer. head: only a new last layer; the features "
        "before it are computed in one pass over the images and kept.",
    )
    teacher: str | None = describe(
        None,
        "Teacher",
        "models:/<name>/<version> or models:/<name>@<alias> of a network with the same classes. The networks of this "
        "run learn from its predictions in addition to the labels (distillation). Empty: none.",
        maxLength=512,
    )
    seed: int = describe(
        0, "Seed", "Seeds initial weights, batch order and augmentation.", minimum=0, maximum=2**31 - 1
    )
    folds: int | None = describe(
        None,
        "Folds",
        "k of a k-fold cross-validation in addition to the usual training: each model is trained k more times, each "
        "time without one fold of the training and validation images, and measured on it. For small data sets. "
        "Empty: none.",
        minimum=2,
        maximum=20,
    )
    retrain: bool = describe(
        False,
        "Retrain",
        "Train every model, even if a registered version has the same data, settings, seed, code and libraries. If "
        "off, that version is compared instead.",
    )
    compare_with: str | None = describe(
        None,
        "Compare with",
        "Comma-separated models:/<name>/<version> or models:/<name>@<alias>. These models are tested on the same "
        "images without training. Empty: none.",
        maxLength=2048,
    )
    promotion: PromotionMode = describe(
        "enabled",
        "Promotion",
        "disabled: no alias moves. dry_run: no alias moves, but the decision is logged. "
        "enabled: the best model becomes @champion if it passes the gate.",
    )
    promotion_metric: PromotionMetric = describe(
        "accuracy",
        "Promotion metric",
        "The gate's metric. balanced_accuracy weights all classes equally, however many images they have.",
    )

    def run_params(self) -> RunParams:
        """The form itself."""
        return self


_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
_WORDS = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}


def _schema_of(hint: Any) -> dict[str, Any]:
    if get_origin(hint) is Literal:
        return {"type": "string", "enum": list(get_args(hint))}
    if get_origin(hint) in (Union, types.UnionType):
        members = [_JSON_TYPES[member] for member in get_args(hint) if member is not type(None)]
        return {"type": ["null", *members]}
    return {"type": _JSON_TYPES[hint]}


def _allowed(schema: Mapping[str, Any]) -> str:
    if "pattern" in schema:
        return (
            f"text of at most {schema['maxLength']} characters a-z, 0-9, _ and -, "
            "starting with a letter or digit, or nothing"
        )
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    text = _WORDS[names[-1]]
    if "exclusiveMinimum" in schema:
        text += f" above {schema['exclusiveMinimum']}"
    elif "minimum" in schema:
        text += f" from {schema['minimum']}"
    if "maximum" in schema:
        text += f" {'and at most' if 'exclusiveMinimum' in schema else 'to'} {schema['maximum']}"
    if "maxLength" in schema:
        text += f" of at most {schema['maxLength']} characters"
    return f"{text}, or nothing" if "null" in names else text


def _checked(key: str, value: Any, schema: Mapping[str, Any]) -> Any:
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if isinstance(value, str) and not value.strip() and "null" in names:
        value = None  # an emptied text field of the form
    if value is None and "null" in names:
        return None
    if "number" in names and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    expected = {"string": str, "integer": int, "number": float, "boolean": bool}[names[-1]]
    good = isinstance(value, expected) and isinstance(value, bool) == (expected is bool)
    if good and "enum" in schema:
        good = value in schema["enum"]
    if good and "pattern" in schema:
        good = re.fullmatch(schema["pattern"], value) is not None
    if good and "maxLength" in schema:
        good = len(value) <= schema["maxLength"]
    if good and "exclusiveMinimum" in schema:
        good = value > schema["exclusiveMinimum"]
    if good and "minimum" in schema:
        good = value >= schema["minimum"]
    if good and "maximum" in schema:
        good = value <= schema["maximum"]
    if not good:
        shown = redact_text(repr(value))
        raise UserError(
            f"{key}: {shown if len(shown) <= 80 else shown[:77] + '...'} is not allowed; give {_allowed(schema)}"
        )
    return value


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images and their preparation. This and the source's bytes determine the data set's digest."""

    dataset: str
    """Kind of source, a name of `mlpipe.data.sources.catalog.KNOWN`."""
    name: str = ""
    """Name of the data set, its MLflow experiment, registered model and asset; empty: the kind of source."""
    uri: str | None = None
    """Address of the archive or folder; `None`: the data set's own source."""
    image_size: int = 32
    """Height and width of the prepared images, pixels."""
    validation_fraction: float = 0.1
    """Share of the training images held out to choose checkpoints; file hashes decide."""
    test_fraction: float = 0.2
    """Share of all images that becomes the test split if the source has none; file hashes decide."""
    split_seed: int = 0
    """Seed of both splits; separate from the run's seed, so runs with different seeds use the same data."""
    max_damaged: float = 0.01
    """Largest allowed share of unusable images, 0 to 1; they are left out."""
    small_classes: SmallClasses = "refuse"
    """How to treat classes with too few images, or present in only one of train and test."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.dataset)


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Settings for training a network."""

    num_epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 64
    """Images in one optimizer step."""
    min_steps: int = 1
    """Least number of optimizer steps in an epoch; batches of a small data set are smaller for it."""
    learning_rate: float = 1e-3
    """Step size; the peak, if a schedule varies it."""
    find_batch_size: bool = False
    """Whether the largest batch that takes half of the memory replaces `batch_size`."""
    find_learning_rate: bool = False
    """Whether a range test around `learning_rate` replaces it before the training."""
    optimizer: str = "adam"
    """Update rule: a key of `mlpipe.training.optimizers.OPTIMIZERS`."""
    weight_decay: float = 0.0
    """Coefficient of the L2 penalty; with muon, each step shrinks a convolution's weights by this share times the
    learning rate."""
    schedule: Literal["constant", "one_cycle", "linear"] = "constant"
    """Course of the learning rate over the steps; linear: it falls to 0."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes, 0 to 1."""
    augmentation: Augmentation = "none"
    """Changes of the training images: shifted crop, horizontal flip, or both; flip_crop_color: both, and a little
    brightness and contrast; trivial: both, and one random change of color or geometry, torchvision's
    TrivialAugmentWide."""
    mixing: Mixing = "none"
    """Whether training images are blended with others of their batch, labels alike: whole (mixup) or a rectangle
    (cutmix), as torchvision does it."""
    test_time_averaging: Literal["none", "flip", "flip_shift"] = "none"
    """Predictions average the probabilities of an image and its mirror image (flip), and of both when shifted by a
    pixel, down and right or up and left (flip_shift)."""
    precise_batch_norm: bool = False
    """Whether the last epoch ends with batch normalization's means and variances measured anew."""
    progressive_resizing: bool = False
    """Whether the first half of the epochs trains on images at half height and width."""
    early_stopping_patience: int | None = None
    """Training stops after this many epochs without a better val/accuracy; `None`: never."""
    fine_tuning: FineTuning = "all"
    """Layers of a pretrained network that are trained; head: the last one, on features that are computed once."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the classes in the loss; balanced: inverse to their numbers of training images."""
    teacher: str | None = None
    """`models:/…` address of a network whose answers are learned beside the labels; `None`: none."""
    width: float = 1.0
    """Multiple of the network's numbers of channels; for custom_cnn, and for networks whose builder takes `width`."""
    depth: int = 1
    """Multiple of the number of convolutions in each stage; for custom_cnn, and for networks whose builder takes
    `depth`."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """Arithmetic; auto: bfloat16 if the processor has it in hardware."""
    num_devices: int = 1
    """GPUs of one host, or processes without a GPU, that train together; they share each batch."""
    seed: int = 0
    """Seed of initial weights, batch order and augmentation."""


@dataclass(frozen=True, kw_only=True)
class LinearSettings:
    """Settings for fitting a linear model."""

    num_components: int = 256
    """Maximum number of the features' principal components."""
    inverse_regularization: float = 1.0
    """scikit-learn's C: smaller values mean a stronger L2 penalty."""
    max_iterations: int = 100
    """Iteration limit of the solver."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the classes; balanced: inverse to their numbers of training images."""
    augmentation: Literal["none", "flip"] = "none"
    """flip: fit the model to each training image and its mirror image."""
    seed: int = 0
    """Seed of the random projections, the solver, and the choice among too many images."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model of a run."""

    architecture: str
    """Argument of `mlpipe.models.architectures.find`: custom_cnn, resnet18, or /path/mynets.py:TinyNet."""
    weights: str
    """Initial weights: random, imagenet, a URI; none for estimators, which have no initial weights."""
    name: str
    """Unique in the run: the architecture, or architecture and weights if an architecture runs twice."""
    variant: Variant = "standard"
    """Form of the network; `models:/…` weights set their own."""
    input_size: int | None = None
    """Height and width to which the network enlarges its images, pixels; `None`: the stored size."""
    train: NetworkSettings | LinearSettings
    """Training settings of the network or estimator."""


@dataclass(frozen=True, kw_only=True)
class PromotionConfig:
    """Rules for making a run's best model the champion."""

    mode: PromotionMode = "enabled"
    """disabled, dry_run (decide and log) or enabled (decide, log and move the alias)."""
    metric: PromotionMetric = "accuracy"
    """Metric of the comparison, on the test images."""
    min_accuracy_over_chance: float = 0.05
    """The metric must exceed that of the best constant answer by this much, 0 to 1."""
    min_improvement: float = 0.0
    """It must exceed the current champion's metric on the same images by more than this, 0 to 1."""
    significance: float = 0.05
    """The lead's p value must be below this; 1: any lead suffices."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The complete configuration of a run."""

    recipe: RecipeName
    data: DataConfig
    models: tuple[ModelConfig, ...]
    promotion: PromotionConfig
    compare_with: tuple[str, ...] = ()
    """Addresses of registered models that are tested beside this run's."""
    folds: int = 0
    """Parts of the cross-validation of each model; 0: none."""
    retrain: bool = False
    """Whether models are trained that were trained before in the same way."""
    form: Mapping[str, Any] = field(default_factory=dict)
    """What the user filled in, without secrets of addresses; for people to read."""

    def model(self, name: str) -> ModelConfig:
        """The model with this name.

        Raises:
            UserError: no model of the run has this name.
        """
        for model in self.models:
            if model.name == name:
                return model
        raise UserError(f"models: no model is called {name!r}; this run has {', '.join(m.name for m in self.models)}")
