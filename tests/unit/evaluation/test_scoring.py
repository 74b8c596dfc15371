from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_score
from torchmetrics.functional.classification import multiclass_calibration_error

from mlpipe.errors import UserError
from mlpipe.evaluation.scoring import bootstrap_intervals, evaluate_predictions

CLASSES = ("cat", "dog", "owl")


def probabilities_for(predictions, num_classes, confidence=0.8):
    rest = (1 - confidence) / (num_classes - 1)
    return np.where(np.eye(num_classes, dtype=bool)[np.asarray(predictions)], confidence, rest)


def random_case(num_images=600, num_classes=5, seed=0, strength=2.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_images)
    logits = rng.gumbel(size=(num_images, num_classes))
    logits[np.arange(num_images), labels] += strength
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_small_example_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    predictions = [0, 0, 0, 1, 1, 0, 2, 0]
    evaluation = evaluate_predictions(labels, probabilities_for(predictions, 3), CLASSES, seed=0)
    assert evaluation.confusion.tolist() == [[3, 1, 0], [1, 1, 0], [1, 0, 1]]
    assert evaluation.accuracy == 5 / 8
    cat, dog, owl = evaluation.per_class
    assert (cat.name, cat.precision, cat.recall, cat.support) == ("cat", 3 / 5, 3 / 4, 4)
    assert (dog.precision, dog.recall, dog.f1, dog.support) == (1 / 2, 1 / 2, 1 / 2, 2)
    assert (owl.precision, owl.recall, owl.f1, owl.support) == (1, 1 / 2, pytest.approx(2 / 3), 2)
    assert evaluation.scores["precision_macro"] == pytest.approx((3 / 5 + 1 / 2 + 1) / 3)
    assert evaluation.scores["recall_macro"] == pytest.approx((3 / 4 + 1 / 2 + 1 / 2) / 3)
    assert evaluation.scores["f1_macro"] == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert evaluation.scores["log_loss"] == pytest.approx(-(5 * np.log(0.8) + 3 * np.log(0.1)) / 8)
    assert evaluation.scores["calibration_error"] == pytest.approx(0.8 - 5 / 8)
    assert evaluation.notes == ()


def test_rows_of_the_confusion_matrix_are_the_truth():
    evaluation = evaluate_predictions(np.array([0, 0, 0]), probabilities_for([2, 2, 2], 3), CLASSES, seed=0)
    assert evaluation.confusion[0, 2] == 3
    assert evaluation.confusion[2, 0] == 0


def test_class_order_is_that_of_the_indices_not_of_the_names():
    evaluation = evaluate_predictions(np.array([0, 1, 1]), probabilities_for([0, 1, 0], 2), ("zebra", "ant"), seed=0)
    assert [(scores.name, scores.support) for scores in evaluation.per_class] == [("zebra", 1), ("ant", 2)]
    assert evaluation.per_class[1].recall == 0.5


def test_a_class_never_predicted_counts_as_zero_and_is_noted_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluation = evaluate_predictions(np.array([0, 1, 2]), probabilities_for([0, 1, 1], 3), CLASSES, seed=0)
    assert (evaluation.per_class[2].precision, evaluation.per_class[2].f1) == (0, 0)
    assert evaluation.scores["precision_macro"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert any("Never predicted" in note and "owl" in note for note in evaluation.notes)


def test_a_class_without_images_is_left_out_and_noted():
    evaluation = evaluate_predictions(np.array([0, 0, 1, 1]), probabilities_for([0, 2, 1, 1], 3), CLASSES, seed=0)
    assert np.isnan(evaluation.per_class[2].recall)
    assert evaluation.scores["recall_macro"] == 0.75
    metrics = evaluation.as_metrics()
    assert all(np.isfinite(value) for value in metrics.values())
    assert any("Without test images" in note and "owl" in note for note in evaluation.notes)


def test_equal_probabilities_predict_the_first_class():
    evaluation = evaluate_predictions(np.array([0, 1]), np.full((2, 2), 0.5), ("a", "b"), seed=0)
    assert evaluation.confusion.tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_calibration_error_agrees_with_torchmetrics(strength):
    labels, probabilities = random_case(strength=strength)
    expected = multiclass_calibration_error(
        torch.from_numpy(probabilities), torch.from_numpy(labels), num_classes=5, n_bins=15, norm="l1"
    )
    evaluation = evaluate_predictions(labels, probabilities, list("abcde"), seed=0)
    assert evaluation.scores["calibration_error"] == pytest.approx(float(expected), abs=1e-6)
    assert evaluation.calibration.counts.sum() == 600


def test_float32_probabilities_at_the_limits_are_accepted():
    probabilities = np.eye(3, dtype=np.float32)[[0, 1, 2, 1]]
    probabilities[3] = [1e-7, 1.0, 0.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluation = evaluate_predictions(np.array([0, 1, 2, 2]), probabilities, CLASSES, seed=0)
    assert np.isfinite(evaluation.scores["log_loss"])


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("accuracy", lambda y, p: np.mean(y == p)),
        ("precision_macro", lambda y, p: precision_score(y, p, labels=np.unique(y), average="macro", zero_division=0)),
        ("recall_macro", lambda y, p: balanced_accuracy_score(y, p)),
        ("f1_macro", lambda y, p: f1_score(y, p, labels=np.unique(y), average="macro", zero_division=0)),
    ],
)
def test_intervals_agree_with_scipys_bootstrap(name, score):
    labels, probabilities = random_case(num_images=150, num_classes=3, strength=1.0)
    probabilities = probabilities * [4, 1, 1]  # the first class is said too often: precision and recall differ
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    predictions = probabilities.argmax(axis=1)
    evaluation = evaluate_predictions(labels, probabilities, CLASSES, seed=0, num_resamples=20_000)
    reference = bootstrap(
        (labels, predictions),
        score,
        paired=True,
        vectorized=False,
        n_resamples=1500,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    # Monte-Carlo error of a 2.5 % quantile of 1,500 resamples is about 0.0026 here.
    assert evaluation.intervals[name].low == pytest.approx(reference.low, abs=0.01)
    assert evaluation.intervals[name].high == pytest.approx(reference.high, abs=0.01)


def test_rare_classes_that_a_resample_misses_do_not_count_as_failures():
    # One image of the third class, which is right: two in five resamples miss it, and recall stays 1 in them.
    confusion = np.array([[20, 0, 0], [0, 20, 0], [0, 1, 1]])
    interval = bootstrap_intervals(confusion, seed=0)["recall_macro"]
    assert interval.low >= 2 / 3
    assert interval.high == 1.0
    all_right = bootstrap_intervals(np.diag([20, 20, 1]), seed=0)
    assert all_right["recall_macro"] == (1.0, 1.0)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth = np.array([[40, 8, 2], [6, 30, 4], [1, 3, 6]]) / 100
    expected = np.trace(truth)
    covered = 0
    for trial in range(300):
        confusion = rng.multinomial(200, truth.ravel()).reshape(3, 3)
        interval = bootstrap_intervals(confusion, seed=trial, num_resamples=500)["accuracy"]
        covered += interval.low <= expected <= interval.high
    assert 0.90 <= covered / 300 <= 0.98


@pytest.mark.parametrize("right", [True, False])
def test_accuracy_interval_has_a_width_where_the_bootstrap_has_none(right):
    labels = np.zeros(100, dtype=int)
    predictions = labels if right else labels + 1
    evaluation = evaluate_predictions(labels, probabilities_for(predictions, 2), ("a", "b"), seed=0)
    bound = 0.025 ** (1 / 100)  # Clopper and Pearson's limit for 100 of 100
    assert evaluation.intervals["accuracy"] == pytest.approx((bound, 1) if right else (0, 1 - bound))
    assert any("exact binomial" in note for note in evaluation.notes)


def test_same_seed_same_intervals_however_many_are_held_at_once(monkeypatch):
    labels, probabilities = random_case()
    first = evaluate_predictions(labels, probabilities, list("abcde"), seed=3).intervals
    monkeypatch.setattr("mlpipe.evaluation.scoring._CELLS_AT_ONCE", 1000)
    again = evaluate_predictions(labels, probabilities, list("abcde"), seed=3).intervals
    other = evaluate_predictions(labels, probabilities, list("abcde"), seed=4).intervals
    assert first == again
    assert first != other


def test_metric_names_are_the_shared_ones():
    labels, probabilities = random_case(num_classes=3)
    metrics = evaluate_predictions(labels, probabilities, CLASSES, seed=0).as_metrics()
    scores = ("accuracy", "precision_macro", "recall_macro", "f1_macro")
    assert set(metrics) == {
        *(f"test/{name}" for name in (*scores, "balanced_accuracy", "log_loss", "calibration_error")),
        *(f"test/{name}_ci_{side}" for name in scores for side in ("low", "high")),
    }
    assert all(type(value) is float for value in metrics.values())
    assert metrics["test/accuracy_ci_low"] < metrics["test/accuracy"] < metrics["test/accuracy_ci_high"]


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 1], np.full((3, 2), 0.5), "shape|needed"),
        ([], np.empty((0, 2)), "needed"),
        ([0, 2], np.full((2, 2), 0.5), "from 0 to 1"),
        ([0, -1], np.full((2, 2), 0.5), "from 0 to 1"),
        ([0.0, 1.0], np.full((2, 2), 0.5), "integers"),
        ([0, 1], np.full((2, 2), 0.9), "add up to 1"),
        ([0, 1], np.array([[1.5, -0.5], [0.5, 0.5]]), "at least 0"),
    ],
)
def test_bad_input_is_refused(labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        evaluate_predictions(np.array(labels), probabilities, ("a", "b"), seed=0)


def test_a_diverged_model_is_a_users_mistake_with_a_remedy():
    probabilities = np.array([[0.5, 0.5], [np.nan, np.nan]])
    with pytest.raises(UserError, match=r"1 of 2 test images.*learning_rate"):
        evaluate_predictions(np.array([0, 1]), probabilities, ("a", "b"), seed=0)
