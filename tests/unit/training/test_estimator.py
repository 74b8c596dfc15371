"""Fitting the linear model."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
import torch

from mlpipe.config import ModelConfig
from mlpipe.data.dataset import Dataset
from mlpipe.errors import UserError
from mlpipe.models.features.oriented_gradients import features
from mlpipe.models.registry import describe
from mlpipe.training.estimator import train_estimator
from mlpipe.training.protocol import TrainedModel, TrainingLogger


def fit(model: ModelConfig, dataset: Dataset, tracking: TrainingLogger) -> TrainedModel:
    return train_estimator(model, describe(model, dataset.manifest), dataset, tracking)


def test_it_learns_and_reports_like_the_networks(new_dataset, config, tracking) -> None:
    trained = fit(config("logistic_regression"), new_dataset(num_train=300), tracking)
    assert trained.metrics["val/accuracy"] > 0.9
    assert set(trained.metrics) == {"val/accuracy", "val/loss"}
    assert tracking.steps == [1]
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "images_per_second"} <= set(tracking.metrics[0])
    assert tracking.metrics[0]["val/accuracy"] == trained.metrics["val/accuracy"]
    assert tracking.metrics[0]["converged"] == 1
    assert tracking.params["threads"] == torch.get_num_threads()
    assert tracking.params["device"]


def test_the_same_seed_gives_the_same_coefficients(dataset, config, tracking) -> None:
    first, second = (fit(config("logistic_regression"), dataset, tracking).predictor for _ in range(2))
    assert np.array_equal(first[-1].coef_, second[-1].coef_)


def test_with_flips_it_also_sees_mirror_images(new_dataset, config, tracking) -> None:
    dataset = new_dataset(num_train=300)
    plain = fit(config("hog_logistic_regression"), dataset, tracking).predictor
    flipped = fit(config("hog_logistic_regression", augmentation="flip"), dataset, tracking).predictor
    first, second = (model.named_steps["whiten"].n_samples_ for model in (plain, flipped))
    assert (first, second) == (300, 600)
    images_u8 = torch.from_numpy(dataset.train_split().images_u8[:])
    both = [features(each) for each in (images_u8, images_u8.flip(2))]
    np.testing.assert_allclose(flipped.named_steps["whiten"].mean_, np.concatenate(both).mean(axis=0), atol=1e-4)


def test_of_too_many_images_each_class_gives_the_same_share(new_dataset, config, tracking, monkeypatch) -> None:
    monkeypatch.setattr("mlpipe.training.estimator.MAX_FITTED", 120)
    train, val = (new_dataset(num_train=300).train_split(), new_dataset().val_split())
    labels = np.where(np.arange(300) < 1, 2, np.arange(300) % 2)  # 149, 150 and 1
    dataset = Dataset.in_memory(("a", "b", "c"), (train.images_u8[:], labels), (val.images_u8[:], val.labels))
    for augmentation in ("none", "flip"):
        fitted = fit(config("logistic_regression", augmentation=augmentation), dataset, tracking).predictor
        assert fitted.named_steps["whiten"].n_samples_ == 120
        assert fitted.classes_.tolist() == [0, 1, 2]


def test_stopping_before_convergence_is_a_line_and_a_metric_not_a_warning(dataset, config, tracking, caplog) -> None:
    caplog.set_level(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(config("logistic_regression", max_iterations=1), dataset, tracking)
    assert "stopped at its limit of 1 iterations" in caplog.text
    assert (tracking.metrics[0]["converged"], tracking.metrics[0]["iterations"]) == (0, 1)


def test_large_images_are_shrunk(new_dataset, config, tracking) -> None:
    trained = fit(config("logistic_regression"), new_dataset(num_train=60, size=64), tracking)
    assert trained.description.image_size == 32
    assert trained.predictor.n_features_in_ == 32 * 32 * 3


def test_a_network_is_no_estimator(dataset, config, tracking) -> None:
    with pytest.raises(UserError, match="'resnet18' is not an estimator"):
        fit(config("resnet18"), dataset, tracking)
