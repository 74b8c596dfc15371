"""The result of a run as one HTML file that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from markupsafe import Markup

from mlpipe import pages
from mlpipe.data.manifest import Manifest
from mlpipe.evaluation import metrics
from mlpipe.evaluation.comparison import Comparison, p_cell
from mlpipe.evaluation.gallery import Gallery, class_table
from mlpipe.evaluation.result import ModelResult
from mlpipe.pages import svg

MAX_CLASSES = 40
"""Columns of the table of F1; with more classes it has the hardest."""

MIN_CONFIDENCES = (0.0, 0.5, 0.7, 0.9, 0.95, 0.99)

CURVES = {"Accuracy": "accuracy", "Loss": "loss"}
"""Charts of the training: title, and the metric's name after `train/` and `val/`."""

Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page tells."""

    title: str
    comparison: Comparison
    manifest: Manifest
    verdict: str
    """The result in sentences."""
    notes: Sequence[str]
    """On the data, a sentence each."""
    curves: Mapping[str, Mapping[str, Curve]]
    """Epochs and values by metric (`val/accuracy`), by model."""
    gallery: Gallery
    snippet: str
    """Python that loads the best model."""
    links: Mapping[str, str]
    """Addresses by what they lead to."""
    addresses: Mapping[str, str] = field(default_factory=dict)
    """Names in the registry and in the object store by what they are of; to be copied."""
    former: ModelResult | None = None
    """The champion before this run, measured on the same images."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The form as it was filled in."""
    best: ModelResult
    """Of the models that this run trained."""
    best_network: str = ""
    """As the form's field `models` has it; empty for an estimator."""
    best_uri: str = ""
    """Of the best model in the registry."""
    dag_id: ClassVar[str] = "image_classification"
    """The DAG that the form of the report triggers."""


def render(report: Report) -> str:
    """Write the page."""
    comparison = report.comparison
    return pages.render(
        "report.html.jinja",
        report=report,
        p_cell=p_cell,
        notes=[*report.notes, *(f"{row.name}: {note}" for row in comparison.rows for note in row.evaluation.notes)],
        metrics=[metric for metric in metrics.METRICS if metric.title],
        rows=[*comparison.rows, *([report.former] if report.former else [])],
        charts=[chart for title, metric in CURVES.items() if (chart := _chart(report.curves, title, metric))],
        f1=_f1_table(comparison),
        counts=class_table(report.manifest.class_counts, report.manifest.classes),
        unsure=_unsure(report.best),
        gallery=report.gallery.to_json(),
    )


def _chart(curves: Mapping[str, Mapping[str, Curve]], title: str, metric: str) -> Markup:
    """Training and validation of each network; a model that is fitted at once has one point, and no line."""
    unit = "%" if metric == "accuracy" else ""
    lines = {
        model: {
            part: points
            for part, name in ((svg.TRAINING, "train"), (svg.VALIDATION, "val"))
            if len(points := of_model.get(f"{name}/{metric}", ())) > 1
        }
        for model, of_model in curves.items()
    }
    return Markup(svg.line_chart(lines, title=f"{title} by epoch", unit=unit))  # noqa: S704 - it escapes names


def _unsure(result: ModelResult) -> list[tuple[float, float, float | None]]:
    """What `min_confidence` costs and buys: its value, the share of answers, and the share of them that is right."""
    predictions = result.evaluation.predictions
    confidence = predictions.probabilities.max(axis=1)
    rows = []
    for least in MIN_CONFIDENCES:
        answered = confidence >= least
        right = float(predictions.correct[answered].mean()) if answered.any() else None
        rows.append((least, float(answered.mean()), right))
    return rows


def _f1_table(comparison: Comparison) -> dict[str, Any]:
    """F1 by class (columns) and model (rows), None where nothing was measured; with a scale over the values shown."""
    f1 = np.array([[scores.f1 for scores in row.evaluation.per_class] for row in comparison.rows])
    columns = np.arange(f1.shape[1])
    if len(columns) > MAX_CLASSES:
        columns = np.argsort(np.where(np.isnan(f1), 2.0, f1).mean(axis=0), kind="stable")[:MAX_CLASSES]
    shown = f1[:, columns]
    known = shown[~np.isnan(shown)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    spread = max(high - low, 0.01)
    return {
        "classes": [comparison.classes[i] for i in columns],
        "rows": [
            (row.name, [None if np.isnan(value) else (float(value), (value - low) / spread) for value in values])
            for row, values in zip(comparison.rows, shown, strict=True)
        ],
        "low": low,
        "high": high,
        "hidden": f1.shape[1] - len(columns),
    }
