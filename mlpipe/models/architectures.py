"""The registry of models: what each is, known without loading it.

Only the standard library is loaded: Airflow reads this module whenever it parses the DAG, and workers that only
download have no torch. To add a model, write one file that builds it and one entry in `KNOWN`. A network outside of
this project is named by its file (`/home/me/mynets.py:TinyNet`), or by an entry point of an installed package.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from mlpipe.addresses import redact_text
from mlpipe.config import MODEL_NAME, Variant
from mlpipe.errors import UserError

SMALLEST_OF_VARIANTS = 16
"""Height and width from which the variants for small images take any size, pixels."""

SCALES = ("width", "depth")
"""Settings that multiply a network's channels and layers."""

OWN_FILE = re.compile(r"(?P<path>[^=]*\.py):(?P<name>[A-Za-z_][A-Za-z0-9_]*)")
"""A file and the class or function in it that builds a network."""

TIMM = re.compile(r"timm[/_](?P<name>[a-z0-9_]{1,80})")
"""A network of the library timm: `timm/<name>` as it is written, `timm_<name>` as the trained model is called."""

ENTRY_POINTS = "mlpipe.models"
"""Group in which an installed package names the classes or functions that build its networks."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model of the registry."""

    name: str
    """As it is written in `models`, and as the trained model is called."""
    kind: Literal["network", "estimator"]
    """Whether Lightning trains it or scikit-learn fits it."""
    builder: str
    """`module:function`, `module:Class` or `/path/file.py:Class` that makes it.

    A network's is called with those of `num_classes`, `image_size`, `variant`, `width`, `depth` and `architecture` that
    it takes, and returns a module that maps (B, 3, H, W) to (B, num_classes) logits. Its file travels with the logged
    model, so it imports nothing of mlpipe. An estimator's is called with its `LinearSettings`, `num_images` and
    `num_features`, and returns a scikit-learn Pipeline.
    """
    features: str = "mlpipe.models.features.pixels:features"
    """Of an estimator: `module:function` from (B, H, W, 3) uint8 images to (B, D) float32. Its module travels too."""
    default_weights: str | None = "random"
    """What it starts from where `models` names no weights; `None`: what the recipe says; none: it has no weights."""
    has_imagenet_weights: bool = False
    """Whether torchvision or timm has weights for it that were trained on ImageNet."""
    variants: tuple[Variant, ...] = ("standard",)
    """Forms that it has."""
    scales: tuple[str, ...] = ()
    """Of `SCALES`, those that can be other than 1; of networks of others, their builders tell."""
    takes_any_image_size: bool = False
    """Whether all sizes that the form allows are fine. Otherwise it is built and asked, which loads torch."""
    outline: Literal["meta", "cpu"] = "cpu"
    """Device on which its shapes are found. On meta that takes no memory and no time, but its constructor may not
    compute with tensors."""
    distribution: str | None = None
    """Installed package, with its version, that the network is of: `mynets==1.0`."""

    @property
    def own_file(self) -> Path | None:
        """The user's file that builds it; `None` for a network of this project or of an installed package."""
        path = self.builder.rpartition(":")[0]
        return Path(path) if path.endswith(".py") else None

    def surely_lacks(self, scale: str) -> bool:
        """Whether it is known, without building the model, to have one width or one depth alone."""
        return self.is_of_project and scale not in self.scales

    @property
    def is_of_project(self) -> bool:
        """Whether its code is this project's."""
        return self.builder.startswith("mlpipe.")

    @property
    def code(self) -> str:
        """`module:name` of what travels with a logged model."""
        return self.builder if self.kind == "network" else self.features

    def surely_takes(self, image_size: int, variant: Variant) -> bool:
        """Whether images of that height and width, in pixels, are known to be fine without building the model."""
        return self.takes_any_image_size and (variant == "standard" or image_size >= SMALLEST_OF_VARIANTS)


TORCHVISION = (
    "alexnet", "convnext_base", "convnext_large", "convnext_small", "convnext_tiny", "densenet121", "densenet161",
    "densenet169", "densenet201", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3",
    "efficientnet_b4", "efficientnet_b5", "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_l",
    "efficientnet_v2_m", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "mnasnet0_75",
    "mnasnet1_0", "mnasnet1_3", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "regnet_x_16gf",
    "regnet_x_1_6gf", "regnet_x_32gf", "regnet_x_3_2gf", "regnet_x_400mf", "regnet_x_800mf", "regnet_x_8gf",
    "regnet_y_128gf", "regnet_y_16gf", "regnet_y_1_6gf", "regnet_y_32gf", "regnet_y_3_2gf", "regnet_y_400mf",
    "regnet_y_800mf", "regnet_y_8gf", "resnet101", "resnet152", "resnet18", "resnet34", "resnet50",
    "resnext101_32x8d", "resnext101_64x4d", "resnext50_32x4d", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5", "shufflenet_v2_x2_0", "squeezenet1_0", "squeezenet1_1", "swin_b", "swin_s", "swin_t",
    "swin_v2_b", "swin_v2_s", "swin_v2_t", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19",
    "vgg19_bn", "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32", "wide_resnet101_2", "wide_resnet50_2",
)  # fmt: skip
"""As `torchvision.models.list_models(module=torchvision.models)`, which a test holds."""


RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
"""Those of torchvision's networks that have a form for small images."""


def _of_torchvision(name: str) -> Architecture:
    return Architecture(
        name=name,
        kind="network",
        builder="mlpipe.models.networks.torchvision_networks:build",
        default_weights=None,
        has_imagenet_weights=True,
        variants=("standard", "small_images") if name in RESNETS else ("standard",),
        takes_any_image_size=name == "resnet18",
        outline="cpu" if name.startswith("regnet_") else "meta",  # regnets compute their widths with tensors
    )


KNOWN: tuple[Architecture, ...] = (
    Architecture(
        name="custom_cnn",
        kind="network",
        builder="mlpipe.models.networks.custom_cnn:build",
        variants=("standard", "small_images"),
        scales=SCALES,
        takes_any_image_size=True,
        outline="meta",
    ),
    Architecture(
        name="hog_logistic_regression",
        kind="estimator",
        builder="mlpipe.models.estimators.logistic_regression:build",
        features="mlpipe.models.features.oriented_gradients:features",
        default_weights="none",
        takes_any_image_size=True,
    ),
    Architecture(
        name="logistic_regression",
        kind="estimator",
        builder="mlpipe.models.estimators.logistic_regression:build",
        default_weights="none",
        takes_any_image_size=True,
    ),
    *map(_of_torchvision, TORCHVISION),
)
"""All models of this project, and torchvision's classification networks."""


def registered() -> Mapping[str, Architecture]:
    """The registry, by name."""
    return {each.name: each for each in KNOWN}


def find(architecture: str) -> Architecture:
    """The entry of that name, or one made for a file of the user's.

    Args:
        architecture: a name of the registry, of an entry point, or `/path/file.py:Class`.

    Raises:
        UserError: there is none.
    """
    if match := OWN_FILE.fullmatch(architecture):
        return _of_file(match["path"], match["name"])
    known = registered()
    if architecture in known:
        return known[architecture]
    if entry := _of_installed_package(architecture):
        return entry
    if match := TIMM.fullmatch(architecture):
        return _of_timm(match["name"])
    near = difflib.get_close_matches(architecture, known, n=3, cutoff=0.5) or ["custom_cnn", "resnet18"]
    own = [name for name in known if name not in TORCHVISION]
    raise UserError(
        f"models: {architecture!r} is unknown; did you mean {' or '.join(near)}? Known are {', '.join(own)} "
        "and torchvision's classification networks (torchvision.models.list_models()), timm's as timm/<name>; "
        f"a network of your own is named by its file (mynets.py:TinyNet) or by an entry point of {ENTRY_POINTS}"
    )


def _of_file(path: str, class_name: str) -> Architecture:
    name = re.sub(r"[^a-z0-9]+", "_", class_name.lower()).strip("_")
    if "://" in path or not Path(path).is_absolute():
        raise UserError(
            f"models: {redact_text(path)[:80]!r} is not the whole path of a file; give one that every worker can read, "
            f"like /home/me/mynets.py:{class_name}"
        )
    if fault := _fault_of(name):
        raise UserError(f"models: {class_name!r} would be called {name!r}, {fault}; give the class another name")
    return Architecture(name=name, kind="network", builder=f"{path}:{class_name}")


def _of_timm(name: str) -> Architecture:
    return Architecture(
        name=f"timm_{name}",
        kind="network",
        builder="mlpipe.models.networks.timm_networks:build",
        default_weights=None,
        has_imagenet_weights=True,
        distribution=f"timm=={version('timm')}" if find_spec("timm") else None,
    )


def _fault_of(name: str) -> str | None:
    """Why a user's network may not have this name, which is also an alias of its best version; `None`: it may."""
    if name in registered():
        return "which is another model's name"
    if re.fullmatch(r"v\d+|latest|champion", name):
        return "which is an alias with a meaning of its own"
    return None if MODEL_NAME.fullmatch(name) else "which is no name (a letter, then letters, digits and _)"


def _of_installed_package(name: str) -> Architecture | None:
    for point in entry_points(group=ENTRY_POINTS, name=name):
        if fault := _fault_of(name):
            raise UserError(f"models: the entry point {name!r} has a name {fault}; give it another name")
        distribution = f"{point.dist.name}=={point.dist.version.partition('+')[0]}" if point.dist else None
        builder = f"{point.module}:{point.attr}"
        return Architecture(name=name, kind="network", builder=builder, distribution=distribution)
    return None
