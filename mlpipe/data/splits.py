"""Which image serves what. The side that an image is on follows from its own bytes, so that a data set can grow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mlpipe.config import DataConfig
from mlpipe.errors import UserError

MIN_TRAINING_IMAGES = 5
"""Of each class, validation images included."""

_GOLDEN = 0x9E3779B97F4A7C15  # of splitmix64, S. Vigna, https://prng.di.unimi.it/splitmix64.c


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """What is known of a source's N images before they are decoded."""

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    """(N,) positions in `classes`; -1: the image is not used."""
    is_test: NDArray[np.bool_] | None = None
    """(N,) the source's own test images; `None`: it has none."""
    is_val: NDArray[np.bool_] | None = None
    """(N,) the source's own validation images; `None`: it has none."""


@dataclass(frozen=True, kw_only=True)
class DecodedImages(Labelled):
    """The same, and what decoding them has shown."""

    hashes: NDArray[np.uint64]
    """(N,) of the image files' bytes."""
    groups: NDArray[np.int64]
    """(N,) images with the same number are near-duplicates and stay on one side."""


AnyImages = TypeVar("AnyImages", bound=Labelled)


@dataclass(frozen=True)
class Splits:
    """Three disjoint sets of images, each as (N,) booleans; images that are not used are in none of them."""

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    """(N,) positions in `classes`; -1: not used."""
    is_train: NDArray[np.bool_]
    is_val: NDArray[np.bool_]
    is_test: NDArray[np.bool_]
    notes: tuple[str, ...] = ()
    """What a reader has to know of the splits, a sentence each."""


def plan_splits(images: DecodedImages, data: DataConfig) -> Splits:
    """Keep the source's own splits, and make those that it lacks.

    An image's hash, mixed with `data.split_seed`, is a number from 0 to 1. The lowest `data.test_fraction` are test
    images, and `data.validation_fraction` of the rest are validation images. So the shares of each class are as asked
    for up to chance, and no image moves from training to test when others are added. A class to which chance gives
    no test or validation image gets the one of lowest number, and one to which it leaves too few for the other splits
    keeps those of highest number there; they alone may become test images when the class grows. Near-duplicates go by
    the highest number among them.

    Raises:
        UserError: a class has too few images, or none for one of the splits; says which and how many.
    """
    images, notes = without_small_classes(images, data)
    splits = _split(images, data)
    if missing := _missing(images, splits):
        images, more = _without(images, missing, data)
        splits, notes = _split(images, data), (*notes, *more)
    if images.is_val is not None and data.validation_fraction != DataConfig.validation_fraction:
        notes += (
            f"validation_fraction {data.validation_fraction:g} is not used, since there are validation images already",
        )
    return replace(splits, notes=notes)


def _split(images: DecodedImages, data: DataConfig) -> Splits:
    used = images.labels >= 0
    number = _numbers(images, data.split_seed)
    if images.is_test is None:
        is_test = used & (number < data.test_fraction)
        _give_each_class_one(is_test, used, number, images)
        _leave_each_class(is_test, used, number, images, count=2 if images.is_val is None else 1)
        number = (number - data.test_fraction) / (1 - data.test_fraction)
    else:
        is_test = used & images.is_test
    training = used & ~is_test
    if images.is_val is None:
        is_val = training & (number < data.validation_fraction)
        _give_each_class_one(is_val, training, number, images)
        _leave_each_class(is_val, training, number, images, count=1)
    else:
        is_val = training & images.is_val
    return Splits(images.classes, images.labels, training & ~is_val, is_val, is_test)


def _missing(images: DecodedImages, splits: Splits) -> dict[int, str]:
    """Why a class has no image in one of the splits, by its position.

    Its images may be near-duplicates of each other, or so few that chance has put all of them elsewhere.
    """
    found: dict[int, str] = {}
    for purpose, chosen in (("training", splits.is_train), ("validation", splits.is_val), ("testing", splits.is_test)):
        for position in np.setdiff1d(np.arange(len(images.classes)), images.labels[chosen]):
            members = images.labels == position
            different = len(np.unique(images.groups[members]))
            reason = (
                f"class {images.classes[position]!r} has {_number(members.sum())} of {different} different "
                f"{'picture' if different == 1 else 'pictures'}, and none is left for {purpose}"
            )
            found.setdefault(int(position), reason)
    return found


def _numbers(images: DecodedImages, seed: int) -> NDArray[np.float64]:
    """(N,) a number from 0 to 1 for each image, the same for near-duplicates."""
    mixed = images.hashes + np.uint64((seed + 1) * _GOLDEN % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    own = (mixed ^ (mixed >> np.uint64(31))) / 2.0**64
    highest = np.zeros(images.groups.max(initial=-1) + 1)
    np.maximum.at(highest, images.groups, own)
    return highest[images.groups]


def _give_each_class_one(
    chosen: NDArray[np.bool_], among: NDArray[np.bool_], number: NDArray[np.float64], images: DecodedImages
) -> None:
    """Add, to `chosen`, the images of lowest number of each class that has none there."""
    lacking = np.setdiff1d(images.labels[among], images.labels[chosen])
    for label in lacking:
        members = np.flatnonzero(among & (images.labels == label))
        first = images.groups[members[number[members].argmin()]]
        chosen |= among & (images.groups == first)


def _leave_each_class(
    chosen: NDArray[np.bool_],
    among: NDArray[np.bool_],
    number: NDArray[np.float64],
    images: DecodedImages,
    *,
    count: int,
) -> None:
    """Take, from `chosen`, the images of highest number of each class that has fewer than `count` outside of it.

    One different picture of the class stays in `chosen`.
    """
    outside = np.bincount(images.labels[among & ~chosen], minlength=len(images.classes))
    for label in np.flatnonzero(outside < count):
        members = among & (images.labels == label)
        inside, left = (set(images.groups[members & side]) for side in (chosen, ~chosen))
        highest = sorted(inside, key=lambda group: number[members & (images.groups == group)].max(), reverse=True)
        taken = highest[: max(0, min(count - len(left), len(inside) - 1))]
        chosen &= ~(among & np.isin(images.groups, taken))


def without_small_classes(images: AnyImages, data: DataConfig) -> tuple[AnyImages, tuple[str, ...]]:
    """The images without classes that cannot be trained on or tested, if they are to be left out.

    Raises:
        UserError: there are such classes, and they are to be refused; or fewer than two are left.
    """
    short = _shortages(images, data)
    return _without(images, short, data) if short else (images, ())


def _without(images: AnyImages, short: Mapping[int, str], data: DataConfig) -> tuple[AnyImages, tuple[str, ...]]:
    """The images without those classes, if they are to be left out; `short` says why, by a class's position."""
    some = "; ".join(reason for _, reason in sorted(short.items())[:5]) + ("; …" if len(short) > 5 else "")
    if data.small_classes == "refuse":
        raise UserError(
            f"data_uri: {some}. Add images, or set small_classes to leave_out to go on without "
            f"{'this class' if len(short) == 1 else 'these classes'}"
        )
    kept = [position for position in range(len(images.classes)) if position not in short]
    if len(kept) < 2:
        raise UserError(f"data_uri: {some}. Without such classes fewer than 2 are left; add images")
    renumber = np.full(len(images.classes) + 1, -1)  # the last one is for -1
    renumber[kept] = np.arange(len(kept))
    fewer = replace(images, classes=tuple(images.classes[i] for i in kept), labels=renumber[images.labels])
    num_images = int(((images.labels >= 0) & (fewer.labels < 0)).sum())
    return fewer, (f"{len(short)} of {len(images.classes)} classes ({num_images:,} images) were left out: {some}",)


def _shortages(images: Labelled, data: DataConfig) -> dict[int, str]:
    """What is too little of a class, by its position."""
    num_classes = len(images.classes)

    def count(chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(images.labels[chosen & (images.labels >= 0)], minlength=num_classes)

    everywhere = np.ones(len(images.labels), bool)
    if images.is_test is None and images.is_val is None:
        # With 1 / fraction images of a class its share of the test images is at least one.
        needed = max(MIN_TRAINING_IMAGES + 1, math.ceil(1 / data.test_fraction))
        parts = [("", needed, count(everywhere))]
    else:
        is_test = np.zeros(len(images.labels), bool) if images.is_test is None else images.is_test
        is_val = np.zeros(len(images.labels), bool) if images.is_val is None else images.is_val & ~is_test
        parts = [(" in train/", MIN_TRAINING_IMAGES, count(~is_test & ~is_val))]
        if images.is_val is not None:
            parts.append((" in the validation folder", 1, count(is_val)))
        if images.is_test is not None:
            parts.append((" in test/", 1, count(is_test)))
    short: dict[int, str] = {}
    for where, needed, counts in parts:
        for position in np.flatnonzero(counts < needed):
            found = f"class {images.classes[position]!r} has {_number(counts[position])}{where}, {needed} needed"
            short.setdefault(int(position), found)
    return short


def _number(count: int) -> str:
    return f"{count} image" if count == 1 else f"{count} images"


def listed(items: Sequence[str], most: int = 3) -> str:
    """The first few items, for a sentence."""
    return ", ".join(items[:most]) + (", …" if len(items) > most else "")
