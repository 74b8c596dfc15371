"""Batches of raw images, gathered from memory, or on the device that trains when they fit into its memory.

A batch of 64 CIFAR-10 images takes 0.05 ms to gather here, so no worker processes are wanted; augmentation and
normalization are done per batch, on the device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlpipe.data.dataset import Split

BYTES_PER_COPY = 16 << 20


class BatchLoader:
    """Batches of a split: uint8 images (B, H, W, 3) and int64 labels (B,), on the CPU or where `keep_on` said.

    Can be given to Lightning's Trainer as a data loader; whoever trains calls `set_epoch` as an epoch starts. Every
    image comes once an epoch. Batches have `batch_size` images but for the last; a last image left alone joins the
    batch before it, since a batch of one has no variance to normalise by.

    With `with_answers` a batch has a third part: the rows (B, K) of the answers to its images.

    Several processes that train together each take a `share`: the batches are then of all of them together.
    """

    def __init__(self, split: Split, batch_size: int, seed: int, shuffle: bool) -> None:
        """
        Args:
            seed: of the order, with the epoch.
            shuffle: a new order each epoch; else the split's own, always.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is not allowed; give 1 or more")
        self._split = split
        self._labels = torch.from_numpy(np.array(split.labels, np.int64))
        self._kept: Tensor | None = None
        self._answers: Tensor | None = None
        self.batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = self._first_batch = 0
        self._rank, self._num_shards = 0, 1
        self._bounds = _bounds(len(split), batch_size, num_shards=1)

    def shard(self, rank: int, num_shards: int) -> BatchLoader:
        """A loader of every `num_shards`-th image of each batch, from the `rank`-th on.

        The shares of a batch differ by one image at most and hold at least two images each where the split and the
        batch size allow it: too few images left over for that join the batch before them.
        """
        loader = copy.copy(self)
        loader._rank, loader._num_shards = rank, num_shards
        loader._bounds = _bounds(self.num_images, self.batch_size, num_shards)
        return loader

    def with_answers(self, answers: Tensor) -> BatchLoader:
        """A loader whose batches also have the answers (N, K) to their images.

        Args:
            answers: in the split's order.
        """
        loader = copy.copy(self)
        loader._answers = answers.to(self._labels.device)
        return loader

    def keep_on(self, device: torch.device, max_bytes: int) -> None:
        """Copy images of at most `max_bytes` in all, and the labels, to a device, and gather batches there from now on.

        The processor then neither waits for the device nor sends it anything but the order of an epoch.
        """
        shape = self._split.images_u8.shape
        if math.prod(shape) > max_bytes:
            return
        self._kept = torch.empty(shape, dtype=torch.uint8, device=device)
        for part in self._split.images_u8.slices(BYTES_PER_COPY):
            self._kept[part] = torch.from_numpy(self._split.images_u8[part]).to(device)
        self._labels = self._labels.to(device)
        self._answers = None if self._answers is None else self._answers.to(device)

    def loss_weight(self, batch: int) -> float:
        """Size of this share of a batch over that of the mean share.

        The mean over the processes of the gradients of their mean losses, so weighted, is the gradient of the mean
        loss over all of the batch.
        """
        size = self._bounds[batch + 1] - self._bounds[batch]
        return len(range(self._rank, size, self._num_shards)) * self._num_shards / size

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, from 0, that the next iteration goes through; before `first_batch` it gives `None` each."""
        self._epoch, self._first_batch = epoch, first_batch

    def order(self) -> NDArray[np.int64]:
        """(N,) positions in the split, each once: a function of seed and epoch alone."""
        if not self._shuffle:
            return np.arange(self.num_images, dtype=np.int64)
        return np.random.default_rng([self._seed, self._epoch]).permutation(self.num_images)

    @property
    def num_images(self) -> int:
        """Of an epoch, all shares together."""
        return len(self._labels)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:  # and `None`, which Lightning passes over
        # A generator: Lightning asks for the iterator before its epoch begins; the order is made at the first batch.
        order = torch.from_numpy(self.order())
        there = order.to(self._labels.device)
        for number, (start, stop) in enumerate(pairwise(self._bounds)):
            if number < self._first_batch:
                yield None  # type: ignore[misc]
                continue
            part = slice(start + self._rank, stop, self._num_shards)
            if self._kept is None:
                images = torch.from_numpy(self._split.images_u8.take(order[part].numpy()))
            else:
                images = self._kept.index_select(0, there[part])
            rows = there[part]
            answers = () if self._answers is None else (self._answers[rows],)
            yield images, self._labels[rows], *answers


def _bounds(num_images: int, batch_size: int, num_shards: int) -> list[int]:
    bounds = [*range(0, num_images, batch_size), num_images]
    if num_images > batch_size and 0 < num_images % batch_size < 2 * num_shards:
        del bounds[-2]
    return bounds
