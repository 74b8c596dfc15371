"""The look that all figures of the project share.

Colors are safe for color-blind readers: Okabe and Ito's palette for categories (https://jfly.uni-koeln.de/color/),
one blue and one orange ramp for amounts. Figures are `matplotlib.figure.Figure` objects; pyplot and its global state
are not used, so that figures may be drawn in any thread and freed like other objects.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unicodedata import category, east_asian_width

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, fontManager
from matplotlib.ft2font import FT2Font

INK = "#1c2733"
MUTED = "#66727f"
FAINT = "#dfe4ea"
PAPER = "#ffffff"
PANEL = "#f5f7f9"
GOOD = "#0072b2"
BAD = "#d55e00"
SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f6bb3", "#8a8f98")
"""Colors of categories, in the order of use."""
BLUES = LinearSegmentedColormap.from_list("mlpipe_blues", ["#f5f7f9", "#cfe2f1", "#7fb5d9", "#2f83bb", "#0a4a7d"])
ORANGES = LinearSegmentedColormap.from_list("mlpipe_oranges", ["#f5f7f9", "#fbdcc2", "#f3a36a", "#d55e00", "#8a3a00"])

DPI = 150
"""Dots per inch of saved figures."""

BASE_FONT = "DejaVu Sans"  # travels with matplotlib: Latin, Greek, Cyrillic, Arabic, Hebrew, …
_UNUSABLE_FONT = "Last Resort"  # has a glyph for everything, each of them a box
_RC: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.facecolor": PAPER,
    "axes.grid": False,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.5,
    "axes.linewidth": 1.0,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.unicode_minus": True,
    "figure.dpi": DPI,
    "figure.facecolor": PAPER,
    "font.size": 9.5,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called "5$ or 10$"
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 9.0,
    "xtick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 9.0,
    "ytick.major.size": 0.0,
    "ytick.minor.size": 0.0,
}


@contextmanager
def figure_style(texts: Iterable[str] = ()) -> Iterator[None]:
    """Draw inside this block to get the project's look, and fonts that can show `texts` where any are installed.

    What is drawn keeps its look after the block.
    """
    families = [BASE_FONT, *fallback_fonts(texts)]
    with matplotlib.rc_context({**_RC, "font.family": families}):
        yield


def new_figure(width: float, height: float, title: str, subtitle: str = "") -> Figure:
    """An empty figure of `width` × `height` inches with a heading, flush left; leave its top 0.75 inch free.

    `heading_space` is the share of the height below the heading.
    """
    figure = Figure(figsize=(width, height))
    left = 0.3 / width
    figure.text(
        left, 1 - 0.22 / height, title, fontsize=14, fontweight="bold", fontfamily=BASE_FONT, va="top", ha="left"
    )
    if subtitle:
        figure.text(left, 1 - 0.52 / height, subtitle, fontsize=9.5, color=MUTED, va="top", ha="left")
    return figure


def heading_space(height: float, inches: float = 0.95) -> float:
    """Figure coordinate of the upper edge of what lies under the heading, for a figure of `height` inches."""
    return 1 - inches / height


def footnote(figure: Figure, text: str) -> None:
    """A line at the lower left."""
    width, height = figure.get_size_inches()
    figure.text(0.3 / width, 0.12 / height, text, fontsize=7.5, color=MUTED, va="bottom", ha="left")


def bare(axes: Axes) -> None:
    """Take frame and ticks away."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def class_labels(classes: Sequence[str], max_length: int = 18) -> list[str]:
    """Names as they can be shown in a figure, one for each class, in the same order.

    Names longer than `max_length` characters are cut; a name that no installed font can show becomes `class <index>`.
    """
    labels = []
    for index, name in enumerate(classes):
        shown = "" if missing_characters([name]) else " ".join(name.split())
        labels.append(shorten(shown or f"class {index}", max_length))
    return labels


def unreadable_note(classes: Sequence[str]) -> str:
    """A footnote where `class_labels` had to replace names; else empty."""
    if not missing_characters(classes):
        return ""
    return "No installed font shows some of the class names: they appear by index. Noto Sans CJK would, for example."


def text_inches(labels: Iterable[str], fontsize: float) -> float:
    """About how long the longest label is drawn; an em is the width of an East Asian character, letters take 0.6."""
    longest = max((sum(1.0 if east_asian_width(c) in "WF" else 0.6 for c in label) for label in labels), default=0.0)
    return longest * fontsize / 72


def left_to_right(*parts: str) -> str:
    """Join parts so that they stay in this order, whichever way the script of each of them runs."""
    mark = "\N{LEFT-TO-RIGHT MARK}"
    return mark + mark.join(parts)


def shorten(text: str, max_length: int) -> str:
    """Cut to `max_length` characters, the last of them an ellipsis."""
    return text if len(text) <= max_length else text[: max_length - 1].rstrip() + "…"


def missing_characters(texts: Iterable[str]) -> frozenset[str]:
    """The characters of `texts` that no installed font can show."""
    return _cover(_printable(texts))[1]


def fallback_fonts(texts: Iterable[str]) -> tuple[str, ...]:
    """Installed font families that show what `BASE_FONT` cannot, the fewest that do."""
    return _cover(_printable(texts))[0]


def _printable(texts: Iterable[str]) -> frozenset[str]:
    # Format and control characters (joiners, direction marks, line ends) need no glyph.
    return frozenset(c for text in texts for c in text if category(c) not in {"Cc", "Cf", "Zl", "Zp", "Zs"})


@functools.lru_cache(maxsize=64)
def _cover(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Families chosen greedily by how much they add, and the characters left over."""
    codes = {ord(c) for c in characters}
    missing = codes - _glyphs_of_base()
    chosen: list[str] = []
    while missing:
        # max() keeps the first of equals, so sans-serif comes before serif and the choice does not depend on the disk.
        name, glyphs = max(other_fonts(), key=lambda item: len(missing & item[1]), default=("", frozenset()))
        if not missing & glyphs:
            break
        chosen.append(name)
        missing -= glyphs
    return tuple(chosen), frozenset(map(chr, missing))


@functools.lru_cache(maxsize=1)
def _glyphs_of_base() -> frozenset[int]:
    return frozenset(FT2Font(matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf").get_charmap())


@functools.lru_cache(maxsize=1)
def other_fonts() -> tuple[tuple[str, frozenset[int]], ...]:
    """Upright, regular fonts on this machine by preference: family and code points. Read only when they are needed."""

    def preference(entry: FontEntry) -> tuple[bool, bool, bool, str]:
        # The regional editions of an East Asian font hold the same characters, Simplified Chinese (SC) the most common.
        return ("Sans" not in entry.name, "Mono" in entry.name, not entry.name.endswith(" SC"), entry.name)

    entries = {
        entry.name: entry
        for entry in sorted(fontManager.ttflist, key=lambda entry: entry.fname)
        if entry.style == "normal" and entry.weight in (400, "normal") and not entry.name.startswith(_UNUSABLE_FONT)
    }
    fonts = []
    for entry in sorted(entries.values(), key=preference):
        try:
            glyphs = frozenset(FT2Font(entry.fname, face_index=entry.index).get_charmap())
        except (RuntimeError, OSError):  # a font that was removed or is damaged is no fallback
            continue
        fonts.append((entry.name, glyphs))
    return tuple(fonts)
