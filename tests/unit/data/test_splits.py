from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpipe.config import DataConfig
from mlpipe.data.splits import Splits, plan_splits
from mlpipe.errors import UserError

DATA = DataConfig(dataset="images")


def labels_of(*counts: int) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


def parts(splits: Splits) -> tuple[set[int], set[int], set[int]]:
    """Positions in the source: training, validation, test."""
    training = np.flatnonzero(~splits.is_test)
    return (
        set(training[splits.train_indices].tolist()),
        set(training[splits.val_indices].tolist()),
        set(np.flatnonzero(splits.is_test).tolist()),
    )


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(6, 60), min_size=2, max_size=12), seed=st.integers(0, 5), own_test=st.booleans())
def test_disjoint_complete_and_stratified(counts: list[int], seed: int, own_test: bool) -> None:
    labels = labels_of(*counts)
    data = DataConfig(dataset="images", split_seed=seed)
    is_test = None
    if own_test:
        is_test = np.zeros(len(labels), bool)
        is_test[np.cumsum([0, *counts[:-1]])] = True
    splits = plan_splits(labels, is_test, [str(i) for i in range(len(counts))], data)
    train, val, test = parts(splits)
    assert train | val | test == set(range(len(labels)))
    assert len(train) + len(val) + len(test) == len(labels)
    assert set(labels[sorted(train)]) == set(labels[sorted(test)]) == set(range(len(counts)))
    assert len(val) >= len(counts)
    if is_test is not None:
        assert (splits.is_test == is_test).all()
    for position, count in enumerate(counts):  # shares as asked for, to the image
        share = sum(labels[i] == position for i in val) / max(sum(labels[i] == position for i in train | val), 1)
        assert abs(share - len(val) / len(train | val)) * count <= 1.5


def test_the_seed_decides() -> None:
    labels = labels_of(50, 50)
    again = [plan_splits(labels, None, "ab", DataConfig(dataset="images", split_seed=seed)) for seed in (0, 0, 1)]
    assert parts(again[0]) == parts(again[1])
    assert parts(again[0]) != parts(again[2])


def test_indices_ascend() -> None:
    splits = plan_splits(labels_of(50, 50), None, "ab", DATA)
    assert (np.diff(splits.train_indices) > 0).all()
    assert (np.diff(splits.val_indices) > 0).all()


def test_too_few_images_of_a_class() -> None:
    with pytest.raises(UserError, match="^data_uri: each class needs at least 6 images .*'b' has 5; add images"):
        plan_splits(labels_of(50, 5), None, "ab", DATA)
    with pytest.raises(UserError, match="at least 20 images .*'a' has 19"):
        plan_splits(labels_of(19, 50), None, "ab", DataConfig(dataset="images", test_fraction=0.05))
    is_test = np.array([True, False, False, False, False, True, False, False, False, False, False])
    with pytest.raises(UserError, match="at least 5 images in train/, but 'a' has 4"):
        plan_splits(labels_of(5, 6), is_test, "ab", DATA)
    is_test[5] = False
    with pytest.raises(UserError, match="at least 1 image in test/, but 'b' has 0"):
        plan_splits(labels_of(5, 6), is_test, "ab", DATA)
    with pytest.raises(UserError, match="'a' has 0, 'b' has 1, 'c' has 0, 'd' has 1, 'e' has 0, …"):
        plan_splits(np.array([1, 3]), None, "abcdef", DATA)
