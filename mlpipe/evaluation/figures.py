"""Pictures of how models did. Each function returns a matplotlib `Figure` that nothing else holds on to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from statsmodels.stats.proportion import proportion_confint

from mlpipe.evaluation import metrics as registry
from mlpipe.evaluation.calibration import NUM_CALIBRATION_BINS
from mlpipe.evaluation.comparison import SIGNIFICANCE, Comparison
from mlpipe.evaluation.result import ModelResult
from mlpipe.evaluation.scoring import Evaluation
from mlpipe.figures_style import (
    BAD,
    BASE_FONT,
    BLUES,
    FAINT,
    GOOD,
    INK,
    MUTED,
    ORANGES,
    PANEL,
    PAPER,
    SERIES,
    bare,
    class_labels,
    figure_style,
    footnote,
    heading_space,
    left_to_right,
    new_figure,
    shorten,
    text_inches,
    unreadable_note,
)

_MAX_ANNOTATED_CLASSES = 20
_MAX_NAMED_CLASSES = 120
_BAR_INCHES = 0.32
_MAX_CONFUSIONS = 8
_FEWEST_IN_A_BIN = 5
"""Images from which on the accuracy of a bin of confidences is drawn."""


def confusion_matrix_figure(evaluation: Evaluation, name: str) -> Figure:
    """Confusion matrix, rows the truth: shares of the row as color, counts in the cells of up to 20 classes.

    Beside it the most frequent confusions, at most eight.

    Args:
        evaluation: of the model.
        name: of the model, for the heading.
    """
    num_classes = len(evaluation.classes)
    side = float(np.clip(0.58 * num_classes, 3.2, 10.0))  # of the matrix, inches
    with figure_style(evaluation.classes):
        labels = class_labels(evaluation.classes)
        size = float(np.clip(72 * 0.85 * side / num_classes, 4.6, 9.0))
        room = text_inches(labels, size)
        pairs, counts = _top_confusions(
            evaluation.confusion, labels, limit=min(_MAX_CONFUSIONS, int(side / _BAR_INCHES))
        )
        left, bottom, pairs_room, bars = 0.75 + room, 0.85 + room, text_inches(pairs, 9.0) + 0.4, 1.7
        width, height = max(left + side + pairs_room + bars + 0.3, 7.5), bottom + side + 1.2
        figure = new_figure(width, height, f"Confusion matrix of {name}", _accuracy_line(evaluation))
        axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
        _draw_confusion(axes, evaluation.confusion, labels, size)
        box = ((left + side + pairs_room) / width, bottom / height, bars / width, side / height)
        _draw_top_confusions(
            figure.add_axes(box),
            pairs,
            counts,
            num_errors=int((~evaluation.predictions.correct).sum()),
            num_slots=side / _BAR_INCHES,
            title_x=-(pairs_room - 0.35) / bars,
        )
        footnote(figure, unreadable_note(evaluation.classes) or "Color: share of the row. Counts are test images.")
    return figure


def _accuracy_line(evaluation: Evaluation) -> str:
    low, high = evaluation.intervals["accuracy"]
    return (
        f"Accuracy {100 * evaluation.accuracy:.1f} % (95 % interval {100 * low:.1f} to "
        f"{100 * high:.1f} %) on {evaluation.num_images:,} test images"
    )


def _draw_confusion(axes: Axes, confusion: NDArray[np.int64], labels: Sequence[str], size: float) -> None:
    num_classes = len(labels)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    hits = np.eye(num_classes, dtype=bool)
    axes.imshow(np.ma.masked_array(shares, ~hits), cmap=BLUES, vmin=0, vmax=1)
    # Errors are far fewer than hits: an own color, and a root scale that lets a few of them show.
    norm = PowerNorm(0.6, vmin=0, vmax=max(0.1, float(np.max(shares[~hits], initial=0.0))))
    axes.imshow(np.ma.masked_array(shares, hits), cmap=ORANGES, norm=norm)
    step = 1 if num_classes <= _MAX_NAMED_CLASSES else math.ceil(num_classes / _MAX_NAMED_CLASSES)
    ticks = range(0, num_classes, step)
    upright = text_inches(labels, size) < 0.5
    axes.set_xticks(ticks, [labels[i] for i in ticks], rotation=0 if upright else 90, fontsize=size)
    axes.set_yticks(ticks, [labels[i] for i in ticks], fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.spines[:].set_visible(False)
    if num_classes <= _MAX_ANNOTATED_CLASSES:
        axes.set_xticks(np.arange(1, num_classes) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, num_classes) - 0.5, minor=True)
        axes.grid(which="minor", color=PAPER, linewidth=2)
        _annotate(axes, confusion, shares, norm)


def _annotate(axes: Axes, confusion: NDArray[np.int64], shares: NDArray[np.float64], norm: PowerNorm) -> None:
    for (row, column), count in np.ndenumerate(confusion):
        if not count:
            continue
        share = float(shares[row, column])
        dark = (share if row == column else float(norm(share))) > 0.65
        text = f"{count:,}\n{100 * share:.0f} %" if share >= 0.005 else f"{count:,}\n< 1 %"
        axes.text(
            column, row, text, ha="center", va="center", fontsize=7.5, linespacing=1.25, color=PAPER if dark else INK
        )


def _top_confusions(
    confusion: NDArray[np.int64], labels: Sequence[str], limit: int
) -> tuple[list[str], NDArray[np.int64]]:
    """Pairs `true → predicted` that occur, the most frequent first, and their images."""
    errors = confusion.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:limit]
    order = order[errors.ravel()[order] > (1 if errors.max() == 1 else 0)]  # none is more frequent than others
    rows, columns = np.unravel_index(order, errors.shape)
    pairs = [left_to_right(labels[row], " → ", labels[column]) for row, column in zip(rows, columns, strict=True)]
    return pairs, errors[rows, columns]


def _draw_top_confusions(
    axes: Axes, pairs: Sequence[str], counts: NDArray[np.int64], num_errors: int, num_slots: float, title_x: float
) -> None:
    axes.set_title("Most frequent confusions", x=title_x, fontfamily=BASE_FONT)
    bare(axes)
    axes.set_ylim(num_slots - 0.5, -0.5)
    if not pairs:
        text = "each occurs once" if num_errors else "none: all images are right"
        axes.text(title_x, 0, text, color=MUTED, va="center")
        return
    axes.barh(np.arange(len(pairs)), counts, height=0.55, color=BAD)
    axes.set_xlim(0, counts.max() * 1.3)
    axes.set_yticks(np.arange(len(pairs)), pairs)
    for position, count in enumerate(counts):
        axes.annotate(
            f"{count:,}",
            (float(count), position),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=MUTED,
        )


def reliability_figure(evaluation: Evaluation, name: str) -> Figure:
    """Reliability diagram (accuracy by confidence, with 95 % intervals) over a histogram of the confidences.

    Bins of fewer than five images are in the histogram alone.

    Args:
        evaluation: of the model.
        name: of the model, for the heading.
    """
    width, height = 6.4, 6.9
    calibration = evaluation.calibration
    with figure_style():
        error = f"Expected calibration error {calibration.expected_error:.3f}"
        log_loss = f"log loss {evaluation.scores['log_loss']:.3f}"
        figure = new_figure(width, height, f"Calibration of {name}", f"{error} · {log_loss}")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
        figure.subplots_adjust(left=0.125, right=0.965, top=heading_space(height), bottom=0.085, hspace=0.1)
        upper.plot([0, 1], [0, 1], color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
        upper.text(
            0.045, 0.10, "confidence = accuracy", color=MUTED, fontsize=8.5, rotation=38.5, rotation_mode="anchor"
        )
        enough = calibration.counts >= _FEWEST_IN_A_BIN
        confidence, accuracy, counts = (
            values[enough] for values in (calibration.confidence, calibration.accuracy, calibration.counts)
        )
        if enough.any():
            limits = np.array(proportion_confint(np.rint(accuracy * counts), counts, alpha=0.05, method="beta"))
            spread = np.maximum([accuracy - limits[0], limits[1] - accuracy], 0)
            upper.errorbar(
                confidence, accuracy, yerr=spread, fmt="none", ecolor=MUTED, elinewidth=1.4, capsize=3, clip_on=False
            )
            upper.scatter(
                confidence,
                accuracy,
                s=26 + 260 * counts / counts.max(),
                color=GOOD,
                edgecolor=PAPER,
                linewidth=1.2,
                zorder=3,
                clip_on=False,
            )
        upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that is right")
        upper.grid(visible=True)
        edges = np.linspace(0, 1, NUM_CALIBRATION_BINS + 1)
        # The mean of a bin lies within it, and bins are closed on the right.
        bins = np.clip(np.searchsorted(edges, calibration.confidence, side="left") - 1, 0, NUM_CALIBRATION_BINS - 1)
        lower.bar(
            edges[bins],
            calibration.counts / evaluation.num_images,
            width=1 / NUM_CALIBRATION_BINS,
            align="edge",
            color=GOOD,
            edgecolor=PAPER,
            linewidth=1.5,
        )
        lower.set(xlabel="confidence: probability of the predicted class", ylabel="share of images")
        lower.grid(visible=True, axis="y")
        lower.locator_params(axis="y", nbins=3)
    return figure


class Images(Protocol):
    """Images by row: an array, or something that reads them when they are asked for."""

    def __getitem__(self, row: Any, /) -> NDArray[np.uint8]:
        """The image of a row, (H, W, 3)."""


def mistakes_figure(images_u8: Images, evaluation: Evaluation, name: str, k: int = 25) -> Figure:
    """The wrong predictions that the model was most confident of, in falling order.

    Args:
        images_u8: (N, H, W, 3) uint8; may be a memory map, of which only what is shown is read.
        evaluation: of the model on these images.
        name: of the model, for the heading.
        k: most pictures to show.
    """
    classes, predictions = evaluation.classes, evaluation.predictions
    wrong, worst = predictions.mistakes, predictions.mistakes[:k]
    with figure_style(classes):
        title = f"Worst mistakes of {name}"
        if not len(worst):
            return _no_mistakes(title, evaluation.num_images)
        counts = f"{len(worst)} of {len(wrong):,} mistakes on {evaluation.num_images:,} test images"
        subtitle = f"{counts}, most confident first: truth → predicted"
        shown = class_labels(classes, max_length=20)
        num_columns = min(5, len(worst))
        num_rows = math.ceil(len(worst) / num_columns)
        side, gap, words = 1.55, 0.16, 0.6  # inches
        width = max(5.6, num_columns * (side + gap) - gap + 0.6)
        height = 0.95 + num_rows * (side + words) + 0.25
        figure = new_figure(width, height, title, subtitle)
        for number, index in enumerate(worst):
            row, column = divmod(number, num_columns)
            left, top = 0.3 + column * (side + gap), height - 0.95 - row * (side + words)
            axes = figure.add_axes((left / width, (top - side) / height, side / width, side / height))
            bare(axes)
            predicted = int(predictions.predicted[index])
            _draw_mistake(
                axes,
                images_u8[index],
                truth=shown[int(predictions.labels[index])],
                predicted=shown[predicted],
                confidence=float(predictions.probabilities[index, predicted]),
            )
        footnote(figure, unreadable_note(classes))
    return figure


def _draw_mistake(axes: Axes, image_u8: NDArray[np.uint8], truth: str, predicted: str, confidence: float) -> None:
    axes.imshow(image_u8, vmin=0, vmax=255, cmap="gray")
    for text, x, y, align, color in (
        (left_to_right(truth), 0, -5, "left", GOOD),
        (left_to_right("→ ", predicted), 0, -17, "left", BAD),
        (f"{100 * confidence:.0f} %", 1, -5, "right", MUTED),
    ):
        axes.annotate(
            text,
            (x, 0),
            (0, y),
            xycoords="axes fraction",
            textcoords="offset points",
            va="top",
            ha=align,
            fontsize=9.0,
            color=color,
        )


def _no_mistakes(title: str, num_images: int) -> Figure:
    figure = new_figure(5.6, 2.6, title)
    figure.text(0.5, 0.5, "✓", fontsize=40, color=GOOD, ha="center", va="center")
    figure.text(0.5, 0.22, f"All {num_images:,} test images are right.", fontsize=12, ha="center", va="center")
    return figure


def learning_curves_figure(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Validation accuracy by epoch of all models.

    Args:
        curves: epochs and accuracies, 0 to 1, by model's name.
    """
    width, height = 10.6, 4.2
    with figure_style():
        figure = new_figure(width, height, "Learning curves", "Accuracy on the validation images, %")
        axes = figure.subplots()
        figure.subplots_adjust(
            left=0.7 / width, right=1 - 0.3 / width, top=heading_space(height, 0.9), bottom=0.7 / height
        )
        for number, (name, curve) in enumerate(curves.items()):
            epochs, accuracies = [step for step, _ in curve], [100 * value for _, value in curve]
            axes.plot(epochs, accuracies, marker="o", markersize=4, color=SERIES[number % len(SERIES)], label=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.legend(loc="lower right", ncols=2)
    return figure


def comparison_figure(comparison: Comparison, champion: str | None = None) -> Figure:
    """Accuracy and macro scores of all models with their intervals, and the seconds that training took.

    Below a model's name stands whether its distance to the best one may be chance.

    Args:
        champion: version of the champion, which is marked.
    """
    rows = comparison.rows
    height = 1.75 + 0.95 * len(rows) + (0.15 if comparison.failed else 0)
    width = 10.6
    with figure_style():
        figure = new_figure(width, height, "Models compared", f"{comparison.num_images:,} test images, 95 % intervals")
        scores, seconds = figure.subplots(1, 2, sharey=True, width_ratios=(3.1, 1))
        figure.subplots_adjust(
            left=2.35 / width, right=1 - 0.75 / width, top=heading_space(height, 1.1), bottom=0.72 / height, wspace=0.08
        )
        _draw_scores(scores, comparison)
        _draw_seconds(seconds, [row.train_seconds for row in rows])
        labels = [_row_label(comparison, row, champion) for row in rows]
        scores.set_yticks(range(len(rows)), labels)
        scores.set_ylim(len(rows) - 0.5, -0.5)
        if comparison.failed:
            footnote(figure, f"No result: {shorten(', '.join(comparison.failed), 140)}")
    return figure


def _row_label(comparison: Comparison, row: ModelResult, champion: str | None) -> str:
    lines = [f"{row.name} ★" if champion and row.version == champion else row.name]
    if row.random_weights:
        lines.append("random weights")
    if row is not comparison.rows[0]:
        p_value = comparison.test_between(comparison.rows[0].name, row.name).p_adjusted
        lines.append("behind by more than chance" if p_value < SIGNIFICANCE else "distance may be chance")
    return "\n".join(lines)


def _draw_scores(axes: Axes, comparison: Comparison) -> None:
    drawn = [metric for metric in registry.METRICS if metric.resample and metric.title][: len(SERIES)]
    offsets = np.linspace(-0.27, 0.27, len(drawn))
    for metric, offset, color in zip(drawn, offsets, SERIES, strict=False):
        key, label = metric.name, metric.title
        values = np.array([row.evaluation.scores[key] for row in comparison.rows]) * 100
        limits = np.array([row.evaluation.intervals[key] for row in comparison.rows]).T * 100  # (2, models)
        # An interval of resamples need not hold the point value; errors below 0 are refused by matplotlib.
        spread = np.maximum([values - limits[0], limits[1] - values], 0)
        axes.errorbar(
            values,
            np.arange(len(values)) + offset,
            xerr=spread,
            fmt="o",
            color=color,
            markersize=7 if key == "accuracy" else 5,
            markeredgecolor=PAPER,
            elinewidth=2.4 if key == "accuracy" else 1.5,
            label=label,
        )
    for position, row in enumerate(comparison.rows):
        axes.axhspan(position - 0.44, position + 0.44, color=PANEL, zorder=0)
        text = f"{100 * row.evaluation.accuracy:.1f} %"
        high = 100 * row.evaluation.intervals["accuracy"].high
        axes.annotate(
            text,
            (high, position + offsets[0]),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            fontweight="bold",
            color=GOOD,
        )
    axes.set_xlabel("%")
    axes.grid(visible=True, axis="x", color=PAPER, linewidth=1.4)
    axes.spines[:].set_visible(False)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.08 * (high - low))  # for the number beside the last interval
    axes.set_xticks(
        [tick for tick in MaxNLocator(nbins=8, steps=[1, 2, 5, 10]).tick_values(*axes.get_xlim()) if tick <= 100]
    )
    axes.set_xlim(low, high + 0.08 * (high - low))
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, handletextpad=0.3, columnspacing=1.4, borderaxespad=0.2
    )


def _draw_seconds(axes: Axes, train_seconds: Sequence[float | None]) -> None:
    values = [0.0 if seconds is None else seconds for seconds in train_seconds]
    axes.barh(range(len(values)), values, height=0.3, color=MUTED)
    for position, seconds in enumerate(train_seconds):
        axes.annotate(
            "not known" if seconds is None else _duration(seconds),
            (values[position], position),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=MUTED,
        )
    axes.set_title("Training time", fontsize=9.5, fontweight="normal", color=MUTED, pad=7)
    axes.set_xlim(0, max([*values, 1e-9]) * 1.08)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.tick_params(labelleft=False)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def per_class_figure(comparison: Comparison) -> Figure:
    """F1 of each class (columns) and model (rows); more than 25 classes go to several strips, the hardest first."""
    rows, classes = comparison.rows, comparison.classes
    f1 = np.array([[scores.f1 for scores in row.evaluation.per_class] for row in rows])  # (models, K)
    per_strip = 25
    order = np.arange(len(classes))
    if len(classes) > per_strip:
        order = np.argsort(np.where(np.isnan(f1), 2.0, f1).mean(axis=0), kind="stable")
    strips = [order[start : start + per_strip] for start in range(0, len(order), per_strip)]
    num_columns = min(per_strip, len(classes))
    with figure_style(classes):
        labels = class_labels(classes)
        upright = text_inches(labels, 8.0) < 0.42
        label_inches = 0.3 if upright else 0.3 + 0.65 * text_inches(labels, 8.0)
        strip_inches = 0.4 * len(rows) + label_inches + 0.1
        width = max(5.6, 2.3 + 0.46 * num_columns)
        height = 1.2 + strip_inches * len(strips)
        sorting = ", hardest classes first" if len(strips) > 1 else ""
        low, high = _scale(f1)
        colors = f"colors from {100 * low:.0f} to {100 * high:.0f}"
        subtitle = f"%, {comparison.num_images:,} test images; {colors}{sorting}"
        figure = new_figure(width, height, "F1 by class", subtitle)
        for number, strip in enumerate(strips):
            top = height - 0.9 - number * strip_inches
            cells_width, cells_height = 0.46 * len(strip), 0.4 * len(rows)
            box = (1.95 / width, (top - cells_height) / height, cells_width / width, cells_height / height)
            axes = figure.add_axes(box)
            _draw_strip(
                axes, f1[:, strip], (low, high), [labels[i] for i in strip], [row.name for row in rows], upright
            )
        footnote(figure, unreadable_note(classes))
    return figure


def _scale(f1: NDArray[np.float64]) -> tuple[float, float]:
    """Ends of the colors: those of the values shown, to five points."""
    known = f1[~np.isnan(f1)]
    if not known.size:
        return 0.0, 1.0
    low = math.floor(20 * float(known.min())) / 20
    return low, max(math.ceil(20 * float(known.max())) / 20, low + 0.05)


def _draw_strip(
    axes: Axes,
    f1: NDArray[np.float64],
    scale: tuple[float, float],
    labels: Sequence[str],
    names: Sequence[str],
    upright: bool,
) -> None:
    axes.set_facecolor(FAINT)
    axes.imshow(np.ma.masked_invalid(f1), cmap=BLUES, vmin=scale[0], vmax=scale[1], aspect="auto")
    axes.set_yticks(range(len(names)), [shorten(name, 24) for name in names])
    axes.set_xticks(range(len(labels)), labels, fontsize=8.0)
    if not upright:
        for tick in axes.get_xticklabels():
            tick.set(rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xticks(np.arange(1, len(labels)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(names)) - 0.5, minor=True)
    axes.grid(which="minor", color=PAPER, linewidth=2)
    axes.spines[:].set_visible(False)
    dark = scale[0] + 0.65 * (scale[1] - scale[0])
    for (row, column), score in np.ndenumerate(f1):
        text = "–" if np.isnan(score) else f"{100 * score:.0f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8.0, color=PAPER if score > dark else INK)
