"""Lightning's Trainer, as this project uses it: alone on a device, or as one of several processes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy

from mlpipe.data.batches import BatchLoader
from mlpipe.training.cpu.memory import keep_freed_memory
from mlpipe.training.cpu.winograd import winograd_convolutions
from mlpipe.training.epochs import EpochCallback
from mlpipe.training.module import ClassificationModule

SHARE_FOR_IMAGES = 0.25
"""Of a GPU's free memory, at most, for the images of each split."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A training, as each of its processes is given it."""

    module: ClassificationModule
    code: str
    """What builds its network; loaded before this is read, for a user's file is no module that could be imported."""
    training: BatchLoader
    """Of all processes together."""
    validation: BatchLoader
    """Of all processes together."""
    num_epochs: int
    epochs_done: int
    """Epochs of the attempts before this one."""
    precision: Literal["32-true", "bf16-mixed"]
    seed: int
    num_devices: int
    num_threads: int
    """Of each process."""


def run_trainer(fit: Fit, epochs: EpochCallback, rank: int = 0) -> None:
    """Train from epoch `epochs_done` on.

    Where there are several devices, each process calls it, in the process group of torch's that it has joined.

    Args:
        epochs: its loader is what this process trains on.
        rank: the process's, and of its device.
    """
    keep_freed_memory()
    on_gpu = torch.cuda.is_available()
    several = fit.num_devices > 1
    with _quiet_lightning():
        trainer = Trainer(
            accelerator="gpu" if on_gpu else "cpu",
            devices=fit.num_devices,
            strategy=_strategy(rank) if several else "auto",
            sync_batchnorm=several and on_gpu,  # PyTorch has it for GPUs alone
            use_distributed_sampler=False,
            precision=fit.precision,
            max_epochs=fit.num_epochs,
            callbacks=[epochs],
            deterministic="warn" if on_gpu else None,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        # Lightning's own count of completed epochs, from which it goes on.
        trainer.fit_loop.epoch_progress.current.processed = fit.epochs_done  # type: ignore[attr-defined]
        if several:
            _send_no_signals(trainer)
        validation = fit.validation.shard(rank, fit.num_devices)
        if on_gpu:
            for loader in (epochs.loader, validation):
                loader.keep_on(torch.device("cuda", rank), int(torch.cuda.mem_get_info(rank)[0] * SHARE_FOR_IMAGES))
        fast = fit.precision == "32-true" and not on_gpu
        with winograd_convolutions(fit.module.network) if fast else nullcontext():
            trainer.fit(fit.module, epochs.loader, validation)


def _strategy(rank: int) -> Strategy:
    return _JoinedDDP(cluster_environment=_OneHost(rank), gradient_as_bucket_view=True)


class _JoinedDDP(DDPStrategy):
    """For processes that were started, and have joined their group, before."""

    def _configure_launcher(self) -> None:
        self._launcher = None


class _OneHost(LightningEnvironment):
    """Says which process this one is; nothing is read from or written to the environment."""

    creates_processes_externally = True

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._local_rank = rank

    def local_rank(self) -> int:
        return self._local_rank

    def node_rank(self) -> int:
        return 0

    def teardown(self) -> None:
        pass


def _send_no_signals(trainer: Trainer) -> None:
    """Keep Lightning 2.6.6 from passing SIGTERM on to the other processes.

    It does so by a broadcast from within the signal's handler, which the others, amid an exchange of gradients, do not
    take part in, so that it never ends; and by another at each step, for which a GPU is waited for. Here the process
    that started the others ends them.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep what Lightning says about itself out of the task's log."""
    names = ("lightning.pytorch", "lightning.fabric")
    loggers = [logging.getLogger(name) for name in names]
    levels = [each.level for each in loggers]
    with warnings.catch_warnings():
        # Lightning 2.6.6 uses a part of PyTorch's pytree that 2.14 has deprecated.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        try:
            for each in loggers:
                each.setLevel(logging.WARNING)
            yield
        finally:
            for each, level in zip(loggers, levels, strict=True):
                each.setLevel(level)
