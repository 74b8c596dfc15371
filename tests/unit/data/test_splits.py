from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlpipe.config import DataConfig
from mlpipe.data.splits import DecodedImages, plan_splits
from mlpipe.errors import UserError

DATA = DataConfig(dataset="images")


def images_of(*counts: int, seed: int = 0) -> DecodedImages:
    """Images with random contents, class by class; they are called a, b, c, …"""
    total = sum(counts)
    return DecodedImages(
        classes=tuple("abcdefghijklmnop"[: len(counts)]),
        labels=np.repeat(np.arange(len(counts)), counts),
        hashes=np.random.default_rng(seed).integers(0, 2**64, total, np.uint64),
        groups=np.arange(total),
    )


def joined(first: DecodedImages, second: DecodedImages) -> DecodedImages:
    parts = [np.concatenate([getattr(first, name), getattr(second, name)]) for name in ("labels", "hashes")]
    return DecodedImages(classes=first.classes, labels=parts[0], hashes=parts[1], groups=np.arange(len(parts[0])))


@example(counts=[44, 6], seed=5, own_test=False)  # chance leaves the six no training image
@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(6, 60), min_size=2, max_size=12), seed=st.integers(0, 5), own_test=st.booleans())
def test_disjoint_complete_and_with_every_class(counts: list[int], seed: int, own_test: bool) -> None:
    images = images_of(*counts, seed=seed)
    if own_test:
        is_test = np.zeros(len(images.labels), bool)
        is_test[np.cumsum([0, *counts[:-1]])] = True
        images = replace(images, is_test=is_test)
    splits = plan_splits(images, replace(DATA, split_seed=seed))
    assert (splits.is_train.astype(int) + splits.is_val + splits.is_test == 1).all()
    for chosen in (splits.is_train, splits.is_val, splits.is_test):
        assert set(images.labels[chosen]) == set(range(len(counts)))
    if own_test:
        assert (splits.is_test == images.is_test).all()


@pytest.mark.parametrize("share", [0.1, 0.02])
def test_shares_are_as_asked_for(share: float) -> None:
    splits = plan_splits(images_of(5000, 5000), replace(DATA, validation_fraction=share))
    for label in (0, 1):
        members = splits.labels == label
        assert splits.is_test[members].mean() == pytest.approx(0.2, abs=0.02)
        assert (splits.is_val[members].sum() / (~splits.is_test)[members].sum()) == pytest.approx(
            share, abs=0.2 * share
        )


def test_the_source_s_own_validation_images_are_used() -> None:
    images = images_of(20, 20)
    numbers = np.arange(40)
    images = replace(images, is_test=numbers % 4 == 0, is_val=numbers % 4 == 1)
    splits = plan_splits(images, DATA)
    assert (splits.is_val == (numbers % 4 == 1)).all()
    assert (splits.is_train == (numbers % 4 > 1)).all()
    assert not splits.notes
    asked = plan_splits(images, replace(DATA, validation_fraction=0.3))
    assert (asked.is_val == splits.is_val).all()
    assert asked.notes == ("validation_fraction 0.3 is not used, since there are validation images already",)


@settings(max_examples=40, deadline=None)
@given(before=st.integers(6, 80), added=st.integers(1, 80), seed=st.integers(0, 20))
def test_no_image_moves_to_the_test_split_when_others_are_added(before: int, added: int, seed: int) -> None:
    old, new = images_of(before, before, seed=seed), images_of(added, added, seed=seed + 1000)
    was_test = plan_splits(old, DATA).is_test
    is_test = plan_splits(joined(old, new), DATA).is_test[: 2 * before]
    assert not (is_test & ~was_test).any()


def test_a_large_data_set_keeps_every_split_when_it_grows() -> None:
    old, new = images_of(60, 60), images_of(20, 20, seed=1)
    before, after = plan_splits(old, DATA), plan_splits(joined(old, new), DATA)
    for name in ("is_train", "is_val", "is_test"):
        np.testing.assert_array_equal(getattr(after, name)[:120], getattr(before, name))


def test_near_duplicates_stay_on_one_side() -> None:
    images = images_of(200, 200)
    images = replace(images, groups=np.arange(400) // 4)
    splits = plan_splits(images, DATA)
    for side in (splits.is_train, splits.is_val, splits.is_test):
        assert set(side.reshape(-1, 4).sum(axis=1)) == {0, 4}


def test_the_seed_decides() -> None:
    images = images_of(50, 50)
    first, again, other = (plan_splits(images, replace(DATA, split_seed=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.is_test, again.is_test)
    assert (first.is_test != other.is_test).any()


def test_images_left_aside_are_in_no_split() -> None:
    images = images_of(20, 20)
    labels = images.labels.copy()
    labels[::7] = -1
    splits = plan_splits(replace(images, labels=labels), DATA)
    assert not (splits.is_train | splits.is_val | splits.is_test)[::7].any()


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (images_of(50, 5), "class 'b' has 5 images, 6 needed"),
        (
            replace(images_of(5, 6), is_test=np.isin(np.arange(11), (0, 5))),
            "class 'a' has 4 images in train/, 5 needed",
        ),
        (replace(images_of(6, 6), is_test=np.arange(12) == 0), "class 'b' has 0 images in test/, 1 needed"),
    ],
    ids=["too few", "too few in train", "none in test"],
)
def test_small_classes_are_refused_or_left_out(images: DecodedImages, reason: str) -> None:
    with pytest.raises(UserError, match=f"^data_uri: {reason}.*. Add images, or set small_classes to leave_out"):
        plan_splits(images, DATA)
    with pytest.raises(UserError, match="Without such classes fewer than 2 are left"):
        plan_splits(images, replace(DATA, small_classes="leave_out"))


def test_a_small_class_is_left_out_and_the_others_keep_their_names() -> None:
    splits = plan_splits(images_of(20, 2, 30), replace(DATA, small_classes="leave_out"))
    assert splits.classes == ("a", "c")
    assert np.bincount(splits.labels[splits.labels >= 0]).tolist() == [20, 30]
    assert splits.notes == ("1 of 3 classes (2 images) were left out: class 'b' has 2 images, 6 needed",)


def test_a_class_of_one_picture_cannot_be_split() -> None:
    images = images_of(40, 20, 40)
    images = replace(images, groups=np.concatenate([np.arange(40), np.full(20, 40), np.arange(41, 81)]))
    with pytest.raises(
        UserError, match="class 'b' has 20 images of 1 different picture, and none is left for training"
    ):
        plan_splits(images, DATA)
    splits = plan_splits(images, replace(DATA, small_classes="leave_out"))
    assert splits.classes == ("a", "c")
    assert splits.notes[0].startswith(
        "1 of 3 classes (20 images) were left out: class 'b' has 20 images of 1 different"
    )
    for chosen in (splits.is_train, splits.is_val, splits.is_test):
        assert set(splits.labels[chosen]) == {0, 1}
