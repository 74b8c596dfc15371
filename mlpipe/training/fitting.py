"""Lightning's Trainer, as this project uses it: alone on a device, or as one of several processes."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch import Trainer
from torch import nn

from mlpipe.data.batches import BatchLoader
from mlpipe.training.cpu.memory import keep_freed_memory
from mlpipe.training.cpu.winograd import winograd_convolutions
from mlpipe.training.epochs import EpochCallback
from mlpipe.training.module import ClassificationModule

SHARE_FOR_IMAGES = 0.25
"""Of what a batch leaves of a GPU's free memory, at most, for the images of each split."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A training, as each of its processes is given it."""

    module: ClassificationModule
    """Has the settings, and the epoch to go on from."""
    code: str
    """What builds its network; loaded before this is read, for a user's file is no module that could be imported."""
    training: BatchLoader
    """Of all processes together."""
    validation: BatchLoader
    """Of all processes together."""
    precision: Literal["32-true", "bf16-mixed"]
    num_threads: int
    """Of each process."""
    batch_bytes: float
    """What the network needs at most to train on a batch."""


def run_trainer(fit: Fit, epochs: EpochCallback, rank: int = 0) -> None:
    """Train from the module's `first_epoch` on.

    Where there are several devices, each process calls it, in the process group of torch's that it has joined. To
    Lightning each is a training of its own on one device: the module exchanges the gradients, by PyTorch's
    DistributedDataParallel. As one training of several devices, Lightning 2.6.6 passes SIGTERM on by a broadcast from
    within the signal's handler, which the others, amid an exchange of gradients, do not take part in: it never ends.

    Args:
        epochs: its loader is what this process trains on.
        rank: the process's, and of its device.
    """
    keep_freed_memory()
    on_gpu = torch.cuda.is_available()
    module, config = fit.module, fit.module.train_config
    if on_gpu and config.num_devices > 1:  # PyTorch has it for GPUs alone
        synchronise(module.network)
    # Deterministic mode would fill every new tensor with NaN: a help to debug, at hundreds of kernels a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    with _quiet_lightning():
        trainer = Trainer(
            accelerator="gpu" if on_gpu else "cpu",
            devices=[rank] if on_gpu else 1,
            precision=fit.precision,
            max_epochs=config.num_epochs - module.first_epoch,
            callbacks=[epochs],
            deterministic="warn" if on_gpu else None,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        validation = fit.validation.shard(rank, config.num_devices)
        if on_gpu:
            for loader in (epochs.loader, validation):
                loader.keep_on(torch.device("cuda", rank), bytes_for_images(rank, fit.batch_bytes))
        fast = fit.precision == "32-true" and not on_gpu
        with winograd_convolutions(module.network) if fast else nullcontext():
            trainer.fit(module, epochs.loader, validation)


def bytes_for_images(rank: int, batch_bytes: float) -> int:
    """How much memory the images of a split may take of a GPU, which has still to hold a batch."""
    return max(0, int((torch.cuda.mem_get_info(rank)[0] - batch_bytes) * SHARE_FOR_IMAGES))


def synchronise(network: nn.Module) -> None:
    """Let batch normalization use the statistics of all devices' images, in place.

    Only PyTorch's own and timm's: what another subclass adds would be lost, and it keeps to its device.
    """
    timm = sys.modules.get("timm.layers")
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
            elif timm and type(child) is timm.BatchNormAct2d:
                setattr(module, name, timm.convert_sync_batchnorm(child))


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep what Lightning says about itself out of the task's log."""
    names = ("lightning.pytorch", "lightning.fabric")
    loggers = [logging.getLogger(name) for name in names]
    levels = [each.level for each in loggers]
    with warnings.catch_warnings():
        # Lightning 2.6.6 uses a part of PyTorch's pytree that 2.14 has deprecated.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        # Of an epoch that is resumed within.
        warnings.filterwarnings("ignore", message="train_dataloader yielded None")
        try:
            for each in loggers:
                each.setLevel(logging.WARNING)
            yield
        finally:
            for each, level in zip(loggers, levels, strict=True):
                each.setLevel(level)
