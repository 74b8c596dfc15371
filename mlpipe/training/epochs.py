"""What happens around the epochs: order and randomness, metrics, the best weights, checkpoints, progress lines."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim.swa_utils import update_bn

from mlpipe.data.batches import BatchLoader
from mlpipe.errors import UserError
from mlpipe.training import group
from mlpipe.training.checkpoints import CheckpointStore
from mlpipe.training.module import ClassificationModule, scale_of
from mlpipe.training.protocol import TrainingLogger

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0
"""Least time between two progress lines within an epoch."""

SAVE_SECONDS = 300.0
"""Least time between two checkpoints within an epoch."""

IMAGES_TO_NORMALIZE_BY = 10_000
"""How many training images give precise means and variances; the running ones hold some batches of augmented images."""

LOGGED = ("train/loss", "train/accuracy", "val/loss", "val/accuracy", "learning_rate", "images_per_second")
"""What of an epoch's record goes to the tracking; the durations are for the totals at the end."""


class EpochCallback(Callback):
    """What every process of a training does around its epochs.

    All randomness of an epoch depends on the seed, the epoch's number and the process's rank alone. So a training that
    is resumed at the start of an epoch needs no state of a random generator, on any device.
    """

    def __init__(self, loader: BatchLoader, *, seed: int, resumed: dict[str, Any] | None) -> None:
        """
        Args:
            loader: the training batches, this process's share of them.
            resumed: `weights`, `optimizers` and `schedules` as the last attempt left them, and `within`, where it was
                within an epoch; `None`: a new training.
        """
        self.resumed = resumed
        self._within: dict[str, Any] | None = None
        self.loader = loader
        self._seed = seed

    def on_train_start(self, trainer: Trainer, pl_module: ClassificationModule) -> None:  # type: ignore[override]
        """Put the network, the optimizers and the schedules where the last attempt left them."""
        if self.resumed is None:
            return
        pl_module.network.load_state_dict(self.resumed["weights"])
        for optimizer, state in zip(trainer.optimizers, self.resumed["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for config, state in zip(trainer.lr_scheduler_configs, self.resumed["schedules"], strict=True):
            config.scheduler.load_state_dict(state)
        self._within = self.resumed.get("within")
        self.resumed = None  # its memory

    def on_train_epoch_start(self, trainer: Trainer, pl_module: ClassificationModule) -> None:  # type: ignore[override] # noqa: ARG002
        """Set the order and the random numbers of this epoch."""
        epoch, rank = pl_module.epoch, group.rank()
        within, self._within = self._within, None
        self.loader.set_epoch(epoch, within["batches"] if within else 0)
        source = f"{self._seed} {epoch} {rank}" if rank else f"{self._seed} {epoch}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big"))
        if within:
            pl_module.totals_before = within["totals"]
            torch.set_rng_state(within["random"])
            # Where the attempt before was on the CPU, the device goes on from the epoch's seed.
            if pl_module.device.type == "cuda" and within["random_of_device"] is not None:
                torch.cuda.set_rng_state(within["random_of_device"], pl_module.device)

    def on_train_batch_start(  # type: ignore[override]
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: ClassificationModule,
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Shares of one batch may differ by an image."""
        pl_module.loss_weight = self.loader.loss_weight(batch_idx)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: ClassificationModule) -> None:  # type: ignore[override]
        """Make batch normalization precise where that is wanted (Y. Wu, J. Johnson, arXiv:2105.07576).

        For the last epoch alone: in all others the weights change too much, and it would take as long.
        """
        config = pl_module.train_config
        if not config.precise_batch_norm or pl_module.epoch + 1 < config.num_epochs:
            return
        self.loader.set_epoch(pl_module.epoch)  # also where it was resumed within
        batches = islice(self.loader, math.ceil(IMAGES_TO_NORMALIZE_BY / self.loader.batch_size))
        with trainer.precision_plugin.forward_context():
            shown = (pl_module.shown(images_u8.to(pl_module.device)) for images_u8, *_ in batches)
            update_bn(shown, pl_module.network)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: ClassificationModule) -> None:  # type: ignore[override]
        """Sum what all processes have counted; the first of them decides whether to go on."""
        pl_module.training_totals.sum_over_group()
        pl_module.validation_totals.sum_over_group()
        if group.as_the_first(self._end_epoch(trainer, pl_module), pl_module.device):
            trainer.should_stop = True

    def _end_epoch(self, trainer: Trainer, module: ClassificationModule) -> bool:  # noqa: ARG002
        """Whether training ends here; of the first process alone it is asked."""
        return False


class CheckpointCallback(EpochCallback):
    """Keeps the state of a training at the end of each epoch, on one device also within long ones, and reports it.

    There is one in a training.
    """

    def __init__(
        self,
        loader: BatchLoader,
        tracking: TrainingLogger,
        checkpoints: CheckpointStore | None,
        *,
        fingerprint: str,
        seed: int,
        patience: int | None,
    ) -> None:
        """Resume from the checkpoint, where there is one of this configuration.

        Args:
            loader: the training batches, this process's share of them.
            fingerprint: identifies model, settings and data; a checkpoint of another one is not used.
            patience: epochs without a better validation accuracy after which training ends.
        """
        self.history: list[dict[str, float]] = []
        self.best_weights: dict[str, Tensor] = {}
        self._tracking = tracking
        self._checkpoints = checkpoints
        self._fingerprint = fingerprint
        self._patience = patience
        super().__init__(loader, seed=seed, resumed=self._load())
        self._started = self._trained = self._reported = self._saved = 0.0

    @property
    def best_epoch(self) -> int:
        """The epoch, from 1, of highest val/accuracy; among equals that of lowest val/loss."""
        return 1 + max(range(len(self.history)), key=lambda i: self._merit(self.history[i]))

    @property
    def finished(self) -> bool:
        """Whether early stopping has ended the training."""
        accuracies = [metrics["val/accuracy"] for metrics in self.history]
        if self._patience is None or not accuracies:
            return False
        last_rise = 1 + accuracies.index(max(accuracies))
        return len(accuracies) - last_rise >= self._patience

    @staticmethod
    def _merit(metrics: dict[str, float]) -> tuple[float, float]:
        return metrics["val/accuracy"], -metrics["val/loss"]

    def _load(self) -> dict[str, Any] | None:
        state = self._checkpoints.load() if self._checkpoints else None
        if state is None:
            return None
        if state["fingerprint"] != self._fingerprint:
            logger.warning("the checkpoint of this run is of another configuration or data set; training starts anew")
            return None
        self.history, self.best_weights = state["history"], state["best_weights"]
        within = state["within"]
        batch = f", batch {within['batches']} of the next" if within else ""
        logger.info("resuming after epoch %d%s", len(self.history), batch)
        last_logged = self._tracking.last_logged_step("val/accuracy")
        for epoch in range(last_logged + 1, len(self.history) + 1):  # saved, but interrupted before it was logged
            self._log(epoch)
        return {name: state[name] for name in ("weights", "optimizers", "schedules", "within")}

    def _save(self, trainer: Trainer, module: ClassificationModule, within: dict[str, Any] | None = None) -> None:
        if self._checkpoints is None:
            return
        weights = module.network.state_dict()
        schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        self._checkpoints.save(
            {
                "fingerprint": self._fingerprint,
                "history": self.history,
                # The same tensors where this epoch is the best: they are then stored once.
                "best_weights": weights if not within and self.best_epoch == len(self.history) else self.best_weights,
                "weights": weights,
                "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
                "schedules": schedules,
                "within": within,
            }
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: ClassificationModule) -> None:  # type: ignore[override]
        """Also note the time."""
        before = self._within["seconds"] if self._within else 0.0
        super().on_train_epoch_start(trainer, pl_module)
        self._reported = self._saved = time.monotonic()
        self._started = self._reported - before

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: ClassificationModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Say now and then how far a long epoch is, from this process's share, and save its state."""
        now = time.monotonic()
        if batch is None:
            return
        if group.size() == 1 and now - self._saved >= SAVE_SECONDS and batch_idx + 1 < trainer.num_training_batches:
            self._save_within(trainer, pl_module, batch_idx + 1, now - self._started)
        if now - self._reported < PROGRESS_SECONDS:
            return
        self._reported = now
        totals = pl_module.training_totals
        rate = totals.num_images * group.size() / (now - self._started)
        logger.info(
            "epoch %d/%d: batch %d of %d, train/loss %.4f, train/accuracy %.4f, %.0f images/s",
            pl_module.epoch + 1, pl_module.train_config.num_epochs, batch_idx + 1, trainer.num_training_batches,
            totals.mean_loss(), totals.accuracy(), rate,
        )  # fmt: skip

    def _save_within(self, trainer: Trainer, module: ClassificationModule, batches: int, seconds: float) -> None:
        self._tracking.ensure_current()
        on_gpu = module.device.type == "cuda"
        within = {
            "batches": batches,
            "seconds": seconds,
            "totals": module.training_totals.state(),
            "random": torch.get_rng_state(),
            "random_of_device": torch.cuda.get_rng_state(module.device) if on_gpu else None,
        }
        self._save(trainer, module, within)
        self._saved = time.monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: ClassificationModule) -> None:  # type: ignore[override] # noqa: ARG002
        """Note how long the training part of the epoch took; reading the loss waits for the device."""
        pl_module.training_totals.mean_loss()
        self._trained = time.monotonic()

    def _end_epoch(self, trainer: Trainer, module: ClassificationModule) -> bool:
        """Record, save, log and decide whether to end, in this order.

        Saved before it is logged: an epoch that was logged is never trained again, and one that was saved but not
        logged is logged on resuming.
        """
        metrics = self._measure(trainer, module)
        epoch = module.epoch + 1
        self._tracking.ensure_current()
        if not math.isfinite(metrics["train/loss"] + metrics["val/loss"]):
            rate = module.train_config.learning_rate
            raise UserError(
                f"learning_rate: {rate:g} made the loss infinite in epoch {epoch}; "
                f"choose a smaller one, such as {rate / 10:g}"
            )
        self.history.append(metrics)
        if self.best_epoch == epoch:
            self.best_weights = {key: value.cpu().clone() for key, value in module.network.state_dict().items()}
        self._save(trainer, module)
        self._log(epoch)
        self._report(epoch, module)
        if self.finished:
            logger.info("val/accuracy has not risen for %d epochs: stopping early", self._patience)
        return self.finished

    def _measure(self, trainer: Trainer, module: ClassificationModule) -> dict[str, float]:
        seconds = self._trained - self._started
        return {
            "train/loss": module.training_totals.mean_loss(),
            "train/accuracy": module.training_totals.accuracy(),
            "val/loss": module.validation_totals.mean_loss(),
            "val/accuracy": module.validation_totals.accuracy(),
            "learning_rate": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "images_per_second": module.training_totals.num_images / seconds,
            "train_seconds": seconds,
            "epoch_seconds": time.monotonic() - self._started,
        }

    def _log(self, epoch: int) -> None:
        self._tracking.log_metrics({name: self.history[epoch - 1][name] for name in LOGGED}, step=epoch)

    def _report(self, epoch: int, module: ClassificationModule) -> None:
        last = self.history[-1]
        # Images of twice the height and width took resnet18 2.3 times as long on a CPU, not four times.
        num_epochs = module.train_config.num_epochs
        costs = [scale_of(module.train_config, each) for each in range(num_epochs)]
        remaining = last["epoch_seconds"] * sum(costs[epoch:]) / costs[epoch - 1]
        logger.info(
            "epoch %d/%d: train/loss %.4f, train/accuracy %.4f, val/loss %.4f, val/accuracy %.4f%s, %.0f images/s, "
            "eta %.0f s",
            epoch, num_epochs, last["train/loss"], last["train/accuracy"], last["val/loss"],
            last["val/accuracy"], " (best)" if self.best_epoch == epoch else "", last["images_per_second"], remaining,
        )  # fmt: skip
