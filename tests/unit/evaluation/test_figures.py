from __future__ import annotations

import io
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mlpipe import figures_style
from mlpipe.evaluation.comparison import compare
from mlpipe.evaluation.figures import (
    comparison_figure,
    confusion_matrix_figure,
    mistakes_figure,
    per_class_figure,
    reliability_figure,
)
from mlpipe.evaluation.result import ModelResult
from mlpipe.evaluation.scoring import evaluate_predictions
from mlpipe.figures_style import class_labels, fallback_fonts, figure_style, missing_characters


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph without a font, a layout that collapses
        yield


def texts(figure: Figure) -> list[str]:
    return [text.get_text().strip("\u200e") for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def png(figure: Figure) -> Image.Image:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return Image.open(stream)


def random_case(num_classes, num_images, strength=2.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(num_images) % num_classes
    logits = rng.gumbel(size=(num_images, num_classes))
    logits[np.arange(num_images), labels] += strength
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_confusion_figure_has_a_label_and_a_count_for_each_cell():
    labels = np.repeat([0, 1, 2], [8, 5, 4])
    predictions = np.concatenate([[0] * 6, [2] * 2, [1] * 5, [2] * 4])
    evaluation = evaluate_predictions(labels, np.eye(3)[predictions], ("first", "second", "third one"), seed=0)
    figure = confusion_matrix_figure(evaluation, "custom_cnn")
    matrix = figure.axes[0]
    assert [t.get_text() for t in matrix.get_yticklabels() if t.get_text()] == ["first", "second", "third one"]
    assert (matrix.get_ylabel(), matrix.get_xlabel()) == ("true", "predicted")
    cells = {text.get_position(): text.get_text() for text in matrix.texts}
    # x is the predicted class, y the true one; empty cells stay empty.
    assert cells == {(0, 0): "6\n75 %", (2, 0): "2\n25 %", (1, 1): "5\n100 %", (2, 2): "4\n100 %"}
    assert [t.get_text().replace("\u200e", "") for t in figure.axes[1].get_yticklabels()] == ["first → third one"]


def test_confusions_that_occur_once_each_are_not_ranked():
    evaluation = evaluate_predictions([0, 1, 2], np.eye(3)[[1, 2, 0]], ("a", "b", "c"), seed=0)
    assert "each occurs once" in texts(confusion_matrix_figure(evaluation, "m"))


def test_confusion_figure_of_a_hundred_classes_names_all_of_them():
    labels, probabilities = random_case(100, 500)
    classes = [f"class name {i}" for i in range(100)]
    figure = confusion_matrix_figure(evaluate_predictions(labels, probabilities, classes, seed=0), "resnet18")
    matrix = figure.axes[0]
    assert [t.get_text() for t in matrix.get_xticklabels() if t.get_text()] == classes
    assert len(matrix.texts) == 0
    assert max(png(figure).size) < 4000


def test_confusion_figure_without_errors():
    evaluation = evaluate_predictions(np.array([0, 1]), np.eye(2), ("a", "b"), seed=0)
    assert "none: all images are right" in texts(confusion_matrix_figure(evaluation, "m"))


def test_drawing_a_thousand_classes_stays_within_reason():
    labels, probabilities = random_case(1000, 2000)
    classes = [f"n{i:08d}" for i in range(1000)]
    evaluation = evaluate_predictions(labels, probabilities, classes, seed=0, num_resamples=10)
    assert max(png(confusion_matrix_figure(evaluation, "m")).size) < 4000
    assert max(png(per_class_figure(compare_one(evaluation))).size) < 20_000


def compare_one(evaluation):
    return compare([ModelResult(name="m", evaluation=evaluation, train_seconds=1.0, images_per_second=1.0)])


def test_reliability_figure_shows_each_bin():
    labels, probabilities = random_case(5, 800)
    evaluation = evaluate_predictions(labels, probabilities, list("abcde"), seed=0)
    figure = reliability_figure(evaluation, "m")
    diagram, histogram = figure.axes
    points = diagram.collections[-1].get_offsets()
    drawn = evaluation.calibration.counts >= 5
    assert 0 < drawn.sum() < len(drawn)
    assert np.allclose(points[:, 0], evaluation.calibration.confidence[drawn])
    assert np.allclose(points[:, 1], evaluation.calibration.accuracy[drawn])
    bars = histogram.patches
    assert sum(bar.get_height() for bar in bars) == pytest.approx(1)
    for bar, confidence in zip(bars, evaluation.calibration.confidence, strict=True):
        assert bar.get_x() - 1e-9 <= confidence <= bar.get_x() + bar.get_width() + 1e-9
    png(figure)


def test_a_certain_model_is_drawn_in_the_last_bin():
    evaluation = evaluate_predictions(np.array([0, 1]), np.eye(2), ("a", "b"), seed=0)
    (bar,) = reliability_figure(evaluation, "m").axes[1].patches
    assert bar.get_x() + bar.get_width() == pytest.approx(1)


def test_mistakes_are_the_most_confident_wrong_ones_in_order():
    labels = np.array([0, 0, 1, 1, 2])
    probabilities = np.array([[0.1, 0.7, 0.2], [0.9, 0.05, 0.05], [0.95, 0.04, 0.01], [0.1, 0.8, 0.1], [0.5, 0.2, 0.3]])
    images_u8 = np.zeros((5, 4, 4, 3), dtype=np.uint8) + np.arange(5, dtype=np.uint8)[:, None, None, None] * 10
    evaluation = evaluate_predictions(labels, probabilities, ("cat", "dog", "owl"), seed=0)
    figure = mistakes_figure(images_u8, evaluation, "m", k=2)
    shown = [axes.images[0].get_array()[0, 0, 0] for axes in figure.axes]
    assert shown == [20, 0]
    words = [[text.get_text().replace("\u200e", "") for text in axes.texts] for axes in figure.axes]
    assert words == [["dog", "→ cat", "95 %"], ["cat", "→ dog", "70 %"]]
    assert any("2 of 3 mistakes" in text for text in texts(figure))
    png(figure)


def test_no_more_pictures_than_asked_for():
    labels, probabilities = random_case(4, 200, strength=0.0)
    evaluation = evaluate_predictions(labels, probabilities, list("abcd"), seed=0)
    figure = mistakes_figure(np.zeros((200, 8, 8, 3), np.uint8), evaluation, "m")
    assert len(figure.axes) == 25


def test_no_mistakes_is_said_so():
    labels = np.array([0, 1, 1])
    evaluation = evaluate_predictions(labels, np.eye(2)[labels], ("a", "b"), seed=0)
    figure = mistakes_figure(np.zeros((3, 8, 8, 3), np.uint8), evaluation, "m")
    assert "All 3 test images are right." in texts(figure)
    assert figure.axes == []
    png(figure)


def test_comparison_figure_has_each_model_score_and_time(result):
    comparison = compare(
        [
            result("custom_cnn", np.arange(50) < 45, weights="random", train_seconds=61.0),
            result("logistic_regression", np.arange(50) < 30, train_seconds=None),
        ],
        {"vgg11_bn": "no weights"},
    )
    figure = comparison_figure(comparison, champion=comparison.rows[0].version)
    scores, seconds = figure.axes
    assert [t.get_text() for t in scores.get_yticklabels()] == [
        "custom_cnn\nrandom weights",
        "logistic_regression\nbehind by more than chance",
    ]
    assert max(scores.get_xticks()) <= 100
    legend = [text.get_text() for text in scores.get_legend().get_texts()]
    assert legend == ["Accuracy", "Precision", "Recall (balanced accuracy)", "F1"]
    accuracy = scores.containers[0]
    assert accuracy.lines[0].get_xdata() == pytest.approx([90, 60])
    (bars,) = accuracy.lines[2]
    ends = np.array(bars.get_segments())[:, :, 0]
    expected = [row.evaluation.intervals["accuracy"] for row in comparison.rows]
    assert ends == pytest.approx(100 * np.array(expected))
    assert [text.get_text() for text in seconds.texts] == ["1 min 1 s", "not known"]
    assert any("vgg11_bn" in text for text in texts(figure))
    png(figure)


def test_per_class_figure_has_a_cell_for_each_class_and_model(result):
    comparison = compare(
        [
            result("a", [1, 1, 1, 1, 0, 1], classes=("x", "y", "z")),
            result("b", [0, 0, 1, 1, 0, 1], classes=("x", "y", "z")),
        ]
    )
    (axes,) = per_class_figure(comparison).axes
    assert len(axes.texts) == 6
    assert [t.get_text() for t in axes.get_xticklabels() if t.get_text()] == ["x", "y", "z"]
    assert [t.get_text() for t in axes.get_yticklabels() if t.get_text()] == ["a", "b"]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    for row, entry in enumerate(comparison.rows):
        for column, scores in enumerate(entry.evaluation.per_class):
            assert cells[column, row] == f"{100 * scores.f1:.0f}"


def test_per_class_figure_of_many_classes_puts_the_hardest_first():
    labels, probabilities = random_case(60, 1200)
    classes = [f"c{i}" for i in range(60)]
    evaluation = evaluate_predictions(labels, probabilities, classes, seed=0)
    figure = per_class_figure(compare_one(evaluation))
    assert len(figure.axes) == 3
    shown = [t.get_text() for axes in figure.axes for t in axes.get_xticklabels() if t.get_text()]
    assert sorted(shown) == sorted(classes)
    f1 = {scores.name: scores.f1 for scores in evaluation.per_class}
    assert [f1[name] for name in shown] == sorted(f1.values())


def test_a_class_without_images_is_a_dash():
    evaluation = evaluate_predictions(np.array([0, 1]), np.eye(3)[[0, 1]], ("a", "b", "c"), seed=0)
    (axes,) = per_class_figure(compare_one(evaluation)).axes
    assert [text.get_text() for text in axes.texts] == ["100", "100", "–"]


NAMES = ["apple tree", "猫", "$a_b^c$", "سمكة", "собака", "x" * 80, "new\nline", "", "\U0010fffd"]


def test_names_of_any_script_are_drawn_without_a_warning():
    labels, probabilities = random_case(len(NAMES), 90)
    evaluation = evaluate_predictions(labels, probabilities, NAMES, seed=0)
    images_u8 = np.zeros((90, 8, 8, 3), np.uint8)
    png(confusion_matrix_figure(evaluation, "m"))
    png(mistakes_figure(images_u8, evaluation, "m"))
    png(per_class_figure(compare_one(evaluation)))


def test_names_that_no_font_shows_appear_by_index_and_a_footnote_says_so():
    labels = class_labels(NAMES)
    assert labels[0] == "apple tree"
    assert labels[2:5] == NAMES[2:5]
    assert labels[5] == "x" * 17 + "…"
    assert labels[6:] == ["new line", "class 7", "class 8"]
    evaluation = evaluate_predictions(np.array([0, 1]), np.eye(2), ("a", "\U0010fffd"), seed=0)
    assert any("No installed font" in text for text in texts(confusion_matrix_figure(evaluation, "m")))


def test_fallback_fonts_are_asked_only_when_needed(monkeypatch):
    # Characters of no other test: the choice for them is kept.
    glyphs = (("Serif Font", frozenset(map(ord, "龘"))), ("Sans Font", frozenset(map(ord, "鱻龘"))))
    monkeypatch.setattr(figures_style, "other_fonts", lambda: glyphs)
    assert fallback_fonts(["cat", "köpek", "سمكة"]) == ()
    assert fallback_fonts(["鱻", "龘"]) == ("Sans Font",)
    assert missing_characters(["鱻馫\n"]) == {"馫"}


def test_style_leaves_matplotlibs_settings_alone():
    before = dict(matplotlib.rcParams)
    with figure_style(["猫"]):
        assert matplotlib.rcParams["text.parse_math"] is False
    assert dict(matplotlib.rcParams) == before


def test_importing_loads_no_pyplot_torch_or_mlflow():
    code = (
        "import sys, mlpipe.evaluation.figures, mlpipe.evaluation.promotion\n"
        "print([m for m in ('matplotlib.pyplot', 'torch', 'mlflow', 'airflow') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
