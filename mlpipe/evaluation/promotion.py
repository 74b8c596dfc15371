"""The gate that a model passes to become the champion: measurements and thresholds in, a decision with reasons out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlpipe.config import PromotionConfig
from mlpipe.evaluation.comparison import exact_mcnemar

_ROUNDING = 1e-9
"""Far below one image's share; keeps 0.3 - 0.2 from exceeding 0.1."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """A registered model version and how it did on this run's test images."""

    name: str
    """For the reader: custom_cnn."""
    version: str
    """Of the registered model."""
    classes: tuple[str, ...]
    """Those that it tells apart; their order does not matter."""
    metrics: Mapping[str, float]
    """As `Evaluation.as_metrics` gives them; empty where it could not be measured."""
    correct: NDArray[np.bool_] | None = None
    """(N,) which images it got right, for the paired test."""
    problem: str | None = None
    """Why it could not be measured on these images."""

    def __str__(self) -> str:
        return f"{self.name} (version {self.version})"

    @property
    def accuracy(self) -> float:
        """test/accuracy, NaN where it was not measured."""
        return float(self.metrics.get("test/accuracy", math.nan))


@dataclass(frozen=True)
class Decision:
    """Whether the candidate is to become the champion, and every reason for or against, in sentences."""

    promote: bool
    reasons: tuple[str, ...]


def decide(candidate: Measured, champion: Measured | None, rules: PromotionConfig) -> Decision:
    """Judge a candidate against chance and against the current champion on the same images.

    `rules.mode` is not looked at: the caller acts on the decision or does not. A champion that could not be measured
    on these images, or that tells other classes apart, is never replaced: whether its users want that is theirs to say.
    """
    if champion is not None and champion.version == candidate.version:
        return Decision(False, (f"{candidate} is the champion already.",))
    checks = [_finite(candidate)]
    if checks[0][0]:
        checks += [_above_chance(candidate, rules), _beats(candidate, champion, rules)]
    return Decision(all(passed for passed, _ in checks), tuple(reason for _, reason in checks))


def _finite(candidate: Measured) -> tuple[bool, str]:
    if "test/accuracy" not in candidate.metrics:
        return False, f"{candidate} was not measured: {candidate.problem or 'test/accuracy is missing'}."
    broken = [name for name, value in candidate.metrics.items() if not math.isfinite(value)]
    if broken:
        return False, f"{candidate} has metrics that are not finite: {', '.join(broken)}."
    return True, f"{candidate} has finite metrics."


def _above_chance(candidate: Measured, rules: PromotionConfig) -> tuple[bool, str]:
    chance = 1 / len(candidate.classes)
    needed = chance + rules.min_accuracy_over_chance
    passed = candidate.accuracy >= needed - _ROUNDING
    return passed, (
        f"Its accuracy of {candidate.accuracy:.4f} {'reaches' if passed else 'is below'} {needed:.4f}, which is chance "
        f"among {len(candidate.classes)} classes ({chance:.4f}) and a margin of {rules.min_accuracy_over_chance:g}."
    )


def _beats(candidate: Measured, champion: Measured | None, rules: PromotionConfig) -> tuple[bool, str]:
    if champion is None:
        return True, "There is no champion yet."
    if set(champion.classes) != set(candidate.classes):
        return False, (
            f"The champion, {champion}, cannot be compared: it tells {len(champion.classes)} other classes apart. "
            "Remove the alias, or move it by hand, if this model is to take its place."
        )
    if not math.isfinite(champion.accuracy):
        return False, (
            f"The champion, {champion}, could not be measured on the same images: "
            f"{champion.problem or 'it has no accuracy'}. "
            "Remove the alias, or move it by hand, if this model is to take its place."
        )
    difference = candidate.accuracy - champion.accuracy
    passed = difference > rules.min_improvement + _ROUNDING
    return passed, (
        f"On the same images the champion, {champion}, has an accuracy of {champion.accuracy:.4f}: the difference of "
        f"{difference:+.4f} {'is' if passed else 'is not'} above {rules.min_improvement:g}"
        f"{_paired_information(candidate, champion)}."
    )


def _paired_information(candidate: Measured, champion: Measured) -> str:
    if candidate.correct is None or champion.correct is None:
        return ""
    return f" (exact McNemar test: p = {exact_mcnemar(candidate.correct, champion.correct):.3g})"
