"""The result of a run as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2

from mlpipe.evaluation import metrics
from mlpipe.evaluation.comparison import Comparison


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure of the report."""

    title: str
    png: bytes

    @property
    def source(self) -> str:
        """As the `src` of an image element."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def render(
    comparison: Comparison,
    *,
    title: str,
    verdict: str,
    notes: Sequence[str],
    pictures: Sequence[Picture],
    of_models: Mapping[str, Sequence[Picture]],
    snippet: str,
    links: Mapping[str, str],
) -> str:
    """Write the page.

    Args:
        verdict: the result in sentences.
        notes: on the data, a sentence each.
        pictures: of all models together; shown at once.
        of_models: by model's name; shown when they are asked for.
        snippet: Python that loads the best model.
        links: addresses by what they lead to.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = resources.files("mlpipe.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=title,
        verdict=verdict,
        notes=[*notes, *(f"{row.name}: {note}" for row in comparison.rows for note in row.evaluation.notes)],
        metrics=[metric for metric in metrics.METRICS if metric.title],
        comparison=comparison,
        pictures=pictures,
        of_models=of_models,
        snippet=snippet,
        links=links,
    )
