"""Write the README's tables and picture of results anew from the JSON files of their runs: `python docs/results.py`.

`mlpipe run … --json docs/runs/<name>.json` makes such a file. Each table stands between two comments that name it.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator
from matplotlib.transforms import Bbox

from mlpipe.figures_style import MUTED, SERIES, figure_style, heading_space, new_figure

DOCS = Path(__file__).parent
COLUMNS = (
    ("Precision, %", "test/precision_macro", 100, 2),
    ("Recall, %", "test/recall_macro", 100, 2),
    ("F1, %", "test/f1_macro", 100, 2),
    ("Log loss", "test/log_loss", 1, 3),
    ("Calibration error", "test/calibration_error", 1, 3),
)
LITE = "EfficientNet-Lite0"
TRAININGS = (
    ("quick", "quick"),
    ("report", "report"),
    ("teacher0", "report, with a teacher"),
    ("strong0", "strong"),
    ("strong_resnet", "strong"),
    ("lite_head", "new last layer on ImageNet's features"),
    ("lite_all", "ImageNet's weights, 3 epochs"),
    ("lite_random", "random weights, 3 epochs"),
    ("lite96_adam5", "ImageNet's weights, 5 epochs"),
)
"""Runs of seed 0 in the picture, and what each did."""
HEAD = ("Model", "Started from", "Accuracy, % (95 % interval)", *(column[0] for column in COLUMNS), "Training, s")


def load(run: str) -> dict[str, Any] | None:
    """The JSON of a run; `None`: it was not made."""
    path = DOCS / "runs" / f"{run}.json"
    return dict(json.loads(path.read_text())) if path.exists() else None


def models_of(*runs: str) -> list[dict[str, Any]]:
    """The models of those runs that were made, by falling accuracy."""
    found = [model for name in runs if (run := load(name)) for model in run["models"]]
    return sorted(found, key=lambda model: -model["metrics"]["test/accuracy"])


def row(model: dict[str, Any]) -> list[str]:
    metrics = model["metrics"]
    accuracy, low, high = (100 * metrics[f"test/accuracy{end}"] for end in ("", "_ci_low", "_ci_high"))
    return [
        model["name"],
        "–" if model["weights"] == "none" else model["weights"],
        f"{accuracy:.2f} ({low:.2f}–{high:.2f})",
        *(f"{factor * metrics[name]:.{digits}f}" for _, name, factor, digits in COLUMNS),
        f"{model['train_seconds']:,.0f}",
    ]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seeds(name: str) -> str:
    """Mean and standard deviation of custom_cnn over the runs <name>0, <name>1, … that were made."""
    models = models_of(*(f"{name}{seed}" for seed in range(3)))
    reached = [100 * model["metrics"]["test/accuracy"] for model in models if model["name"] == "custom_cnn"]
    each = ", ".join(f"{value:.2f}" for value in reached)
    return (
        f"{statistics.mean(reached):.2f} ± {statistics.stdev(reached):.2f} % over {len(reached)} seeds "
        f"(mean and standard deviation; {each})"
    )


class Point(NamedTuple):
    """A training, in the picture."""

    network: str
    how: str
    minutes: float
    accuracy: float
    """Of the test images, 0 to 1."""


def points_of(run: str, how: str) -> list[Point]:
    """Of the models of a run, if it was made."""
    return [
        Point(
            LITE if "lite" in each["name"] else each["name"],
            how,
            each["train_seconds"] / 60,
            each["metrics"]["test/accuracy"],
        )
        for each in models_of(run)
    ]


def points_of_benchmark() -> list[Point]:
    """The published recipe and the usual loop, by `benchmarks/frontier.py`, if that was done."""
    points = (load("frontier") or {"points": []})["points"]
    return [Point("custom_cnn", each["name"], each["minutes"], each["accuracy"]) for each in points]


PLACES = (
    (6, 0, "left", "center"),
    (-6, 0, "right", "center"),
    (0, 6, "center", "bottom"),
    (0, -6, "center", "top"),
    (0, 10, "center", "bottom"),
    (-4, -5, "right", "top"),
)
"""Of a label around its point, in the order of preference: offset and alignment."""


def frontier(points: Sequence[Point], path: Path) -> None:
    """Accuracy against minutes of training; equal steps upwards are equal factors between right and wrong answers."""
    networks = list(dict.fromkeys(point.network for point in sorted(points, key=lambda point: -point.accuracy)))
    with figure_style():
        figure = new_figure(8, 5, "Accuracy by minutes of training", "CIFAR-10, test images, %; one thread each")
        axes = figure.subplots()
        figure.subplots_adjust(left=0.08, right=0.97, top=heading_space(5, 0.9), bottom=0.12)
        for number, network in enumerate(networks):
            own = [point for point in points if point.network == network]
            xs, ys = [point.minutes for point in own], [point.accuracy for point in own]
            axes.plot(xs, ys, "o", color=SERIES[number % len(SERIES)], markersize=8, label=network)
        axes.set_xscale("log")
        axes.set_yscale("logit")
        for axis, ticks, form in (
            (axes.xaxis, [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50], "{x:g}"),
            (axes.yaxis, [0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94], lambda share, _: f"{100 * share:g}"),
        ):
            axis.set_major_locator(FixedLocator(ticks))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(form)
        axes.set_xlabel("minutes")
        axes.grid(visible=True)
        axes.margins(x=0.12, y=0.08)
        axes.legend(loc="upper left")
        _label(axes, points)
        figure.savefig(path)


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """What was done beside each point, where neither a label nor a point is."""
    axes.figure.draw_without_rendering()
    centres = axes.transData.transform([(point.minutes, point.accuracy) for point in points])
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in centres]
    taken.append(axes.get_legend().get_window_extent())
    for number, point in enumerate(points):
        for x, y, across, up in PLACES:
            label = axes.annotate(
                point.how, (point.minutes, point.accuracy), (x, y), textcoords="offset points", fontsize=8.5,
                color=MUTED, ha=across, va=up,
            )  # fmt: skip
            box = label.get_window_extent()
            others = [each for other, each in enumerate(taken) if other != number]
            if not any(box.overlaps(each) for each in others) and axes.bbox.contains(box.x1, box.y1):
                break
            if (x, y, across, up) != PLACES[-1]:
                label.remove()
        taken.append(box)


def main() -> None:
    parts = {
        "report": table(HEAD, map(row, models_of("report"))),
        "strong": table(HEAD, map(row, models_of("strong0", "strong_resnet"))) + f"\n\ncustom_cnn: {seeds('strong')}.",
    }
    readme = DOCS.parent / "README.md"
    text = readme.read_text()
    for name, content in parts.items():
        between = re.compile(rf"(<!-- results: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = between.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)  # type: ignore[misc]
    readme.write_text(text)
    points = [point for run, how in TRAININGS for point in points_of(run, how)] + points_of_benchmark()
    frontier(points, DOCS / "frontier.png")


if __name__ == "__main__":
    main()
