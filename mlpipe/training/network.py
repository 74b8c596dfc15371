"""Training a network with Lightning's Trainer."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import islice

import torch
from torch import Tensor, nn

from mlpipe.config import ModelConfig, NetworkSettings
from mlpipe.data.batches import BatchLoader
from mlpipe.data.dataset import Dataset
from mlpipe.errors import UserError
from mlpipe.models.portable import PIXELS_PER_BATCH, normalise
from mlpipe.models.registry import check_smaller_images
from mlpipe.models.weights import Channels, InitialNetwork
from mlpipe.training.checkpoints import CheckpointStore
from mlpipe.training.cpu.dead_taps import TrimmedKernels
from mlpipe.training.devices import check_devices, fit_together
from mlpipe.training.epochs import CheckpointCallback
from mlpipe.training.fitting import Fit, run_trainer
from mlpipe.training.learning_rate import NUM_STEPS, find_learning_rate
from mlpipe.training.memory import check_memory, largest_batch
from mlpipe.training.module import ClassificationModule, shown_size
from mlpipe.training.precision import choose_precision, device_name
from mlpipe.training.protocol import TrainedModel, TrainingLogger
from mlpipe.training.teacher import Teacher
from mlpipe.training.whitening import MAX_IMAGES, whiten

logger = logging.getLogger(__name__)

MIN_STEPS_OF_FOUND_BATCH = 10
"""In an epoch: of a small data set all images fit into a batch, and a step an epoch learns nothing."""

CHECKPOINT_FORMAT = 4
"""Of what `CheckpointCallback` saves."""


def train_network(
    model: ModelConfig,
    dataset: Dataset,
    tracking: TrainingLogger,
    *,
    start: InitialNetwork,
    checkpoints: CheckpointStore | None = None,
    teacher: Teacher | None = None,
) -> TrainedModel:
    """Train on the training split; keep the weights of the epoch of highest validation accuracy.

    The test split is not touched. Where `checkpoints` holds a state of the same configuration, training goes on after
    its last epoch and ends with the same weights as if it had never been interrupted.

    Args:
        start: the network with its initial weights, which is trained in place.
        teacher: a network whose answers are learned beside the labels.

    Raises:
        UserError: the architecture is no network, or takes no smaller images where they are to grow; a batch does not
            fit into memory; the loss became infinite; or there are not as many devices as wanted, or images for them.
    """
    config = model.train
    if not isinstance(config, NetworkSettings):
        raise UserError(f"models: {model.architecture!r} is not a network; scikit-learn fits it")
    network, description = start.network, start.description
    mean, std = description.channel_mean, description.channel_std
    side = description.input_size or description.image_size
    smallest = shown_size(config, side, 0)
    if smallest < side:
        check_smaller_images(model.architecture, side, smallest, description.variant)
    if config.find_batch_size:
        bfloat16 = choose_precision(config.precision) == "bf16-mixed"
        largest = largest_batch(network, side=side, bfloat16=bfloat16, num_devices=config.num_devices)
        config = replace(config, batch_size=largest, min_steps=max(config.min_steps, MIN_STEPS_OF_FOUND_BATCH))
        logger.info("the largest batch that takes half of the memory has %d images", largest)
    training, validation = _loaders(dataset, config, side)
    teacher_seconds = 0.0
    if teacher is not None and config.augmentation == "none":  # then its answers never change
        began = time.monotonic()
        training = training.with_answers(teacher.answers(dataset.train_split()))
        teacher, teacher_seconds = None, time.monotonic() - began
    whitened = getattr(network, "whitened", None)
    if isinstance(whitened, nn.Conv2d) and start.sha256 is None:
        _whiten(whitened, training, mean, std)
    precision = choose_precision(config.precision)  # after the devices are known to be there
    bfloat16 = precision == "bf16-mixed"
    batch_bytes = check_memory(
        network,
        model.name,
        batch_size=training.batch_size,
        side=side,
        bfloat16=bfloat16,
        num_devices=config.num_devices,
    )

    def module_for(network: nn.Module, settings: NetworkSettings, total_steps: int) -> ClassificationModule:
        return ClassificationModule(
            network,
            settings,
            channel_mean=mean,
            channel_std=std,
            num_classes=len(dataset.manifest.classes),
            total_steps=total_steps,
            input_size=description.input_size,
            teacher=teacher,
            class_weights=_balanced(dataset) if config.class_weights == "balanced" else None,
        )

    own_shard = training.shard(0, config.num_devices)
    if config.find_learning_rate:
        trial = module_for(copy.deepcopy(network), replace(config, schedule="constant"), NUM_STEPS)
        config = replace(config, learning_rate=find_learning_rate(trial, own_shard, tracking, bfloat16=bfloat16))
    trimmed = TrimmedKernels(network, side) if smallest == side else None  # a tap is dead at one size alone
    keeper = CheckpointCallback(
        own_shard,
        tracking,
        checkpoints,
        fingerprint=_fingerprint(replace(model, train=config), dataset, start),
        seed=config.seed,
        patience=config.early_stopping_patience,
    )
    module = module_for(network, config, config.num_epochs * len(own_shard))
    module.first_epoch = len(keeper.history)
    num_threads = torch.get_num_threads() if torch.cuda.is_available() else _threads_of_each(config.num_devices)
    tracking.log_params(
        {
            "images_per_step": training.batch_size,
            "precision": precision,
            "device": device_name(),
            "threads": num_threads,
        }
    )
    if module.first_epoch < config.num_epochs and not keeper.finished:
        fit = Fit(
            module=module,
            code=description.code,
            training=training,
            validation=validation,
            precision=precision,
            num_threads=num_threads,
            batch_bytes=batch_bytes,
        )
        (run_trainer if config.num_devices == 1 else fit_together)(fit, keeper)
    _load(network.cpu(), keeper.best_weights)
    if trimmed is not None:
        trimmed.restore()
    best = keeper.history[keeper.best_epoch - 1]
    num_images = sum(epoch["images_per_second"] * epoch["train_seconds"] for epoch in keeper.history)
    return TrainedModel(
        description=description,
        predictor=network.eval(),
        metrics={name: best[name] for name in ("val/accuracy", "val/loss")},
        train_seconds=teacher_seconds + sum(epoch["epoch_seconds"] for epoch in keeper.history),
        images_per_second=num_images / sum(epoch["train_seconds"] for epoch in keeper.history),
        epochs_run=len(keeper.history),
        best_epoch=keeper.best_epoch,
    )


def _loaders(dataset: Dataset, config: NetworkSettings, side: int) -> tuple[BatchLoader, BatchLoader]:
    """Batches of the training and of the validation split.

    Args:
        side: height and width of the network's input, pixels.

    Raises:
        UserError: there are not enough images, or devices.
    """
    split = dataset.train_split()
    batch_size = min(config.batch_size, max(2 * config.num_devices, len(split) // config.min_steps))
    training = BatchLoader(split, batch_size, seed=config.seed, shuffle=True)
    # What fits when it is trained on fits when it is not.
    validation_batch_size = max(batch_size, PIXELS_PER_BATCH // side**2)
    validation = BatchLoader(dataset.val_split(), validation_batch_size, seed=config.seed, shuffle=False)
    check_devices(
        config.num_devices,
        batch_size=batch_size,
        num_training=training.num_images,
        num_validation=validation.num_images,
    )
    return training, validation


def _load(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Weights of a checkpoint, with the versions of the layers' formats, which mnasnet insists on."""
    state = OrderedDict(weights)
    state._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
    network.load_state_dict(state)


def _balanced(dataset: Dataset) -> Tensor:
    """(K,) inverse to the classes' numbers of training images; 1 on the average image."""
    counts = torch.tensor(dataset.manifest.class_counts["train"], dtype=torch.float32).clamp(min=1)
    return counts.sum() / (len(counts) * counts)


def _whiten(convolution: nn.Conv2d, training: BatchLoader, mean: Channels, std: Channels) -> None:
    """Fit a network's first convolution to the first images of the first epoch."""
    scale = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    first = islice(training, -(-MAX_IMAGES // training.batch_size))
    whiten(convolution, (normalise(images_u8, *scale) for images_u8, *_ in first))


def _fingerprint(model: ModelConfig, dataset: Dataset, start: InitialNetwork) -> str:
    """What a checkpoint must agree with so that training can resume; shapes, since the code may change meanwhile."""
    shapes = {name: list(value.shape) for name, value in start.network.state_dict().items()}
    values = [CHECKPOINT_FORMAT, asdict(model), dataset.manifest.digest, start.source, shapes]
    facts = json.dumps(values, sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()  # an address among them may hold a password


def _threads_of_each(num_devices: int) -> int:
    """Processes on the CPU share the threads that one would have."""
    return max(1, torch.get_num_threads() // num_devices)
