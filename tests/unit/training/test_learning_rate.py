"""The range test of the learning rate, and the largest batch, as a training uses them."""

from __future__ import annotations

import pytest
import torch

from mlpipe.errors import UserError
from mlpipe.training.checkpoints import CheckpointStore


def same(first, second) -> bool:
    states = (each.predictor.state_dict().values() for each in (first, second))
    return all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def found(tracking) -> float:
    return float(tracking.params["found_learning_rate"])


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_the_found_rate_trains_and_is_always_the_same(optimizer, dataset, config, train, tracking) -> None:
    model = config(optimizer=optimizer, learning_rate=0.01, find_learning_rate=True)
    first = train(model, dataset, tracking)
    rate = found(tracking)
    assert 1e-5 <= rate <= 1
    curve = [row for row in tracking.metrics if "find_learning_rate/loss" in row]
    assert len(curve) > 20
    assert curve[0]["find_learning_rate/rate"] == pytest.approx(1e-5)
    second = train(model, dataset, tracking)
    assert found(tracking) == rate
    assert same(first, second)
    assert same(first, train(config(optimizer=optimizer, learning_rate=rate), dataset, tracking))


def test_a_training_with_a_found_rate_resumes(dataset, config, train, tracking, store) -> None:
    model = config(num_epochs=3, learning_rate=0.01, find_learning_rate=True)
    whole = train(model, dataset, tracking)
    checkpoints = CheckpointStore(store, "run")
    tracking.fail_at = 2
    with pytest.raises(ConnectionError):
        train(model, dataset, tracking, checkpoints=checkpoints)
    tracking.fail_at = None
    assert same(whole, train(model, dataset, tracking, checkpoints=checkpoints))


def test_a_rate_beyond_all_reason_says_what_to_do(dataset, config, train, tracking) -> None:
    with pytest.raises(UserError, match=r"find_learning_rate: .* give a learning_rate instead"):
        train(config(optimizer="sgd", learning_rate=1e9, find_learning_rate=True), dataset, tracking)


def test_the_largest_batch_leaves_ten_steps_to_an_epoch(dataset, config, train, tracking) -> None:
    train(config(find_batch_size=True), dataset, tracking)
    assert tracking.params["images_per_step"] == len(dataset.train_split()) // 10, "all of so few images fit"
