"""From an architecture's name to a model that can be trained."""

from __future__ import annotations

import difflib
import inspect

import torch
from torch import nn

from mlpipe.config import ModelConfig, NetworkSettings, Variant
from mlpipe.data.manifest import Manifest
from mlpipe.errors import UserError
from mlpipe.models import architectures, portable
from mlpipe.models.architectures import Architecture
from mlpipe.models.portable import ModelDescription

IMAGE_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 299, 320, 384, 448, 512)
"""Sizes to suggest where a network cannot take the one that was asked for, pixels."""


MAX_ESTIMATOR_IMAGE_SIZE = 32
"""To this size larger images are shrunk for estimators, pixels: more does not help a linear model, and memory grows
with the square."""


def describe(model: ModelConfig, manifest: Manifest) -> ModelDescription:
    """What a model will be when it is trained on a data set; weights to start from may change its form."""
    entry = architectures.find(model.architecture)
    is_network = entry.kind == "network"
    return ModelDescription(
        kind=entry.kind,
        architecture=entry.name,
        classes=manifest.classes,
        image_size=manifest.image_size if is_network else min(manifest.image_size, MAX_ESTIMATOR_IMAGE_SIZE),
        channel_mean=manifest.channel_mean,
        channel_std=manifest.channel_std,
        variant=model.variant,
        width=model.train.width if isinstance(model.train, NetworkSettings) else 1.0,
        depth=model.train.depth if isinstance(model.train, NetworkSettings) else 1,
        input_size=model.input_size,
        test_time_averaging=model.train.test_time_averaging if isinstance(model.train, NetworkSettings) else "none",
        code=entry.code,
        outline=entry.outline,
        file_size=manifest.image_size,
    )


def check_architecture(
    architecture: str, image_size: int | None = None, variant: Variant = "standard", input_size: int | None = None
) -> None:
    """Refuse what cannot be built, before any work is done.

    Args:
        image_size: height and width of the images, pixels; `None` leaves it unchecked.
        input_size: height and width to which the network enlarges them.

    Raises:
        UserError: no such architecture, or one that cannot take images of that size.
    """
    entry = architectures.find(architecture)
    if image_size is None or entry.kind == "estimator":
        return
    if match := architectures.TIMM.fullmatch(entry.name):
        _check_timm(match["name"])
    if not entry.is_of_project:
        _try_out(entry, input_size or image_size, variant)
        return
    if _takes(entry, input_size or image_size, variant):
        return
    nearest = sorted(IMAGE_SIZES, key=lambda size: (size < image_size, abs(size - image_size)))  # larger ones first
    fitting = next((size for size in nearest if _takes(entry, size, variant)), None)
    advice = f"choose image_size {fitting}" if fitting else "choose another network"
    raise UserError(f"image_size: {architecture} cannot take images of {image_size}×{image_size} pixels; {advice}")


def _check_timm(name: str) -> None:
    """
    Raises:
        UserError: timm is not installed, or has no such network.
    """
    try:
        import timm
    except ImportError:
        raise UserError("models: timm/… needs the package timm where tasks train; install it") from None
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"models: timm has no network {name!r}{hint}")


def _takes(entry: Architecture, image_size: int, variant: Variant) -> bool:
    """Try it; on the meta device that is shapes only, no memory, no arithmetic."""
    try:
        with torch.device(entry.outline):
            _build(entry, 2, image_size, variant)(torch.zeros(2, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError):
        return False
    return True


def check_smaller_images(architecture: str, image_size: int, smallest: int, variant: Variant) -> None:
    """See that a network that is built for images of a size can be shown smaller ones.

    Raises:
        UserError: it cannot.
    """
    try:
        outline = outline_network(architecture, 2, image_size, variant)
        with torch.device(architectures.find(architecture).outline):
            outline(torch.zeros(2, 3, smallest, smallest))
    except Exception as error:
        raise UserError(
            f"progressive_resizing: true is not allowed for {architecture} on images of {image_size}×{image_size} "
            f"pixels, for it cannot take the {smallest}×{smallest} that the first epochs show "
            f"({type(error).__name__}: {str(error)[:200]}); set it to false, or choose a larger image_size"
        ) from error


def _try_out(entry: Architecture, image_size: int, variant: Variant) -> None:
    """See that a user's network can be built and does what a network must; whether its file may be read, stages see."""
    try:
        network = _build(entry, 2, image_size, variant)
        shape = tuple(network(torch.zeros(2, 3, image_size, image_size)).shape)
        with torch.inference_mode():
            single = tuple(network.eval()(torch.zeros(1, 3, image_size, image_size)).shape)
    except Exception as error:
        raise UserError(
            f"models: {entry.builder} does not work ({type(error).__name__}: {str(error)[:300]}); it is called with "
            f"num_classes (and image_size, if it takes that), must return an nn.Module that takes "
            f"(B, 3, {image_size}, {image_size}) float32, and its file must import no file beside it"
        ) from error
    for found, number in ((shape, 2), (single, 1)):
        if found != (number, 2):
            raise UserError(
                f"models: {entry.builder} gives {found} for a batch of {number} and 2 classes, not ({number}, 2); "
                "it must give one logit for each image and class"
            )


def build_network(
    architecture: str,
    *,
    num_classes: int,
    image_size: int,
    seed: int,
    variant: Variant = "standard",
    width: float = 1.0,
    depth: int = 1,
) -> nn.Module:
    """A network with random weights that depend on the seed alone.

    Raises:
        UserError: no such architecture, or one that cannot take images of that size, or has no other width
            or depth.
    """
    check_architecture(architecture, image_size, variant)
    entry = architectures.find(architecture)
    wanted = [scale for scale, value in (("width", width), ("depth", depth)) if value != 1]
    taken = inspect.signature(portable.load_function(entry.builder)).parameters if wanted else ()
    if lacking := [scale for scale in wanted if scale not in taken]:
        raise UserError(
            f"{lacking[0]}: {entry.name} has a fixed {lacking[0]}, because its builder takes no `{lacking[0]}`; "
            "leave it at 1"
        )
    torch.manual_seed(seed)
    return _build(entry, num_classes, image_size, variant, width, depth)


def outline_network(architecture: str, num_classes: int, image_size: int, variant: Variant = "standard") -> nn.Module:
    """A network for its shapes: on the meta device, where its entry says so, it has no weights."""
    entry = architectures.find(architecture)
    with torch.device(entry.outline):
        return _build(entry, num_classes, image_size, variant)


def _build(
    entry: Architecture, num_classes: int, image_size: int, variant: Variant, width: float = 1.0, depth: int = 1
) -> nn.Module:
    return portable.build_network(
        portable.load_function(entry.builder),
        architecture=entry.name,
        num_classes=num_classes,
        image_size=image_size,
        variant=variant,
        width=width,
        depth=depth,
    )
