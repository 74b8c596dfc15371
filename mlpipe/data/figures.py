"""Pictures of a data set: examples, balance, channels. Of the test split only the counts are shown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from mlpipe.data.dataset import Dataset, ImageRows, Split
from mlpipe.figures_style import (
    INK,
    MUTED,
    SERIES,
    bare,
    class_labels,
    figure_style,
    footnote,
    heading_space,
    new_figure,
    unreadable_note,
)

MAX_CLASSES = 24
"""Classes shown one by one; of more, as many are chosen evenly."""
CHANNELS = (("red", "#c8443c"), ("green", "#3a9a5b"), ("blue", "#2f6fb7"))
STATISTICS_IMAGES = 2048
"""Images that the histograms of channels are drawn from."""
BYTES_PER_COUNT = 4 << 20
"""Pixels that are counted at once; counting takes eight bytes for each."""
_PART_NAMES = {"train": "training", "val": "validation", "test": "test"}


def sample_grid(split: Split, classes: Sequence[str], *, per_class: int = 10) -> Figure:
    """A row of randomly chosen images for each class.

    Args:
        classes: names in the order of the labels.
    """
    shown = _chosen(len(classes))
    rows = [_examples(split.labels, label, per_class, np.random.default_rng([0, label])) for label in shown]
    names = class_labels(classes)
    margin = _label_width(names)
    width = margin + 0.72 * per_class + 0.3
    height = 0.95 + 0.72 * len(shown) + 0.35
    with figure_style(classes):
        figure = new_figure(
            width, height, "Training images", f"{per_class} of each class at random{_of_all(shown, len(classes))}"
        )
        top, left = heading_space(height, 0.88), margin / width
        cell_width, cell_height = 0.72 / width, 0.72 / height
        for row, (label, positions) in enumerate(zip(shown, rows, strict=True)):
            y = top - (row + 1) * cell_height
            figure.text(left - 0.14 / width, y + cell_height / 2, names[label], ha="right", va="center", fontsize=10)
            for column, position in enumerate(positions):
                axes = figure.add_axes((left + column * cell_width, y, 0.66 / width, 0.66 / height))
                axes.imshow(split.images_u8[int(position)], interpolation="nearest", aspect="auto")
                bare(axes)
        footnote(figure, unreadable_note(classes))
    return figure


def class_balance(dataset: Dataset) -> Figure:
    """Images of each class: trained on, held out to validate, held out to test."""
    manifest = dataset.manifest
    counts = {part: np.array(manifest.class_counts[part]) for part in _PART_NAMES}
    shown = _chosen(len(manifest.classes))
    names = class_labels(manifest.classes)
    margin = _label_width(names)
    width, height = 8.4, 1.65 + 0.34 * len(shown)
    total = np.sum(list(counts.values()), axis=0)
    subtitle = f"{int(total.sum()):,} images; the largest class has {_ratio(total)}"
    with figure_style(manifest.classes):
        figure = new_figure(
            width,
            height,
            "Images in each class",
            subtitle + _of_all(shown, len(manifest.classes)),
        )
        axes = figure.add_axes(
            (margin / width, 0.62 / height, (width - margin - 0.8) / width, (height - 1.85) / height)
        )
        positions = np.arange(len(shown))
        left = np.zeros(len(shown))
        for (part, name), color in zip(_PART_NAMES.items(), (SERIES[0], SERIES[4], SERIES[1]), strict=True):
            widths = counts[part][shown]
            axes.barh(positions, widths, left=left, height=0.68, color=color, label=f"{name} ({counts[part].sum():,})")
            left += widths
        for position, number in zip(positions, left, strict=True):
            axes.annotate(
                f"{int(number):,}", (number, position), (5, 0), textcoords="offset points", va="center", color=MUTED
            )
        axes.set_yticks(positions, [names[label] for label in shown])
        axes.set(ylim=(len(shown) - 0.5, -0.5), xlim=(0, left.max() * 1.02), xlabel="images")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.grid(axis="x")
        axes.spines[:].set_visible(False)
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.008, 1.0), ncols=3, handlelength=1, handleheight=1, borderaxespad=0.2
        )
        footnote(figure, unreadable_note(manifest.classes))
    return figure


def channel_statistics(split: Split) -> Figure:
    """How often each brightness occurs in each color channel, with mean and standard deviation."""
    number = min(STATISTICS_IMAGES, len(split))
    chosen = np.sort(np.random.default_rng(0).choice(len(split), number, replace=False))
    histograms = _channel_histograms(split.images_u8.select(chosen))
    values = np.arange(256)
    shares_of_values = histograms / histograms.sum(1, keepdims=True)
    means = shares_of_values @ values
    stds = np.sqrt((shares_of_values * (values - means[:, None]) ** 2).sum(1))
    shares = shares_of_values.reshape(3, 64, 4).sum(2)
    width, height = 8.4, 3.4
    with figure_style():
        figure = new_figure(
            width,
            height,
            "Brightness of the color channels",
            f"all pixels of {number:,} training images; line: mean, band: one standard deviation",
        )
        grey = bool((histograms == histograms[0]).all())
        panels = [("grey", INK)] if grey else CHANNELS
        span = (width - 0.6 - 0.5) / len(panels)
        ceiling = _ceiling(shares)
        for channel, (name, color) in enumerate(panels):
            axes = figure.add_axes(
                ((0.7 + channel * span) / width, 0.55 / height, (span - 0.25) / width, (height - 1.75) / height)
            )
            mean, std = float(means[channel]), float(stds[channel])
            axes.axvspan(max(mean - std, 0), min(mean + std, 255), color=color, alpha=0.10, linewidth=0)
            axes.fill_between(np.arange(64) * 4 + 2, shares[channel], color=color, alpha=0.75, linewidth=0)
            axes.axvline(mean, color=INK, linewidth=1.2)
            axes.set(xlim=(0, 255), ylim=(0, ceiling), xlabel="value, 0 to 255")
            axes.set_title(f"{name}   {mean:.0f} ± {std:.0f}", color=INK)
            axes.set_xticks([0, 64, 128, 192, 255])
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if ceiling > 0.06 else 1))
            axes.grid(axis="y")
            if (peak := int(shares[channel].argmax())) in (0, 63) and shares[channel][peak] > ceiling:
                side, offset = ("left", 7) if peak == 0 else ("right", -7)
                axes.annotate(
                    f"↑ {shares[channel][peak]:.0%}",
                    (4 * peak + 2, ceiling),
                    (offset, -3),
                    textcoords="offset points",
                    ha=side,
                    va="top",
                    color=MUTED,
                    fontsize=8.5,
                )
            axes.spines["left"].set_visible(False)
            if channel:
                axes.tick_params(labelleft=False)
    return figure


def _channel_histograms(images_u8: ImageRows) -> NDArray[np.int64]:
    """(3, 256) how often each value occurs in each channel; few images are in memory at a time."""
    counts = np.zeros((3, 256), np.int64)
    for part in images_u8.slices(BYTES_PER_COUNT):
        pixels = images_u8[part].reshape(-1, 3)
        counts += [np.bincount(pixels[:, channel], minlength=256) for channel in range(3)]
    return counts


def _label_width(names: Sequence[str]) -> float:
    """Room for class names at the left, inches."""
    return 0.6 + 0.085 * max(max(map(len, names)), 4)


def _ceiling(shares: NDArray[np.float64]) -> float:
    """Upper end of the axis: pure black and white may tower over all else, as in drawings, and are cut off then."""
    inner = max(float(share[1:-1].max()) for share in shares)
    peak = max(float(share.max()) for share in shares)
    return min(1.15 * max(inner, min(peak, 4 * inner or peak)), 1.0)


def _chosen(num_classes: int) -> NDArray[np.int64]:
    """Labels to show."""
    return np.unique(np.linspace(0, num_classes - 1, min(num_classes, MAX_CLASSES)).round().astype(np.int64))


def _of_all(shown: NDArray[np.int64], num_classes: int) -> str:
    return "" if len(shown) == num_classes else f"; {len(shown)} of {num_classes:,} classes"


def _examples(labels: NDArray[np.int64], label: int, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    positions = np.flatnonzero(labels == label)
    return generator.choice(positions, min(count, len(positions)), replace=False)


def _ratio(total: NDArray[np.int64]) -> str:
    ratio = total.max() / max(total.min(), 1)
    return "as many as the smallest" if ratio < 1.005 else f"{ratio:.3g} times as many as the smallest"
