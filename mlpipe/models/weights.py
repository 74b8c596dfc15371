"""What a network starts from: random numbers, ImageNet weights, a file, or a model this project registered."""

from __future__ import annotations

import logging
import pickle
import re
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mlpipe.addresses import redact_uri
from mlpipe.config import ModelConfig, Variant
from mlpipe.data.storage.store import ObjectStore, file_sha256
from mlpipe.data.storage.uris import expected_sha256, fetch_uri
from mlpipe.errors import UserError
from mlpipe.models import architectures, package
from mlpipe.models.registry import build_network, outline_network

logger = logging.getLogger(__name__)

Channels = tuple[float, float, float]

WAYS_OUT = (
    "choose random, or put the file where it can be reached and give its address (file:///…, s3://…, "
    "https://…#sha256=<hex>)"
)
IMAGENET_CLASSES = 1000
IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)
AUXILIARY = re.compile(r"(aux1|aux2|AuxLogits)\.")
"""Outputs of googlenet and inception_v3 that our networks do without."""
LEGACY_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))")
"""Names in torchvision's own densenet files, from before dots were taken out; as in `torchvision.models.densenet`."""


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """What a network started from."""

    description: str
    """In words, with the replacement of a head."""
    replaced_head: bool
    """Whether the last layer is new, the weights' own being for other classes."""
    sha256: str | None
    """Of the file; `None` for random weights."""
    channel_mean: Channels | None = None
    """Normalisation that the weights were trained with, in units of 0..1; `None`: use the data set's own."""
    channel_std: Channels | None = None
    """Likewise."""
    variant: Variant = "standard"
    """Form of the network."""
    input_size: int | None = None
    """Height and width to which it enlarges its images, pixels."""


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Weights that were read, before they are put into the network."""

    state: Mapping[str, Tensor]
    source: str
    sha256: str
    channel_mean: Channels | None = None
    channel_std: Channels | None = None
    other_classes: bool = False
    variant: Variant | None = None
    input_size: int | None = None


def initial_network(
    model: ModelConfig, *, classes: tuple[str, ...], image_size: int, store: ObjectStore
) -> tuple[nn.Module, InitialWeights]:
    """The network with the configured initial weights.

    A head of another size (or, for `models:/…`, of other classes) keeps its random weights, and that is logged.
    There is no fallback: weights that cannot be had are an error.

    Args:
        classes: class names of the data set.
        image_size: height and width of its images, pixels.

    Raises:
        UserError: unreachable, unreadable or unsafe weights, a wrong checksum, or weights of another architecture; an
            architecture that cannot take images of that size.
    """

    def build(variant: Variant, input_size: int | None) -> nn.Module:
        return build_network(
            model.architecture,
            num_classes=len(classes),
            image_size=input_size or image_size,
            seed=model.train.seed,
            variant=variant,
        )

    if model.weights == "random":
        network = build(model.variant, model.input_size)
        return network, InitialWeights(
            description="random",
            replaced_head=False,
            sha256=None,
            variant=model.variant,
            input_size=model.input_size,
        )
    with tempfile.TemporaryDirectory(prefix="mlpipe-weights-") as folder:
        if model.weights == "imagenet":
            found = _imagenet(model.architecture, store, Path(folder))
        elif model.weights.startswith("models:/"):
            found = _registered(model, classes, Path(folder))
        else:
            found = _file(model, Path(folder))
        variant = found.variant or model.variant
        input_size = found.input_size if found.variant else model.input_size
        network = build(variant, input_size)
        replaced = _apply(network, found, model.architecture, variant)
    description = found.source
    if replaced:
        description += f"; head ({', '.join(replaced)}) new, for {len(classes)} classes"
    logger.info("%s starts from %s", model.name, description)
    return network, InitialWeights(
        description=description,
        replaced_head=bool(replaced),
        sha256=found.sha256,
        channel_mean=found.channel_mean,
        channel_std=found.channel_std,
        variant=variant,
        input_size=input_size,
    )


def _imagenet(architecture: str, store: ObjectStore, folder: Path) -> _Found:
    import torchvision  # here: it takes seconds, and the networks of this project do without

    try:
        weights = torchvision.models.get_model_weights(architecture).DEFAULT
    except (ValueError, AttributeError):
        raise UserError(f"models: '{architecture}=imagenet': torchvision has no such weights; {WAYS_OUT}") from None
    name = PurePosixPath(weights.url).name
    path, key = folder / name, f"weights/{name}"
    if store.exists(key):
        store.get_file(key, path)
        _check_prefix(path, weights.url)
    else:
        logger.info("downloading %s", weights.url)
        try:
            fetch_uri(weights.url, path, field="models")
        except (UserError, ConnectionError) as error:
            reason = str(error).removeprefix("models: ").split("; ")[0]
            raise UserError(f"models: '{architecture}=imagenet' cannot be downloaded: {reason}; {WAYS_OUT}") from error
        _check_prefix(path, weights.url)
        store.put_file(key, path, sha256=file_sha256(path))
    transform = weights.transforms()
    return _Found(
        state=_read(path),
        source=f"ImageNet weights {name}",
        sha256=file_sha256(path),
        channel_mean=_channels(transform.mean),
        channel_std=_channels(transform.std),
    )


def _channels(values: Any) -> Channels:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _check_prefix(path: Path, url: str) -> None:
    """Compare with the start of the sha256 that torchvision's file names carry, as its own download does."""
    expected = path.stem.rsplit("-", 1)[-1]
    if not file_sha256(path).startswith(expected):
        raise UserError(f"models: the file from {url} does not have the sha256 of its name ({expected}…); {WAYS_OUT}")


def _registered(model: ModelConfig, classes: tuple[str, ...], folder: Path) -> _Found:
    description, path = package.download_packaged_model(model.weights, folder)
    wanted = architectures.find(model.architecture).name
    if description.architecture != wanted:
        raise UserError(
            f"models: {model.weights} is a {description.architecture}, not a {wanted}; "
            f"write {description.architecture}={model.weights}"
        )
    return _Found(
        state=_read(path),
        source=model.weights,
        sha256=file_sha256(path),
        channel_mean=description.channel_mean,
        channel_std=description.channel_std,
        other_classes=description.classes != classes,
        variant=description.variant,
        input_size=description.input_size,
    )


def _file(model: ModelConfig, folder: Path) -> _Found:
    uri = redact_uri(model.weights)
    checksum = expected_sha256(model.weights, field="models")
    if model.weights.lower().startswith(("http://", "https://")) and checksum is None:
        raise UserError(f"models: {uri} has no checksum; append #sha256=<64 hex digits> to the address")
    suffix = PurePosixPath(urlsplit(model.weights).path).suffix.lower()
    if suffix not in (".safetensors", ".pth", ".pt"):
        raise UserError(
            f"models: {uri!r} is neither random nor imagenet nor the address of a .safetensors, .pth or .pt file"
        )
    path = folder / f"weights{suffix}"
    digest = fetch_uri(model.weights, path, field="models").sha256
    state = _read(path, uri)
    # A torchvision network with ImageNet's number of outputs was trained with ImageNet's normalisation.
    from_imagenet = architectures.find(model.architecture).has_imagenet_weights and any(
        len(state[key]) == IMAGENET_CLASSES for key in head_keys(model.architecture) if key in state
    )
    return _Found(
        state=state,
        source=uri,
        sha256=digest,
        channel_mean=IMAGENET_MEAN if from_imagenet else None,
        channel_std=IMAGENET_STD if from_imagenet else None,
    )


def _read(path: Path, uri: str | None = None) -> Mapping[str, Tensor]:
    """Tensors by name. Nothing but tensors and plain containers is unpickled."""
    name = uri or path.name
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"models: {name} holds more than tensors and is not loaded, for it could run code "
            f"({str(error).split('. ')[0][:200]}); save network.state_dict() alone, or use .safetensors"
        ) from None
    except (safetensors.SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"models: {name} cannot be read as weights ({str(error)[:200]}); is the file whole?") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"models: {name} is not a state dictionary (names and tensors); save network.state_dict()")
    return state


@lru_cache(maxsize=64)
def head_keys(architecture: str, variant: Variant = "standard") -> tuple[str, ...]:
    """Names of the parameters whose shape depends on the number of classes."""
    two, three = (outline_network(architecture, n, 224, variant).state_dict() for n in (2, 3))
    return tuple(key for key in two if two[key].shape != three[key].shape)


def _apply(network: nn.Module, found: _Found, architecture: str, variant: Variant) -> list[str]:
    """Load the weights; the names of the head's parameters where it stays new."""
    own = network.state_dict()
    state = {LEGACY_DENSENET.sub(r"\1\2", key): value for key, value in found.state.items() if not AUXILIARY.match(key)}
    if "encoder.pos_embedding" in own and "encoder.pos_embedding" in state:
        from torchvision.models.vision_transformer import interpolate_embeddings

        state = dict(interpolate_embeddings(network.image_size, network.patch_size, OrderedDict(state)))
    head = head_keys(architecture, variant)
    replaced = found.other_classes or any(key in state and state[key].shape != own[key].shape for key in head)
    if replaced:
        state |= {key: own[key] for key in head}
    # Files from before PyTorch 0.4.1 do not count batches; nothing depends on the count.
    state = {key: own[key] for key in own if key.endswith("num_batches_tracked")} | state
    _check_names(own, state, found.source, architecture)
    loadable = OrderedDict(state)
    loadable._metadata = getattr(found.state, "_metadata", own._metadata)  # type: ignore[attr-defined] # layers' versions
    network.load_state_dict(loadable)
    return list(head) if replaced else []


def _check_names(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str, architecture: str) -> None:
    faults = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [key for key in own if key in state and state[key].shape != own[key].shape],
    }
    if any(faults.values()):
        shown = "; ".join(
            f"{len(keys)} {fault} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for fault, keys in faults.items()
            if keys
        )
        raise UserError(
            f"models: {source} does not fit {architecture}: {shown}; give weights of {architecture}, "
            "or name the network that they are of"
        )
