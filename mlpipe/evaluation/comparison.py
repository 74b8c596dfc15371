"""Several models on the same test images: who is better, and whether that is more than chance."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from mlpipe.evaluation import metrics as registry
from mlpipe.evaluation.metrics import Metric
from mlpipe.evaluation.result import ModelResult

SIGNIFICANCE = 0.05
SMALLEST_P = 1e-100
"""Smaller ones are given as smaller than this; they come out as 0 at some point."""


@dataclass(frozen=True)
class PairedTest:
    """McNemar's exact test: do two models err equally often on the same images?"""

    better: str
    worse: str
    only_better_right: int
    """Images that only the better model got right."""
    only_worse_right: int
    difference: float
    """Accuracy of the better model less that of the worse one, 0 to 1."""
    p_value: float
    p_adjusted: float
    """By Holm's method over all pairs of the comparison."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Models by falling accuracy, the tests between all pairs of them, and the models that have no result."""

    rows: tuple[ModelResult, ...]
    tests: tuple[PairedTest, ...]
    failed: dict[str, str] = field(default_factory=dict)
    """Reasons by model name."""

    @property
    def num_images(self) -> int:
        """Test images."""
        return self.rows[0].evaluation.num_images

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, by index."""
        return self.rows[0].evaluation.classes

    def test_between(self, first: str, second: str) -> PairedTest:
        """The paired test of two models, in any order."""
        return next(test for test in self.tests if {test.better, test.worse} == {first, second})

    def markdown(self) -> str:
        """The table, the paired tests and what there is to note, as GitHub-flavoured Markdown."""
        rows = [_table_row(row, self.num_images) for row in self.rows]
        header = _table_header()
        if self.is_cross_validated:
            header.insert(CROSS_VALIDATION_COLUMN, CROSS_VALIDATION)
            for cells, row in zip(rows, self.rows, strict=True):
                cells.insert(CROSS_VALIDATION_COLUMN, row.cross_validation_text)
        parts = [_markdown_table(header, rows, self.failed)]
        if self.tests:
            parts.append(_markdown_table(_TEST_HEADER, [_test_row(test) for test in self.tests], {}))
            parts.append("Paired tests: McNemar, exact, two-sided; p adjusted over all pairs by Holm's method.")
        notes = [f"{row.name}: {note}" for row in self.rows for note in row.evaluation.notes]
        parts.append("\n".join(f"- {_cell(note)}" for note in notes))
        return "\n\n".join(part for part in parts if part) + "\n"

    @property
    def is_cross_validated(self) -> bool:
        """Whether any model was."""
        return any(row.cross_validated for row in self.rows)

    def plain_table(self) -> str:
        """The models with their accuracies, a line each, for a log."""
        width = max(len(row.display_name) for row in self.rows)
        lines = [f"{row.display_name:<{width}}  {row.evaluation.accuracy_text}" for row in self.rows]
        head = f"{'model':<{width}}  accuracy (95 % interval)"
        if self.is_cross_validated:
            head += ", cross-validation"
            lines = [f"{line}, {row.cross_validation_text} %" for line, row in zip(lines, self.rows, strict=True)]
        return "\n".join([head, *lines])

    def csv(self) -> str:
        """The table with all digits, one row for each model, the failed ones last."""
        stream = io.StringIO()
        rows = [_csv_row(rank, row) for rank, row in enumerate(self.rows, start=1)]
        writer = csv.DictWriter(stream, fieldnames=[*rows[0], "failure"], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        for name, reason in self.failed.items():
            writer.writerow({"model": name, "failure": " ".join(reason.split())})
        return stream.getvalue()

    def summary(self) -> str:
        """Two to four sentences: the best model, its lead, what random weights mean here, what failed."""
        best = self.rows[0]
        accuracy, interval = best.evaluation.accuracy, best.evaluation.intervals["accuracy"]
        among = "the most accurate" if len(self.rows) > 1 else "the only model with a result"
        sentences = [
            f"{best.name} is {among} on {self.num_images:,} test images: "
            f"{_percent(accuracy, self.num_images)} % right "
            f"(95 % interval {_percent_range(interval, self.num_images)} %)."
        ]
        if len(self.rows) > 1:
            sentences.append(self._lead())
        random = [row.name for row in self.rows if row.random_weights]
        if random:
            sentences.append(_random_weights_sentence(random))
        if self.failed:
            reasons = "; ".join(f"{name} ({_first_line(reason)})" for name, reason in self.failed.items())
            sentences.append(f"Without a result: {reasons}.")
        return " ".join(sentences)

    def _lead(self) -> str:
        test = self.test_between(self.rows[0].name, self.rows[1].name)
        p_value = f"exact McNemar test, Holm-adjusted p {_p_text(test.p_adjusted)}"
        if test.difference == 0:
            return f"{test.worse} has the same accuracy ({p_value})."
        points = f"{100 * test.difference:.{_decimals(self.num_images)}f} points"
        if test.p_adjusted < SIGNIFICANCE:
            return f"Its lead of {points} over {test.worse}, the second, is beyond chance ({p_value})."
        return f"Its lead of {points} over {test.worse}, the second, may be chance ({p_value})."


def rank(result: ModelResult) -> tuple[float, float, str]:
    """The best model has the least. Equal accuracies go by log loss, then by name, never by who finished first."""
    return -result.evaluation.accuracy, result.evaluation.scores["log_loss"], result.name


def compare(results: Sequence[ModelResult], failed: Mapping[str, str] | None = None) -> Comparison:
    """Rank models and test every pair of them.

    Args:
        results: at least one.
        failed: reasons by the name of each model that has no result.

    Raises:
        ValueError: no result, or they were not measured on the same images and classes.
    """
    if not results:
        raise ValueError("results: none; at least one model must have been evaluated")
    rows = sorted(results, key=rank)
    _check_same_images(rows)
    return Comparison(rows=tuple(rows), tests=_paired_tests(rows), failed=dict(failed or {}))


def exact_mcnemar(first_correct: NDArray[np.bool_], second_correct: NDArray[np.bool_]) -> float:
    """Two-sided p value of McNemar's exact test, for two models on the same images (N,)."""
    only_first = int(np.sum(first_correct & ~second_correct))
    only_second = int(np.sum(~first_correct & second_correct))
    # The test looks at the discordant images alone; the concordant cells may be anything.
    return float(mcnemar([[0, only_first], [only_second, 0]], exact=True).pvalue)


def _paired_tests(rows: Sequence[ModelResult]) -> tuple[PairedTest, ...]:
    pairs = list(itertools.combinations(rows, 2))
    if not pairs:
        return ()
    correct = [tuple(model.evaluation.predictions.correct for model in pair) for pair in pairs]
    p_values = [exact_mcnemar(first, second) for first, second in correct]
    adjusted = multipletests(p_values, alpha=SIGNIFICANCE, method="holm")[1]
    return tuple(
        PairedTest(
            better=first.name,
            worse=second.name,
            only_better_right=int(np.sum(first_correct & ~second_correct)),
            only_worse_right=int(np.sum(~first_correct & second_correct)),
            difference=first.evaluation.accuracy - second.evaluation.accuracy,
            p_value=p_value,
            p_adjusted=float(p_adjusted),
        )
        for (first, second), (first_correct, second_correct), p_value, p_adjusted in zip(
            pairs, correct, p_values, adjusted, strict=True
        )
    )


def _check_same_images(rows: Sequence[ModelResult]) -> None:
    first = rows[0].evaluation
    for row in rows:
        evaluation = row.evaluation
        if evaluation.classes != first.classes or not np.array_equal(
            evaluation.predictions.labels, first.predictions.labels
        ):
            raise ValueError(f"{row.name} and {rows[0].name} were not measured on the same images and classes")


# --- Texts

_TEST_HEADER = ("Better", "Worse", "Lead, points", "Only better right", "Only worse right", "p", "p adjusted")
CROSS_VALIDATION = "Cross-validation, %"
"""Title of a column: mean accuracy and its standard error."""
CROSS_VALIDATION_COLUMN = 3
_FEWER_DECIMALS = 3
"""Of metrics that are no shares."""


def _table_header() -> list[str]:
    return ["Model", "Started from", *map(_heading, _shown_metrics()), "Training, s", "Images/s"]


def _shown_metrics() -> list[Metric]:
    return [metric for metric in registry.METRICS if metric.title]


def _heading(metric: Metric) -> str:
    unit = ", %" if metric.is_share else ""
    return f"{metric.title}{unit}{' (95 % interval)' if metric.name == 'accuracy' else ''}"


def _table_row(row: ModelResult, num_images: int) -> list[str]:
    evaluation = row.evaluation
    cells = [row.display_name, "–" if row.weights == "none" else row.weights]
    for metric in _shown_metrics():
        value = evaluation.scores[metric.name]
        cell = _percent(value, num_images) if metric.is_share else f"{value:.{_FEWER_DECIMALS}f}"
        if metric.name == "accuracy":
            cell += f" ({_percent_range(evaluation.intervals['accuracy'], num_images)})"
        cells.append(cell)
    return [
        *cells,
        "–" if row.train_seconds is None else f"{row.train_seconds:,.1f}",
        "–" if row.images_per_second is None else f"{row.images_per_second:,.0f}",
    ]


def _test_row(test: PairedTest) -> list[str]:
    return [
        test.better,
        test.worse,
        f"{100 * test.difference:.2f}",
        str(test.only_better_right),
        str(test.only_worse_right),
        p_cell(test.p_value),
        p_cell(test.p_adjusted),
    ]


def _csv_row(rank: int, row: ModelResult) -> dict[str, object]:
    evaluation = row.evaluation
    values: dict[str, object] = {"rank": rank, "model": row.name, "weights": row.weights}
    for name, value in evaluation.scores.items():
        values[name] = value
        if interval := evaluation.intervals.get(name):
            values[f"{name}_ci_low"], values[f"{name}_ci_high"] = interval
    # None becomes an empty field
    mean, error = row.cross_validated or (None, None)
    values |= {"cross_validated_accuracy": mean, "cross_validation_error": error}
    values |= {"train_seconds": row.train_seconds, "images_per_second": row.images_per_second}
    return values | {"num_test_images": evaluation.num_images}


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], failed: Mapping[str, str]) -> str:
    failures = [
        [name, f"no result: {_first_line(reason)}", *["–"] * (len(header) - 2)] for name, reason in failed.items()
    ]
    num_texts = 2  # the first columns hold words, the others numbers
    rule = ["---"] * num_texts + ["---:"] * (len(header) - num_texts)
    lines = [header, rule, *rows, *failures]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Text that neither ends a table's cell nor reads as HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _decimals(num_images: int) -> int:
    return 2 if num_images >= 5000 else 1  # one image more or less is to be seen, and hardly less


def _percent(share: float, num_images: int) -> str:
    return f"{100 * share:.{_decimals(num_images)}f}"


def _percent_range(interval: tuple[float, float], num_images: int) -> str:
    return "–".join(_percent(limit, num_images) for limit in interval)


def p_cell(p_value: float) -> str:
    """A p value of three digits, or that it is below the smallest that is given."""
    return f"{p_value:.3g}" if p_value >= SMALLEST_P else f"< {SMALLEST_P:g}"


def _p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"


def _first_line(reason: str, limit: int = 200) -> str:
    line = next((line.strip() for line in reason.splitlines() if line.strip()), "no reason given").rstrip(".")
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _random_weights_sentence(names: Sequence[str]) -> str:
    if len(names) == 1:
        return (
            f"{names[0]} started from random weights, so its result shows what it learned from this data set's "
            "training images alone and says nothing of a pretrained version."
        )
    return (
        f"{', '.join(names[:-1])} and {names[-1]} started from random weights, so their results show what they learned "
        "from this data set's training images alone and say nothing of pretrained versions."
    )
