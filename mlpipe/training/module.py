"""The Lightning module: one for all networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, PolynomialLR

from mlpipe.config import NetworkSettings
from mlpipe.models.portable import enlarge, normalise
from mlpipe.training import group
from mlpipe.training.augmentation import augment, mix, shrink
from mlpipe.training.optimizers import build_optimizers
from mlpipe.training.teacher import WEIGHT, Teacher, distillation_loss

MIN_IMAGE_SIZE = 16
"""Height and width below which images are not shrunk, pixels."""


def scale_of(config: NetworkSettings, epoch: int) -> float:
    """Share of their height and width that an epoch, from 0, shows training images at; the last shows all."""
    return 0.5 if config.progressive_resizing and 2 * (epoch + 1) <= config.num_epochs else 1.0


def shown_size(config: NetworkSettings, whole: int, epoch: int) -> int:
    """Height and width that an epoch, from 0, shows training images of that size at."""
    return min(whole, max(round(whole * scale_of(config, epoch)), MIN_IMAGE_SIZE))


class EpochTotals:
    """Sums of loss and hits over an epoch, kept on the device: reading them is the only synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), device=device)
        self._hits = torch.zeros((), device=device, dtype=torch.int64)
        self.num_images = 0

    def state(self) -> dict[str, Tensor | int]:
        """What `restored` takes."""
        return {"loss": self._loss.cpu(), "hits": self._hits.cpu(), "num_images": self.num_images}

    @classmethod
    def restored(cls, state: Mapping[str, Any], device: torch.device) -> Self:
        """Totals that go on where others were."""
        totals = cls(device)
        totals._loss += state["loss"].to(device)
        totals._hits += state["hits"].to(device)
        totals.num_images = state["num_images"]
        return totals

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count one batch.

        Args:
            loss: () mean over the batch.
            logits: (B, num_classes).
            labels: (B,) int64.
        """
        self._loss += loss.detach() * len(labels)
        self._hits += (logits.detach().argmax(dim=1) == labels).sum()
        self.num_images += len(labels)

    def sum_over_group(self) -> None:
        """Add up the totals of all processes that train together; each must call it."""
        if group.size() == 1:
            return
        sums = torch.stack([self._loss.double(), self._hits.double(), self._loss.new_tensor(self.num_images).double()])
        distributed.all_reduce(sums)
        self._loss, self._hits = sums[0], sums[1]
        self.num_images = int(sums[2])

    def mean_loss(self) -> float:
        """Mean over the images counted so far."""
        return float(self._loss) / max(1, self.num_images)

    def accuracy(self) -> float:
        """Share of hits among the images counted so far, 0 to 1."""
        return float(self._hits) / max(1, self.num_images)


class ClassificationModule(LightningModule):
    """Trains a network on batches of (B, H, W, 3) uint8 images and (B,) int64 labels.

    Augmentation and normalisation act on whole batches, on the device.
    """

    mean: Tensor
    std: Tensor
    class_weights: Tensor | None
    training_totals: EpochTotals
    validation_totals: EpochTotals

    def __init__(
        self,
        network: nn.Module,
        train: NetworkSettings,
        *,
        channel_mean: tuple[float, float, float],
        channel_std: tuple[float, float, float],
        num_classes: int,
        total_steps: int,
        input_size: int | None = None,
        teacher: Teacher | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        """Prepare for `total_steps` optimizer steps; mean and deviation are in units of 0..1.

        Args:
            input_size: height and width to which images are enlarged, pixels; `None`: not at all.
            class_weights: (K,) of the loss; `None`: all the same.
            teacher: answers each batch; `None`: there is none, or its answers come with the batches.
        """
        super().__init__()
        # Automatic optimization is half of the time that Lightning adds to a step.
        self.automatic_optimization = False
        self.network = network.to(memory_format=torch.channels_last)
        self.train_config = train
        self.num_classes = num_classes
        self.total_steps = total_steps
        self.input_size = input_size
        self.loss_weight = 1.0
        self.first_epoch = 0
        self.totals_before: Mapping[str, Any] | None = None
        # In tuples: not parts of the module.
        self.teacher: tuple[Teacher, ...] = () if teacher is None else (teacher,)
        self._parallel: tuple[DistributedDataParallel, ...] = ()
        self.register_buffer("mean", torch.tensor(channel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.register_buffer("std", torch.tensor(channel_std).view(3, 1, 1), persistent=False)

    @property
    def epoch(self) -> int:
        """The epoch that goes on, from 0; attempts before this one counted."""
        return self.first_epoch + self.current_epoch

    def on_train_start(self) -> None:
        """Share the gradients with the other processes, where there are any."""
        if group.size() > 1:
            self._parallel = (DistributedDataParallel(self.network, gradient_as_bucket_view=True),)

    def on_train_epoch_start(self) -> None:
        """Count anew, or from where an attempt before was within this epoch."""
        if self.totals_before is None:
            self.training_totals = EpochTotals(self.device)
        else:
            self.training_totals = EpochTotals.restored(self.totals_before, self.device)
            self.totals_before = None

    def on_validation_epoch_start(self) -> None:
        """Count anew."""
        self.validation_totals = EpochTotals(self.device)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:  # noqa: ARG002
        """One step of the optimizers and of their schedules."""
        loss = self.training_loss(batch)
        with torch.autocast(self.device.type, enabled=False):
            self.network.zero_grad()
            self.manual_backward(loss if self.loss_weight == 1.0 else loss * self.loss_weight)
            for optimizer in self.trainer.optimizers:
                optimizer.step()
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler.step()  # type: ignore[call-arg]  # none that looks at a metric

    def training_loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Of one batch, augmented; it is counted."""
        images_u8, labels, *answers = batch
        images_u8 = augment(images_u8, self.train_config.augmentation, self.epoch)
        images, targets = mix(self.shown(images_u8), labels, self.train_config.mixing, self.num_classes)
        network = self._parallel[0] if self._parallel else self.network
        logits = network(shrink(images, shown_size(self.train_config, images.shape[-1], self.epoch)))
        loss = F.cross_entropy(
            logits, targets, weight=self.class_weights, label_smoothing=self.train_config.label_smoothing
        )
        self.training_totals.add(loss, logits, labels)
        if answers or self.teacher:
            taught = answers[0] if answers else self.teacher[0].logits(images_u8)
            loss = (1 - WEIGHT) * loss + WEIGHT * distillation_loss(logits.float(), taught)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Count one batch, without augmentation."""
        images_u8, labels = batch
        logits = self.network(self.shown(images_u8))
        self.validation_totals.add(F.cross_entropy(logits, labels), logits, labels)

    def shown(self, images_u8: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to what the network takes: (B, 3, H, W) float32, normalised and enlarged."""
        return enlarge(normalise(images_u8, self.mean, self.std), self.input_size)

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """The optimizers of the configuration, fused where PyTorch can, and their schedules."""
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizers = build_optimizers(trained, self.train_config)
        schedule = {"constant": None, "one_cycle": self._one_cycle, "linear": self._linear}[self.train_config.schedule]
        return optimizers, [schedule(optimizer) for optimizer in optimizers] if schedule else []

    def _linear(self, optimizer: Optimizer) -> LRScheduler:
        return PolynomialLR(optimizer, total_iters=self.total_steps, power=1.0)

    def _one_cycle(self, optimizer: Optimizer) -> LRScheduler:
        return OneCycleLR(
            optimizer,
            max_lr=self.train_config.learning_rate,
            total_steps=self.total_steps + 1,  # it moves on after the last step, too
            pct_start=0.25 if self.total_steps == 4 else 0.2,  # PyTorch 2.14 divides by the length of the rise: 0
            anneal_strategy="linear",
            cycle_momentum=False,
            div_factor=10,
            final_div_factor=100,
        )
