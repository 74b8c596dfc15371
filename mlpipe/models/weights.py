"""What a network starts from: random numbers, ImageNet weights, a file, or a model this project registered."""

from __future__ import annotations

import logging
import pickle
import re
import struct
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mlpipe.addresses import redact_uri
from mlpipe.config import ModelConfig, Variant
from mlpipe.data.storage.store import ObjectStore, file_sha256
from mlpipe.data.storage.uris import fetch_uri
from mlpipe.errors import UserError
from mlpipe.models import architectures, package
from mlpipe.models.architectures import TIMM
from mlpipe.models.portable import ModelDescription
from mlpipe.models.registry import build_network, outline_network
from mlpipe.models.weights_address import suffix_of_weights

logger = logging.getLogger(__name__)

Channels = tuple[float, float, float]

UNREADABLE = (
    safetensors.SafetensorError,
    struct.error,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AssertionError,
)
"""What the readers raise on damaged files."""

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


@dataclass(frozen=True, eq=False, kw_only=True)
class InitialNetwork:
    """A network before its training."""

    network: nn.Module
    description: ModelDescription
    """Its form and its normalisation: those that the weights were trained with, or the data set's."""
    source: str = "random"
    """What its weights are, in words, with the replacement of a head."""
    sha256: str | None = None
    """Of the weights' file; `None` for random weights."""


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Weights that were read, before they are put into the network."""

    state: Mapping[str, Tensor]
    source: str
    sha256: str
    description: ModelDescription
    """Of the network that takes them."""
    other_classes: bool = False


def initial_network(model: ModelConfig, description: ModelDescription, store: ObjectStore) -> InitialNetwork:
    """The network with the configured initial weights.

    A head of another size (or, for `models:/…`, of other classes) keeps its random weights, and that is logged.
    There is no fallback: weights that cannot be had are an error.

    Args:
        description: of the model with random weights.

    Raises:
        UserError: unreachable, unreadable or unsafe weights, a wrong checksum, or weights of another architecture; an
            architecture that cannot take images of that size.
    """
    if model.weights == "random":
        return InitialNetwork(network=_build(model, description), description=description)
    with tempfile.TemporaryDirectory(prefix="mlpipe-weights-") as folder:
        if model.weights == "imagenet" and TIMM.fullmatch(description.architecture):
            found = _pretrained_of_timm(description, store, Path(folder))
        elif model.weights == "imagenet":
            found = _imagenet(description, store, Path(folder))
        elif model.weights.startswith("models:/"):
            found = _registered(model, description, Path(folder))
        else:
            found = _file(model, description, Path(folder))
        network = _build(model, found.description)
        replaced = _apply(network, found, model.architecture)
    source = found.source
    if replaced:
        source += f"; head ({', '.join(replaced)}) new, for {len(description.classes)} classes"
    logger.info("%s starts from %s", model.name, source)
    return InitialNetwork(
        network=network,
        description=found.description,
        source=source,
        sha256=found.sha256,
    )


def _build(model: ModelConfig, description: ModelDescription) -> nn.Module:
    return build_network(
        model.architecture,
        num_classes=len(description.classes),
        image_size=description.input_size or description.image_size,
        seed=model.train.seed,
        variant=description.variant,
        width=description.width,
        depth=description.depth,
    )


def _config_of_timm(architecture: str) -> Any:
    """What timm knows of a network's published weights; `None` if it is none of timm's, or has no such weights."""
    match = TIMM.fullmatch(architecture)
    if match is None:
        return None
    import timm

    return timm.get_pretrained_cfg(match["name"])


def _imagenet_statistics(architecture: str) -> tuple[Channels, Channels]:
    """What a network's published weights subtract and divide by; timm's networks differ in that."""
    config = _config_of_timm(architecture)
    return (IMAGENET_MEAN, IMAGENET_STD) if config is None else (_channels(config.mean), _channels(config.std))


def _pretrained_of_timm(description: ModelDescription, store: ObjectStore, folder: Path) -> _Found:
    """timm's default weights; the object store keeps them, so a cluster downloads them once."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name = description.architecture.removeprefix("timm_")
    config = _config_of_timm(description.architecture)
    if config is None or not config.hf_hub_id:
        raise UserError(f"models: 'timm/{name}=imagenet': timm has no weights of {name}; {WAYS_OUT}")
    path, key = folder / f"{name}.safetensors", f"weights/{config.hf_hub_id}/model.safetensors"
    if store.exists(key):
        store.get_file(key, path)
        digest = file_sha256(path)
    else:
        logger.info("downloading %s from Hugging Face", config.hf_hub_id)
        try:
            fetched = hf_hub_download(config.hf_hub_id, "model.safetensors", cache_dir=folder)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"models: 'timm/{name}=imagenet' cannot be downloaded: {reason}; {WAYS_OUT}") from error
        path = Path(fetched)
        digest = file_sha256(path)
        store.put_file(key, path, sha256=digest)
    return _Found(
        state=_read(path),
        source=f"timm's weights {config.hf_hub_id}",
        sha256=digest,
        description=replace(description, channel_mean=_channels(config.mean), channel_std=_channels(config.std)),
    )


def _imagenet(description: ModelDescription, store: ObjectStore, folder: Path) -> _Found:
    import torchvision  # here: it takes seconds, and the networks of this project do without

    architecture = description.architecture
    try:
        weights = torchvision.models.get_model_weights(architecture).DEFAULT
    except (ValueError, AttributeError):
        raise UserError(f"models: '{architecture}=imagenet': torchvision has no such weights; {WAYS_OUT}") from None
    name = PurePosixPath(weights.url).name
    path, key = folder / name, f"weights/{name}"
    if store.exists(key):
        store.get_file(key, path)
        digest = _checked_by_name(file_sha256(path), weights.url)
    else:
        logger.info("downloading %s", weights.url)
        try:
            fetched = fetch_uri(weights.url, path, field="models")
        except (UserError, ConnectionError) as error:
            reason = str(error).removeprefix("models: ").split("; ")[0]
            raise UserError(f"models: '{architecture}=imagenet' cannot be downloaded: {reason}; {WAYS_OUT}") from error
        digest = _checked_by_name(fetched.sha256, weights.url)
        store.put_file(key, path, sha256=digest)
    transform = weights.transforms()
    return _Found(
        state=_read(path),
        source=f"ImageNet weights {name}",
        sha256=digest,
        description=replace(description, channel_mean=_channels(transform.mean), channel_std=_channels(transform.std)),
    )


def _channels(values: Any) -> Channels:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _checked_by_name(sha256: str, url: str) -> str:
    """The digest, which must begin as torchvision's file name ends, as its own download demands."""
    expected = PurePosixPath(url).stem.rsplit("-", 1)[-1]
    if not sha256.startswith(expected):
        raise UserError(f"models: the file from {url} does not have the sha256 of its name ({expected}…); {WAYS_OUT}")
    return sha256


def _registered(model: ModelConfig, description: ModelDescription, folder: Path) -> _Found:
    logged, path = package.download_packaged_model(model.weights, folder)
    if logged.architecture != description.architecture:
        raise UserError(
            f"models: {model.weights} is a {logged.architecture}, not a {description.architecture}; "
            f"write {logged.architecture}={model.weights}"
        )
    return _Found(
        state=_read(path),
        source=model.weights,
        sha256=file_sha256(path),
        description=replace(
            description,
            channel_mean=logged.channel_mean,
            channel_std=logged.channel_std,
            variant=logged.variant,
            width=logged.width,
            depth=logged.depth,
            input_size=logged.input_size,
        ),
        other_classes=logged.classes != description.classes,
    )


def _file(model: ModelConfig, description: ModelDescription, folder: Path) -> _Found:
    uri = redact_uri(model.weights)
    path = folder / f"weights{suffix_of_weights(model.weights)}"
    digest = fetch_uri(model.weights, path, field="models").sha256
    state = _read(path, uri)
    # A published network with ImageNet's number of outputs was trained with its own normalisation.
    from_imagenet = architectures.find(model.architecture).has_imagenet_weights and any(
        len(state[key]) == IMAGENET_CLASSES for key in head_keys(model.architecture) if key in state
    )
    if from_imagenet:
        mean, std = _imagenet_statistics(description.architecture)
        description = replace(description, channel_mean=mean, channel_std=std)
    return _Found(state=state, source=uri, sha256=digest, description=description)


def _read(path: Path, uri: str | None = None) -> Mapping[str, Tensor]:
    """Tensors by name. Nothing but tensors and plain containers is unpickled."""
    name = uri or path.name
    with path.open("rb") as file:
        head = file.read(100)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"models: {name} is a pointer of Git LFS and not the file; fetch that with `git lfs pull`")
    if head.lstrip().startswith(b"<"):
        raise UserError(f"models: {name} is a web page and not weights; is the address that of a download?")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"models: {name} contains more than tensors and was not loaded, because it could run code "
            f"({str(error).split('. ')[0][:200]}); save network.state_dict() alone, or use .safetensors"
        ) from None
    except UNREADABLE as error:
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


def _apply(network: nn.Module, found: _Found, architecture: str) -> list[str]:
    """Load the weights; the names of the head's parameters where it stays new."""
    own = network.state_dict()
    state = {LEGACY_DENSENET.sub(r"\1\2", key): value for key, value in found.state.items() if not AUXILIARY.match(key)}
    if "encoder.pos_embedding" in own and "encoder.pos_embedding" in state:
        from torchvision.models.vision_transformer import interpolate_embeddings

        state = dict(interpolate_embeddings(network.image_size, network.patch_size, OrderedDict(state)))
    head = head_keys(architecture, found.description.variant)
    if any(key not in state or (key not in head and state[key].shape != own[key].shape) for key in own):
        # timm's networks of attention come with what fits their weights to another size or from older names.
        fit = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        if fit is not None and TIMM.fullmatch(found.description.architecture):
            state = dict(fit(state, network))
    # Files from before PyTorch 0.4.1 do not count batches; nothing depends on the count.
    state = {key: own[key] for key in own if key.endswith("num_batches_tracked")} | state
    is_without_head = own.keys() - state.keys() == set(head)  # as some networks are published
    is_of_other_size = any(key in state and state[key].shape != own[key].shape for key in head)
    replaced = found.other_classes or is_without_head or is_of_other_size
    if replaced:
        state |= {key: own[key] for key in head}
    _check_names(own, state, found.source, architecture, _native_size(found.description))
    loadable = OrderedDict(state)
    loadable._metadata = getattr(found.state, "_metadata", own._metadata)  # type: ignore[attr-defined] # layers' versions
    network.load_state_dict(loadable)
    return list(head) if replaced else []


def _native_size(description: ModelDescription) -> int | None:
    """Height and width that timm's weights were trained at; `None` where it is that of the network, or not known."""
    config = _config_of_timm(description.architecture)
    size = None if config is None else int(config.input_size[-1])
    return None if size == (description.input_size or description.image_size) else size


def _check_names(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str, architecture: str, native_size: int | None
) -> None:
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
            + (
                f"; where they are of it, choose image_size {native_size}, which they were trained at"
                if native_size
                else ""
            )
        )
