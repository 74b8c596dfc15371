"""Which image serves what. Test images are set aside first, validation images are taken from the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from mlpipe.config import DataConfig
from mlpipe.errors import UserError

MIN_TRAINING_IMAGES = 5
"""Of each class in a source with a split of its own, validation images included."""


@dataclass(frozen=True)
class Splits:
    """Disjoint; together all images."""

    is_test: NDArray[np.bool_]
    """(N,)"""
    train_indices: NDArray[np.int64]
    """Positions among the images that are not test images, ascending."""
    val_indices: NDArray[np.int64]
    """Likewise."""


def plan_splits(
    labels: NDArray[np.int64], is_test: NDArray[np.bool_] | None, classes: Sequence[str], data: DataConfig
) -> Splits:
    """Split stratified by class; the same labels and `data.split_seed` give the same splits.

    Args:
        labels: (N,)
        is_test: (N,) the source's own test images; `None`: `data.test_fraction` of all are chosen.

    Raises:
        UserError: a class has too few images; says which, how many and what is needed.
    """
    if is_test is None:
        # With 1 / fraction images of a class its share of the test images is at least one.
        needed = max(MIN_TRAINING_IMAGES + 1, math.ceil(1 / data.test_fraction))
        _check_counts(labels, classes, needed, "to be split into training, validation and test images")
        is_test = np.zeros(len(labels), bool)
        num_test = max(math.ceil(data.test_fraction * len(labels)), len(classes))
        is_test[_stratified_part(labels, num_test, data.split_seed)] = True
    else:
        _check_counts(labels[is_test], classes, 1, "in test/")
        _check_counts(labels[~is_test], classes, MIN_TRAINING_IMAGES, "in train/")
    training = labels[~is_test]
    num_val = max(math.ceil(data.validation_fraction * len(training)), len(classes))
    val_indices = _stratified_part(training, num_val, data.split_seed)
    train_indices = np.setdiff1d(np.arange(len(training), dtype=np.int64), val_indices)
    return Splits(is_test, train_indices, val_indices)


def _stratified_part(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """`count` positions, ascending, with the classes in proportion."""
    _, chosen = train_test_split(
        np.arange(len(labels), dtype=np.int64), test_size=count, stratify=labels, random_state=seed
    )
    return np.sort(chosen)


def _check_counts(labels: NDArray[np.int64], classes: Sequence[str], needed: int, purpose: str) -> None:
    counts = np.bincount(labels, minlength=len(classes))
    short = np.flatnonzero(counts < needed)
    if len(short):
        some = ", ".join(f"{classes[i]!r} has {counts[i]}" for i in short[:5]) + (", …" if len(short) > 5 else "")
        raise UserError(
            f"data_uri: each class needs at least {needed} image{'s' * (needed > 1)} {purpose}, but {some}; "
            "add images or leave the class out"
        )
