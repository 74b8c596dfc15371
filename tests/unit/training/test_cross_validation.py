"""Parts of a data set that are held out in turn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from mlpipe.data.dataset import Dataset, Split
from mlpipe.errors import UserError
from mlpipe.training.cross_validation import ACCURACY, ERROR, MEAN, cross_validate


@pytest.fixture
def numbered() -> Dataset:
    """100 images, the first byte of each its number; two classes, 60 and 40."""
    images = np.zeros((100, 8, 8, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(100)
    labels = (np.arange(100) % 5 >= 3).astype(np.int64)
    return Dataset.in_memory(("a", "b"), (images[:80], labels[:80]), (images[80:], labels[80:]))


def numbers(images: Any) -> set[int]:
    return set(np.asarray(images)[:, 0, 0, 0].tolist())


def test_each_image_is_held_out_once_and_unknown_to_its_training(numbered: Dataset) -> None:
    seen: list[int] = []
    for part, held_out in numbered.folds(5, seed=0):
        training, validation = numbers(part.train_split().images_u8), numbers(part.val_split().images_u8)
        out = numbers(held_out.images_u8)
        assert not training & validation
        assert training | validation == set(range(100)) - out
        assert np.bincount(held_out.labels).tolist() == [12, 8]
        assert part.manifest.class_counts["train"] == tuple(np.bincount(part.train_split().labels).tolist())
        assert part.manifest.num_val == len(part.val_split()) == 8
        seen += out
    assert sorted(seen) == list(range(100))
    assert len({part.manifest.digest for seed in (0, 1) for part, _ in numbered.folds(5, seed=seed)}) == 10


def test_more_parts_than_images_of_a_class_are_refused(numbered: Dataset) -> None:
    with pytest.raises(UserError, match="folds: 41 is not allowed; the smallest class has 40 different images"):
        next(numbered.folds(41, seed=0))


def test_no_class_is_missing_from_what_is_trained_on() -> None:
    labels = np.repeat(np.arange(20), 5)
    images = np.zeros((100, 2, 2, 3), np.uint8)
    few = Dataset.in_memory(tuple(map(str, range(20))), (images[:90], labels[:90]), (images[90:], labels[90:]))
    for seed in range(5):
        for part, _ in few.folds(2, seed=seed):
            assert len(set(part.train_split().labels)) == 20


class Recorder:
    def __init__(self) -> None:
        self.logged: list[tuple[float, int]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.logged.append((metrics[ACCURACY], step))

    def log_params(self, params: Mapping[str, Any]) -> None:
        raise AssertionError(params)

    def ensure_current(self) -> None:
        pass

    def last_logged_step(self, metric: str) -> int:
        raise AssertionError(metric)


class AlwaysA:
    def probabilities_of(self, split: Split) -> np.ndarray:
        return np.tile([0.9, 0.1], (len(split), 1))


def test_a_later_attempt_measures_only_what_is_missing(numbered: Dataset) -> None:
    tracking, trained = Recorder(), []

    def train(_: Dataset, silent: Any, number: int) -> Any:
        silent.log_metrics({"val/accuracy": 0.0}, step=1)
        silent.log_params({"device": "cpu"})
        trained.append(number)
        return AlwaysA()

    found = cross_validate(numbered, 4, 0, {1: 0.8, 3: 0.4}, tracking, train)
    assert trained == [2, 4]
    assert tracking.logged == [(0.6, 2), (0.6, 4)]
    assert found[MEAN] == pytest.approx(0.6)
    assert found[ERROR] == pytest.approx(np.std([0.8, 0.6, 0.4, 0.6], ddof=1) / math.sqrt(4))
