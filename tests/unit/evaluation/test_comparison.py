from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from scipy.stats import binomtest

from mlpipe.evaluation.comparison import compare, exact_mcnemar


def answers(num_right, num_images=100):
    return np.arange(num_images) < num_right


def paired(both, only_first, only_second, neither):
    first = np.repeat([True, True, False, False], [both, only_first, only_second, neither])
    second = np.repeat([True, False, True, False], [both, only_first, only_second, neither])
    return first, second


def test_mcnemar_textbook_example():
    # Agresti, Categorical Data Analysis (1990), table 10.1, approval of the prime minister: 86 against 150 of 1,600
    # changed their mind. Exact two-sided binomial p = 2 P(X <= 86 | 236, 1/2).
    p_value = exact_mcnemar(*paired(794, 150, 86, 570))
    assert p_value == pytest.approx(binomtest(86, 236).pvalue)
    assert p_value == pytest.approx(3.7e-5, rel=0.02)


def test_mcnemar_by_hand():
    assert exact_mcnemar(*paired(7, 5, 1, 2)) == pytest.approx(2 * (1 + 6) / 2**6)
    assert exact_mcnemar(*paired(7, 3, 3, 2)) == 1.0
    assert exact_mcnemar(*paired(7, 0, 0, 2)) == 1.0


def test_rows_go_by_accuracy_then_log_loss_then_name(result):
    comparison = compare(
        [
            result("worst", answers(50)),
            result("unsure", answers(80), confidence=0.6),
            result("b", answers(80), confidence=0.8),
            result("a", answers(80), confidence=0.8),
            result("best", answers(90)),
        ]
    )
    assert [row.name for row in comparison.rows] == ["best", "a", "b", "unsure", "worst"]


def test_pairs_are_tested_once_with_the_better_first_and_holms_adjustment(result):
    comparison = compare([result("c", answers(70)), result("a", answers(90)), result("b", answers(82))])
    assert [(test.better, test.worse) for test in comparison.tests] == [("a", "b"), ("a", "c"), ("b", "c")]
    by_pair = {(test.better, test.worse): test for test in comparison.tests}
    assert (by_pair["a", "b"].only_better_right, by_pair["a", "b"].only_worse_right) == (8, 0)
    assert by_pair["a", "b"].difference == pytest.approx(0.08)
    raw = {pair: 2 * 0.5**n for pair, n in ((("a", "b"), 8), (("a", "c"), 20), (("b", "c"), 12))}
    assert {pair: test.p_value for pair, test in by_pair.items()} == pytest.approx(raw)
    # Holm: the smallest times 3, the next times 2, the largest times 1.
    assert by_pair["a", "c"].p_adjusted == pytest.approx(3 * raw["a", "c"])
    assert by_pair["b", "c"].p_adjusted == pytest.approx(2 * raw["b", "c"])
    assert by_pair["a", "b"].p_adjusted == pytest.approx(raw["a", "b"])
    assert comparison.test_between("c", "a") is by_pair["a", "c"]


def test_summary_says_who_leads_and_that_it_is_beyond_chance(result):
    summary = compare([result("good", answers(95)), result("poor", answers(60))]).summary()
    assert summary.startswith("good is the most accurate on 100 test images: 95.0 % right (95 % interval 9")
    assert "Its lead of 35.0 points over poor, the second, is beyond chance" in summary
    assert "p < 0.001" in summary
    assert "random weights" not in summary


def test_summary_does_not_call_a_small_lead_real(result):
    summary = compare([result("good", answers(95)), result("near", answers(94))]).summary()
    assert "Its lead of 1.0 points over near, the second, may be chance" in summary
    assert "p = 1.000" in summary


def test_summary_of_equals_names_no_lead(result):
    summary = compare([result("one", answers(80)), result("two", answers(80))]).summary()
    assert "two has the same accuracy" in summary
    assert "lead" not in summary


def test_random_weights_are_named_in_table_and_summary(result):
    comparison = compare(
        [
            result("resnet18", answers(70), weights="random"),
            result("logistic_regression", answers(60), weights="none"),
            result("resnet18_imagenet", answers(90), weights="imagenet"),
        ]
    )
    table = comparison.markdown()
    assert "| resnet18 (random weights) | random |" in table
    assert "| resnet18_imagenet | imagenet |" in table
    assert "| logistic_regression | – |" in table
    assert "resnet18 started from random weights" in comparison.summary()


def test_failed_models_are_named_with_their_reason(result):
    failed = {"vgg11_bn": "weights: cannot be reached | use random\nTraceback", "googlenet": "out of memory."}
    comparison = compare([result("cnn", answers(90), weights="random")], failed)
    summary = comparison.summary()
    assert summary.startswith("cnn is the only model with a result")
    assert summary.endswith(
        "Without a result: vgg11_bn (weights: cannot be reached | use random); googlenet (out of memory)."
    )
    table = comparison.markdown().splitlines()
    (line,) = [line for line in table if line.startswith("| vgg11_bn")]
    assert "cannot be reached \\| use random" in line
    assert comparison.tests == ()


def test_every_line_of_the_table_has_the_same_number_of_cells(result):
    comparison = compare([result("a", answers(9, 10), train_seconds=None)], {"b": "a|b"})
    lines = comparison.markdown().strip().splitlines()
    table = [line.replace("\\|", "") for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 4


def test_csv_keeps_all_digits(result):
    comparison = compare([result("a", answers(2, 3)), result("b", answers(1, 3))], {"c": "no\nluck"})
    first, second, failed = csv.DictReader(io.StringIO(comparison.csv()))
    assert float(first["accuracy"]) == 2 / 3
    assert (first["rank"], first["model"], second["model"]) == ("1", "a", "b")
    low, high = comparison.rows[0].evaluation.intervals["accuracy"]
    assert (float(first["accuracy_ci_low"]), float(first["accuracy_ci_high"])) == (low, high)
    assert (failed["model"], failed["accuracy"], failed["failure"]) == ("c", "", "no luck")


def test_models_of_other_images_or_classes_are_not_compared(result):
    with pytest.raises(ValueError, match="same images"):
        compare([result("a", answers(5, 10)), result("b", answers(5, 12))])
    with pytest.raises(ValueError, match="same images and classes"):
        compare([result("a", answers(5, 10)), result("b", answers(5, 10), classes=("x", "y"))])
    with pytest.raises(ValueError, match="at least one"):
        compare([], {"a": "broken"})
