"""Line charts as SVG, for pages: no library is loaded, so that Airflow's API server can draw them, too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 440, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 26
"""Margins, pixels."""
NUM_TICKS = 4

TRAINING, VALIDATION = "training", "validation"
"""Parts of a training: the first one's line is dashed, the other one's is solid."""


def line_chart(series: Mapping[str, Mapping[str, Points]], *, title: str, unit: str = "") -> str:
    """A chart of trainings: a color for each, a line for each of its parts, and a legend where there are several.

    Args:
        series: points (x, y) by rising x, by name of the training and by part; those without points are left out.
        title: what y is.
        unit: of y; with % the values are drawn times 100.
    """
    factor = 100 if unit == "%" else 1
    lines = {
        (name, part): [(x, factor * y) for x, y in points]
        for name, parts in series.items()
        for part, points in parts.items()
        if points
    }
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    ticks = _ticks(min(ys), max(ys))
    low, high = ticks[0], ticks[-1]
    first, last = min(xs), max(max(xs), min(xs) + 1)

    def place(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - RIGHT) * (x - first) / (last - first)
        up = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)
        return f"{across:.1f},{up:.1f}"

    parts = []
    for value in ticks:
        up = place(first, value).split(",")[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up}" y2="{up}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up}" dy="4" text-anchor="end">{value:.4g}</text>')
    for x, anchor in ((first, "start"), (last, "end")):
        across = place(x, low).split(",")[0]
        parts.append(f'<text x="{across}" y="{HEIGHT - 8}" text-anchor="{anchor}">{x:g}</text>')
    names = list(dict.fromkeys(name for name, _ in lines))
    styles = {
        (name, part): f"s{names.index(name) % len(_SERIES)}{' dashed' if part == TRAINING else ''}"
        for name, part in lines
    }
    for line, points in lines.items():
        style = styles[line]
        path = " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline class="line {style}" points="{path}"/>')
        if line[1] == TRAINING and len(points) > 1:
            continue  # its line alone is enough, and one point has no line
        parts += [f'<circle class="dot {style}" r="2.5" cx="{at[0]}" cy="{at[1]}"/>' for at in map(_pair, path.split())]
    legend = "".join(
        f'<span><i class="key {style}"></i>{escape(", ".join(filter(None, line)))}</span>'
        for line, style in styles.items()
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{f", {unit}" if unit else ""}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f"{f'<div class=legend>{legend}</div>' if len(lines) > 1 else ''}</figure>"
    )


def _pair(text: str) -> list[str]:
    return text.split(",")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, about `NUM_TICKS` of them, that enclose the values."""
    spread = (high - low) or abs(high) or 1.0
    rough = spread / NUM_TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough)
    first = math.floor(low / step)
    return [step * number for number in range(first, max(math.ceil(high / step), first + 1) + 1)]


_SERIES = ("#1f7fc0", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8f7bd0", "#8a8f98")

STYLE = """
.chart { display: inline-block; margin: 0 12px 12px 0; max-width: 440px; width: 100%; vertical-align: top; }
.chart figcaption { font-weight: 600; } .chart svg { display: block; height: auto; width: 100%; }
.chart text { fill: var(--muted); font-size: 11px; } .chart .grid { stroke: var(--line); }
.chart .line { fill: none; stroke-width: 2; } .legend span { display: inline-block; margin-right: 12px; }
.line.dashed { stroke-dasharray: 5 4; }
.key { border-top: 3px solid; display: inline-block; margin-right: 5px; vertical-align: middle; width: 20px; }
.key.dashed { border-top-style: dashed; }
""" + "".join(
    f".line.s{i} {{ stroke: {color}; }} .dot.s{i} {{ fill: {color}; }} .key.s{i} {{ border-color: {color}; }}\n"
    for i, color in enumerate(_SERIES)
)
"""Rules for the charts; the page defines `--line` and `--muted`."""
