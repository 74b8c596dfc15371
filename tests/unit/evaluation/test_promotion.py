from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from mlpipe.config import PromotionConfig
from mlpipe.evaluation.promotion import (
    CHAMPION,
    Overlap,
    chance,
    chance_p_value,
    decide,
    other_classes,
    promote,
    score,
)
from mlpipe.evaluation.result import ModelResult, Unmeasured
from mlpipe.evaluation.scoring import evaluate_predictions

TEN = tuple("0123456789")
BALANCED = np.arange(100) % 10
"""Labels of ten images of each of ten classes."""
SKEWED = np.repeat([0, 1], [95, 5])


def model(version, labels, correct, classes):
    """A model that says the next class where it is wrong."""
    predictions = np.where(correct, labels, (labels + 1) % len(classes))
    probabilities = np.where(np.eye(len(classes), dtype=bool)[predictions], 0.9, 0.1 / (len(classes) - 1))
    evaluation = evaluate_predictions(labels, probabilities, classes, seed=0, num_resamples=10)
    return ModelResult(name="custom_cnn", version=version, evaluation=evaluation)


def measured(accuracy, *, version="2", classes=TEN, labels=BALANCED):
    """A model that is right on the first images."""
    return model(version, labels, np.arange(len(labels)) < round(accuracy * len(labels)), classes)


@pytest.mark.parametrize(
    ("candidate", "champion", "rules", "promote", "words"),
    [
        pytest.param(measured(0.9), None, {}, True, "first champion", id="first"),
        pytest.param(measured(0.15), None, {"significance": 1}, True, "reaches 0.1500", id="exactly chance and margin"),
        pytest.param(measured(0.14), None, {}, False, "is below 0.1500", id="near chance"),
        pytest.param(
            measured(0.95, labels=SKEWED, classes=("a", "b")),
            None,
            {},
            False,
            "0.9500 is below 1.0000: 0.9500 is the share of the largest class",
            id="always the largest class",
        ),
        pytest.param(
            measured(0.95, labels=SKEWED, classes=("a", "b")),
            None,
            {"metric": "balanced_accuracy"},
            False,
            "balanced accuracy of 0.5000 is below 0.5500",
            id="always the largest class, balanced",
        ),
        pytest.param(measured(0.15), None, {}, False, "may be chance, because 0.1000 is the share", id="may be chance"),
        pytest.param(measured(0.2), None, {}, True, "first champion", id="beyond chance"),
        pytest.param(measured(0.2), None, {"significance": 0.001}, False, "0.001 is the limit", id="a stricter limit"),
        pytest.param(
            measured(0.9), None, {"min_accuracy_over_chance": 0.85}, False, "is below 0.9500", id="a wider margin"
        ),
        pytest.param(measured(0.9), measured(0.8, version="1"), {}, True, "+0.1000 is above 0", id="better"),
        pytest.param(
            measured(0.83),
            measured(0.8, version="1"),
            {},
            False,
            "+0.0300 may be chance, and a champion is replaced where p is below 0.05",
            id="better by chance",
        ),
        pytest.param(
            measured(0.83), measured(0.8, version="1"), {"significance": 1}, True, "is above 0", id="any lead"
        ),
        pytest.param(measured(0.8), measured(0.8, version="1"), {}, False, "is not above 0", id="equal"),
        pytest.param(measured(0.7), measured(0.8, version="1"), {}, False, "-0.1000 is not above", id="worse"),
        pytest.param(
            measured(0.3),
            measured(0.2, version="1"),
            {"min_improvement": 0.1},
            False,
            "is not above 0.1",
            id="exactly the improvement is not above it, rounding or not",
        ),
        pytest.param(
            measured(0.31), measured(0.2, version="1"), {"min_improvement": 0.1}, True, "is above 0.1", id="just above"
        ),
        pytest.param(measured(0.9), measured(0.9), {}, False, "champion already", id="same version"),
        pytest.param(
            measured(0.9),
            Unmeasured(name="custom_cnn", version="1", problem="knows 'x', which is no class here"),
            {},
            False,
            "custom_cnn (version 1), knows 'x', which is no class here. Remove the alias",
            id="champion that cannot be measured",
        ),
    ],
)
def test_decision(candidate, champion, rules, promote, words):
    decision = decide(candidate, champion, PromotionConfig(**rules))
    assert words in " ".join(decision.reasons)
    assert decision.promote is promote


@pytest.mark.parametrize("mode", ["disabled", "dry_run", "enabled"])
def test_mode_does_not_change_the_decision(mode):
    assert decide(measured(0.9), None, PromotionConfig(mode=mode)).promote


def test_every_check_gives_a_reason_also_when_an_earlier_one_failed():
    decision = decide(measured(0.1), measured(0.2, version="1"), PromotionConfig())
    assert len(decision.reasons) == 2
    assert not decision.promote


def test_the_p_value_is_mcnemars():
    decision = decide(measured(0.9), measured(0.8, version="1"), PromotionConfig())
    assert f"p = {2 * 0.5**10:.3g}" in decision.reasons[-1]
    assert "version 1" in decision.reasons[-1]


def test_the_champion_is_measured_on_images_that_it_was_not_trained_on():
    candidate, champion = measured(0.7), measured(0.75, version="1")  # right on what it was trained on, for instance
    unseen = np.arange(100) >= 50
    decision = decide(candidate, champion, PromotionConfig(), Overlap(unseen=unseen))
    assert "On the same 50 images (50 that it was trained on were left out)" in decision.reasons[-1]
    assert "0.5000: the difference of -0.1000" in decision.reasons[-1]
    nothing = decide(candidate, champion, PromotionConfig(), Overlap(unseen=np.zeros(100, bool)))
    assert "was trained on all of these test images" in nothing.reasons[-1]
    assert not nothing.promote


def test_a_model_is_measured_on_images_that_what_it_started_from_was_not_trained_on():
    known = np.arange(100) < 50
    candidate, champion = replace(measured(0.75), known=known), measured(0.7, version="1")
    decision = decide(candidate, champion, PromotionConfig(), Overlap(unseen=np.ones(100, bool)))
    assert "On the same 50 images (50 that one of both was trained on were left out)" in decision.reasons[-1]
    assert "0.5000" in decision.reasons[0]
    nothing = decide(replace(candidate, known=np.ones(100, bool)), None, PromotionConfig())
    assert "trained on all of these test images" in nothing.reasons[-1]
    assert not nothing.promote
    between = decide(candidate, champion, PromotionConfig(), Overlap(unseen=known))
    assert not between.promote
    assert "No test image is left that neither the champion" in between.reasons[-1]


def test_the_best_of_many_models_needs_a_clearer_lead():
    candidate, champion = measured(0.87), measured(0.8, version="1")
    assert decide(candidate, champion, PromotionConfig()).promote
    of_four = decide(candidate, champion, PromotionConfig(), num_models=4)
    assert not of_four.promote
    assert f"p = {4 * 2 * 0.5**7:.3g}, times the 4 models that were compared" in of_four.reasons[-1]


class MovedMeanwhile:
    """Aliases of a registry in which another DAG run gives version 3 the alias while this one measures version 1."""

    def __init__(self):
        self.bearer, self.moves = "1", []

    def holder(self, alias):
        return self.bearer if alias == CHAMPION else None

    def predecessor(self, _, version):
        return version

    def move(self, alias, version):
        self.moves.append((alias, version))

    def remeasure(self, version):
        self.bearer = "3"
        return measured({"1": 0.5, "3": 0.9}[version], version=version)


def test_a_champion_that_was_replaced_meanwhile_is_the_one_to_beat():
    aliases = MovedMeanwhile()
    promotion = promote(PromotionConfig(), [measured(0.8)], aliases, aliases.remeasure, lambda _: None)
    assert promotion.decisions[CHAMPION].holder == "3"
    assert (CHAMPION, "2") not in aliases.moves


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 4, 300), rng.integers(0, 4, 300)
    assert score("accuracy", labels, labels == predictions) == pytest.approx((labels == predictions).mean())
    expected = balanced_accuracy_score(labels, predictions)
    assert score("balanced_accuracy", labels, labels == predictions) == pytest.approx(expected)
    assert (chance("accuracy", SKEWED), chance("balanced_accuracy", SKEWED)) == (0.95, 0.5)


def test_balanced_accuracy_weighs_rare_classes():
    labels = np.repeat([0, 1], [180, 20])
    finds_rare = np.concatenate([np.arange(180) < 150, np.ones(20, bool)])  # 170 of 200 right
    ignores_rare = np.concatenate([np.ones(180, bool), np.zeros(20, bool)])  # 180 of 200 right

    new, old = model("2", labels, finds_rare, ("a", "b")), model("1", labels, ignores_rare, ("a", "b"))
    assert not decide(new, old, PromotionConfig(min_accuracy_over_chance=-1.0)).promote
    decision = decide(new, old, PromotionConfig(metric="balanced_accuracy"))
    assert decision.promote
    assert "a balanced accuracy of 0.5000: the difference of +0.4167" in decision.reasons[-1]


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy"])
@pytest.mark.parametrize("labels", [[0, 1], [0, 0, 1, 1], [0, 0, 0, 0, 1]])
def test_a_few_test_images_make_no_champion_even_if_all_are_right(metric, labels):
    perfect = model("1", np.array(labels), np.ones(len(labels), bool), ("a", "b"))
    assert not decide(perfect, None, PromotionConfig(metric=metric)).promote


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy"])
def test_many_right_answers_are_beyond_chance(metric):
    perfect = model("1", np.repeat([0, 1], [90, 10]), np.ones(100, bool), ("a", "b"))
    assert decide(perfect, None, PromotionConfig(metric=metric)).promote


def test_the_permutation_test_is_the_exact_one_where_that_is_known():
    # Of the pairings of two and two images, one in six has all right.
    assert chance_p_value("balanced_accuracy", np.diag([2, 2])) == pytest.approx(1 / 6, abs=0.02)
    constant = np.array([[9, 0], [3, 0]])
    assert chance_p_value("balanced_accuracy", constant) == 1.0


def test_what_the_champion_was_trained_on_is_said_where_it_is_not_known():
    candidate, champion = measured(0.9), measured(0.7, version="1")
    unknown, known = (
        decide(candidate, champion, PromotionConfig(), each) for each in (None, Overlap(unseen=np.ones(100, bool)))
    )
    assert "which of them it was trained on is not known" in unknown.reasons[-1]
    assert "not known" not in known.reasons[-1]


def test_the_difference_of_classes_is_named():
    assert other_classes(("a", "x"), ("a", "b")) == "does not know 'b' and knows 'x', which is no class here"
    assert other_classes(("a", "b", "x", "y"), ("b", "a")) == "knows 'x', 'y', which are no classes here"


def test_a_champion_of_another_problem_with_the_same_classes_stays():
    other = Overlap(unseen=np.ones(100, bool), same_problem=False)
    decision = decide(measured(1.0), measured(0.0, version="1"), PromotionConfig(), other)
    assert "was trained on other images: none of them is in this data set" in decision.reasons[-1]
    assert not decision.promote
