"""Write the README's tables and picture of results anew from the JSON files of their runs: `python docs/results.py`.

`mlpipe run … --json docs/runs/<name>.json` makes such a file. Each table stands between two comments that name it.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, NullLocator

from mlpipe.figures_style import MUTED, SERIES, figure_style, heading_space, new_figure

DOCS = Path(__file__).parent
COLUMNS = (
    ("Precision, %", "test/precision_macro", 100, 2),
    ("Recall, %", "test/recall_macro", 100, 2),
    ("F1, %", "test/f1_macro", 100, 2),
    ("Log loss", "test/log_loss", 1, 3),
    ("Calibration error", "test/calibration_error", 1, 3),
)
HEAD = ("Model", "Started from", "Accuracy, % (95 % interval)", *(column[0] for column in COLUMNS), "Training, s")


def models_of(*names: str) -> list[dict[str, Any]]:
    """The models of runs, by falling accuracy."""
    found = [model for name in names for model in json.loads((DOCS / "runs" / f"{name}.json").read_text())["models"]]
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


def seeds(*names: str) -> str:
    """Mean and standard deviation of one model over runs that differ in the seed."""
    reached = [100 * model["metrics"]["test/accuracy"] for model in models_of(*names) if model["name"] == "custom_cnn"]
    each = ", ".join(f"{value:.2f}" for value in reached)
    return (
        f"custom_cnn over {len(reached)} seeds: {statistics.mean(reached):.2f} ± {statistics.stdev(reached):.2f} % "
        f"(mean and standard deviation; {each})."
    )


def frontier(points: list[tuple[str, float, float]], path: Path) -> None:
    """Accuracy against minutes of training.

    Args:
        points: name, minutes and accuracy, 0 to 100.
    """
    with figure_style():
        figure = new_figure(8, 4.4, "Accuracy by minutes of training", "CIFAR-10, test images, %; one thread each")
        axes = figure.subplots()
        figure.subplots_adjust(left=0.09, right=0.97, top=heading_space(4.4, 0.9), bottom=0.14)
        below = -math.inf
        for number, (name, minutes, accuracy) in enumerate(sorted(points, key=lambda point: point[2])):
            offset = (7, 5 if accuracy - below < 3 else -12)  # apart from the label of a point of like accuracy
            below = accuracy
            axes.plot(minutes, accuracy, "o", color=SERIES[number % len(SERIES)], markersize=8)
            axes.annotate(name, (minutes, accuracy), offset, textcoords="offset points", fontsize=8.5, color=MUTED)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator([0.2, 0.5, 1, 2, 5, 10, 20, 50]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("minutes")
        axes.grid(visible=True)
        axes.margins(x=0.25, y=0.12)
        figure.savefig(path)


def main() -> None:
    strong = [name for name in ("strong0", "strong1", "strong2") if (DOCS / "runs" / f"{name}.json").exists()]
    parts = {
        "report": table(HEAD, map(row, models_of("report"))),
        "strong": table(HEAD, map(row, models_of("strong0"))) + "\n\n" + seeds(*strong),
    }
    readme = DOCS.parent / "README.md"
    text = readme.read_text()
    for name, content in parts.items():
        between = re.compile(rf"(<!-- results: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = between.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)  # type: ignore[misc]
    readme.write_text(text)
    points = [
        (f"{model['name']} · {recipe}", model["train_seconds"] / 60, 100 * model["metrics"]["test/accuracy"])
        for recipe, name in (("report", "report"), ("strong", "strong0"))
        for model in models_of(name)
    ]
    frontier(points, DOCS / "frontier.png")


if __name__ == "__main__":
    main()
