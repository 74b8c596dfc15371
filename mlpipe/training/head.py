"""Training only the last layer of a pretrained network: its features are computed once and kept by content."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import nn

from mlpipe.config import LinearSettings, ModelConfig, NetworkSettings
from mlpipe.data.dataset import Dataset, Split
from mlpipe.data.storage.store import ObjectStore
from mlpipe.errors import UserError
from mlpipe.models.features.last_layer import inputs_of
from mlpipe.models.libraries import installed_libraries, is_editable, package_of
from mlpipe.models.own_files import code_of
from mlpipe.models.portable import ModelDescription, enlarge, images_per_pass, normalise
from mlpipe.models.weights import InitialNetwork
from mlpipe.training.estimator import measure
from mlpipe.training.precision import choose_precision, device_name
from mlpipe.training.protocol import TrainedModel, TrainingLogger

logger = logging.getLogger(__name__)

REGULARIZATION = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""scikit-learn's C, tried in turn until the validation accuracy falls: the weaker the penalty, the longer a fit."""
MAX_ITERATIONS = 300
TOLERANCE, TOLERANCE_BFLOAT16 = 1e-3, 0.05
"""Within which the last layer's answers must be those that its inputs give; the latter of the largest answer."""
PROGRESS_SECONDS = 10.0


def train_head(
    model: ModelConfig, dataset: Dataset, tracking: TrainingLogger, *, start: InitialNetwork, store: ObjectStore
) -> TrainedModel:
    """Fit the last linear layer on the features of the network, which stays as it is; the test split is not touched.

    Args:
        start: the network with its initial weights; its last layer is changed in place.
        store: keeps the features.

    Raises:
        UserError: the network does not end in a linear layer with a bias.
    """
    network, description = start.network.eval(), start.description
    head = _last_linear(network, model.architecture)
    began = time.monotonic()
    training, validation = dataset.train_split(), dataset.val_split()
    precision = choose_precision(model.train.precision if isinstance(model.train, NetworkSettings) else "auto")
    package = package_of(model.architecture)
    facts = [
        dataset.manifest.digest,
        start.sha256 or f"seed {model.train.seed}",
        code_of(model.architecture),
        installed_libraries(package),
        description.variant,
        description.input_size,
        precision,
    ]
    features = {
        part: _kept_features(
            network,
            head,
            description,
            split,
            None if package and is_editable(package) else store,
            [*facts, part],
            bfloat16=precision == "bf16-mixed",
        )
        for part, split in (("train", training), ("val", validation))
    }
    mean, std = features["train"].mean(axis=0), features["train"].std(axis=0) + 1e-6
    fitted = time.monotonic()
    features = {part: (values - mean) / std for part, values in features.items()}
    best = _fit_best((features["train"], training.labels), (features["val"], validation.labels), model.train)
    weight, bias = _rows(best)
    weight /= std
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias - weight @ mean))
    seconds = time.monotonic() - began
    metrics = {
        **measure("train", best, features["train"], training.labels),
        **measure("val", best, features["val"], validation.labels),
    }
    rate = (len(training) + len(validation)) / (fitted - began)
    threads = torch.get_num_threads()
    how = {"device": device_name(), "threads": threads, "precision": precision, "head_regularization": best.C}
    tracking.log_params(how)
    tracking.log_metrics({**metrics, "images_per_second": rate}, step=1)
    logger.info("fitted the head in %.1f s: val/accuracy %.4f", time.monotonic() - fitted, metrics["val/accuracy"])
    return TrainedModel(
        description=description,
        predictor=network,
        metrics={name: metrics[name] for name in ("val/accuracy", "val/loss")},
        train_seconds=seconds,
        images_per_second=rate,
        epochs_run=1,
        best_epoch=1,
    )


def _last_linear(network: nn.Module, name: str) -> nn.Linear:
    found = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not found or found[-1].bias is None:
        raise UserError(
            f"fine_tuning: head is not allowed for {name}, which ends in no linear layer with a bias; choose all"
        )
    return found[-1]


def _kept_features(
    network: nn.Module,
    head: nn.Linear,
    description: ModelDescription,
    split: Split,
    store: ObjectStore | None,
    facts: list[object],
    *,
    bfloat16: bool,
) -> NDArray[np.float32]:
    """(N, D) inputs of the last layer, from the object store if they are there; `None`: they are not kept."""
    if store is None:
        return _features(network, head, description, split, bfloat16=bfloat16)
    key = f"features/{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.npy"
    if store.exists(key):
        logger.info("the features are kept already")
        known: NDArray[np.float32] = np.load(io.BytesIO(store.get_bytes(key)), allow_pickle=False)
        return known
    features = _features(network, head, description, split, bfloat16=bfloat16)
    stream = io.BytesIO()
    np.save(stream, features, allow_pickle=False)
    store.put_bytes(key, stream.getvalue())
    return features


@torch.inference_mode()
def _features(
    network: nn.Module, head: nn.Linear, description: ModelDescription, split: Split, *, bfloat16: bool
) -> NDArray[np.float32]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device).to(memory_format=torch.channels_last)
    mean, std = (
        torch.tensor(each, device=device).view(3, 1, 1) for each in (description.channel_mean, description.channel_std)
    )
    length = images_per_pass((description.input_size or description.image_size) ** 2, device)
    began = reported = time.monotonic()
    with inputs_of(head) as seen:
        for at in range(0, len(split), length):
            images = torch.from_numpy(split.images_u8[at : at + length]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                logits = network(enlarge(normalise(images, mean, std), description.input_size)).float()
            own = nn.functional.linear(seen[-1].to(device), head.weight, head.bias)
            tolerance = TOLERANCE_BFLOAT16 * float(own.abs().max()) if bfloat16 else TOLERANCE
            if not at and not torch.allclose(own, logits, atol=tolerance):
                raise UserError("fine_tuning: head is not allowed for a network that changes what its last layer gives")
            if time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                logger.info("features of %d of %d images, %.0f a second", at, len(split), at / (reported - began))
    network.cpu()
    return torch.cat(seen).numpy()


Labelled = tuple[NDArray[np.float32], NDArray[np.int64]]


def _fit_best(
    training: Labelled, validation: Labelled, settings: NetworkSettings | LinearSettings
) -> LogisticRegression:
    best, accuracy = None, -1.0
    for c in REGULARIZATION:
        began = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fit = LogisticRegression(
                C=c,
                max_iter=MAX_ITERATIONS,
                random_state=settings.seed,
                class_weight=None if settings.class_weights == "none" else "balanced",
            ).fit(*training)
        reached = float(fit.score(*validation))
        logger.info("head with C = %g: val/accuracy %.4f after %.1f s", c, reached, time.monotonic() - began)
        if best is not None and reached < accuracy:
            break
        best, accuracy = fit, reached
    return best


def _rows(fit: LogisticRegression) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(K, D) weights and (K,) biases; of two classes scikit-learn has one row."""
    weight, bias = fit.coef_.astype(np.float32), fit.intercept_.astype(np.float32)
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias
