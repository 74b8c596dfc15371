from __future__ import annotations

import math

import numpy as np
import pytest

from mlpipe.config import PromotionConfig
from mlpipe.evaluation.promotion import Measured, decide

TEN = tuple("0123456789")


def measured(accuracy, *, version="2", classes=TEN, num_images=100, extra=None, **changes):
    metrics = {} if accuracy is None else {"test/accuracy": accuracy, "test/log_loss": 0.3, **(extra or {})}
    correct = None
    if accuracy is not None and math.isfinite(accuracy):
        correct = np.arange(num_images) < round(accuracy * num_images)
    return Measured(name="custom_cnn", version=version, classes=classes, metrics=metrics, correct=correct, **changes)


@pytest.mark.parametrize(
    ("candidate", "champion", "rules", "promote", "words"),
    [
        pytest.param(measured(0.9), None, {}, True, "no champion yet", id="first"),
        pytest.param(measured(0.15), None, {}, True, "reaches 0.1500", id="exactly chance and margin"),
        pytest.param(measured(0.14), None, {}, False, "is below 0.1500", id="near chance"),
        pytest.param(
            measured(0.54, classes=("a", "b")), None, {}, False, "is below 0.5500", id="chance depends on the classes"
        ),
        pytest.param(
            measured(0.9), None, {"min_accuracy_over_chance": 0.85}, False, "is below 0.9500", id="a wider margin"
        ),
        pytest.param(measured(0.9), measured(0.8, version="1"), {}, True, "+0.1000 is above 0", id="better"),
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
        pytest.param(
            measured(0.12), measured(0.11, version="1"), {}, False, "is below", id="better than a bad one, yet chance"
        ),
        pytest.param(measured(0.9), measured(0.9), {}, False, "champion already", id="same version"),
        pytest.param(
            measured(0.9), measured(None, version="1", classes=("x", "y")), {}, False, "other classes", id="classes"
        ),
        pytest.param(
            measured(0.9), measured(0.8, version="1", classes=TEN[::-1]), {}, True, "is above", id="order of classes"
        ),
        pytest.param(
            measured(0.9),
            measured(None, version="1", problem="its artifact is gone"),
            {},
            False,
            "could not be measured on the same images: its artifact is gone",
            id="broken champion",
        ),
        pytest.param(measured(0.9), measured(math.nan, version="1"), {}, False, "no accuracy", id="nan champion"),
        pytest.param(measured(math.nan), None, {}, False, "test/accuracy", id="nan"),
        pytest.param(
            measured(0.9, extra={"test/log_loss": math.inf}), None, {}, False, "not finite: test/log_loss", id="inf"
        ),
        pytest.param(measured(None, problem="it crashed"), None, {}, False, "it crashed", id="not measured"),
    ],
)
def test_decision(candidate, champion, rules, promote, words):
    decision = decide(candidate, champion, PromotionConfig(**rules))
    assert decision.promote is promote
    assert words in " ".join(decision.reasons)


@pytest.mark.parametrize("mode", ["disabled", "dry_run", "enabled"])
def test_mode_does_not_change_the_decision(mode):
    assert decide(measured(0.9), None, PromotionConfig(mode=mode)).promote


def test_every_check_gives_a_reason_also_when_an_earlier_one_failed():
    decision = decide(measured(0.1), measured(0.2, version="1"), PromotionConfig())
    assert len(decision.reasons) == 3
    assert not decision.promote


def test_paired_test_is_given_as_information():
    decision = decide(measured(0.9), measured(0.8, version="1"), PromotionConfig())
    assert f"p = {2 * 0.5**10:.3g}" in decision.reasons[-1]
    assert "version 1" in decision.reasons[-1]
