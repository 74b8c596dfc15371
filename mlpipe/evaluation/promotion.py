"""The gate that a model passes to become the champion: measurements and thresholds in, a decision with reasons out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, permutation_test, random_table

from mlpipe.config import PromotionConfig, PromotionMetric
from mlpipe.evaluation.comparison import exact_mcnemar
from mlpipe.evaluation.metrics import listed

_ROUNDING = 1e-9
"""Far below one image's share; keeps 0.3 - 0.2 from exceeding 0.1."""
NUM_PERMUTATIONS = 9_999
_CELLS_AT_ONCE = 4_000_000  # of confusion matrices: 32 MB
BY_HAND = "Remove the alias, or move it by hand, if this model is to take its place."


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """A registered model version and how it did on this run's test images."""

    name: str
    """For the reader: custom_cnn."""
    version: str
    """Of the registered model."""
    classes: tuple[str, ...]
    """Those that it knows; their order does not matter."""
    labels: NDArray[np.int64] | None = None
    """(N,) true classes of the test images."""
    correct: NDArray[np.bool_] | None = None
    """(N,) which of them it got right; `None`: it was not measured."""
    confusion: NDArray[np.int64] | None = None
    """(K, K) test images; rows are the true classes, columns the predicted ones."""
    problem: str | None = None
    """Why it could not be measured on these images."""

    def __str__(self) -> str:
        return f"{self.name} (version {self.version})"


@dataclass(frozen=True)
class Decision:
    """Whether the candidate is to become the champion, and every reason for or against, in sentences."""

    promote: bool
    reasons: tuple[str, ...]


def decide(
    candidate: Measured, champion: Measured | None, rules: PromotionConfig, unseen: NDArray[np.bool_] | None = None
) -> Decision:
    """Judge a candidate against chance and against the current champion on the same images.

    `rules.mode` is not looked at: the caller acts on the decision or does not. A champion that could not be measured
    on these images, or that knows other classes, is never replaced: whether its users want that is theirs to say.

    Args:
        unseen: (N,) the test images that the champion was not trained on; `None`: that is not known.
    """
    if champion is not None and champion.version == candidate.version:
        return Decision(False, (f"{candidate} is the champion already.",))
    if candidate.correct is None or candidate.labels is None or candidate.confusion is None:
        return Decision(False, (f"{candidate} was not measured: {candidate.problem or 'it has no predictions'}.",))
    checks = [
        _above_chance(candidate.labels, candidate.correct, candidate.confusion, rules),
        _beats(candidate, champion, rules, unseen),
    ]
    return Decision(all(passed for passed, _ in checks), tuple(reason for _, reason in checks))


def score(metric: PromotionMetric, labels: NDArray[np.int64], correct: NDArray[np.bool_]) -> float:
    """Accuracy, or the mean of the classes' recalls (balanced accuracy, of the classes that have images), 0 to 1."""
    return float(np.sum(_weights(metric, labels) * correct))


def _weights(metric: PromotionMetric, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """(N,) what each image that is right adds to the score."""
    if metric == "accuracy":
        return np.full(len(labels), 1 / len(labels))
    counts = np.bincount(labels)
    return 1 / (np.count_nonzero(counts) * counts[labels])


def chance(metric: PromotionMetric, labels: NDArray[np.int64]) -> float:
    """Score of the best model that answers one class always, 0 to 1."""
    counts = np.bincount(labels)
    return float(counts.max() / len(labels)) if metric == "accuracy" else 1 / np.count_nonzero(counts)


def _above_chance(
    labels: NDArray[np.int64], correct: NDArray[np.bool_], confusion: NDArray[np.int64], rules: PromotionConfig
) -> tuple[bool, str]:
    metric, named = rules.metric, rules.metric.replace("_", " ")
    found = score(metric, labels, correct)
    least = chance(metric, labels)
    needed = least + rules.min_accuracy_over_chance
    what = "the share of the largest class" if metric == "accuracy" else "what one answer for all images would give"
    if found < needed - _ROUNDING:
        return False, (
            f"Its {named} of {found:.4f} is below {needed:.4f}: {least:.4f} is {what}, and the margin is "
            f"{rules.min_accuracy_over_chance:g}."
        )
    if rules.significance < 1 and (p_value := chance_p_value(metric, confusion)) >= rules.significance:
        test = "exact binomial" if metric == "accuracy" else "permutation"
        return False, (
            f"Its {named} of {found:.4f} may be chance, for {least:.4f} is {what} ({test} test: p = {p_value:.3g}, "
            f"{rules.significance:g} is the limit). More test images would tell."
        )
    return True, f"Its {named} of {found:.4f} reaches {needed:.4f}, which is {what} and a margin."


def chance_p_value(metric: PromotionMetric, confusion: NDArray[np.int64]) -> float:
    """One-sided: is the score more than that of a model which does not look at the images?

    Accuracy: exact binomial test against the share of the largest class. Balanced accuracy: permutation test, over
    confusion matrices of the same numbers of true and of predicted images of each class.
    """
    supports, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    total = int(supports.sum())
    if metric == "accuracy":
        right, largest = int(np.trace(confusion)), int(supports.max())
        return float(binomtest(right, total, largest / total, alternative="greater").pvalue)
    weights = np.divide(1.0, supports, out=np.zeros(len(supports)), where=supports > 0)
    observed = float(weights @ np.diagonal(confusion))
    rng, drawn, as_good = np.random.default_rng(0), 0, 0
    while drawn < NUM_PERMUTATIONS:
        size = min(NUM_PERMUTATIONS - drawn, max(1, _CELLS_AT_ONCE // confusion.size))
        tables = random_table.rvs(supports, predicted, size=size, random_state=rng)
        scores = np.diagonal(tables, axis1=-2, axis2=-1).reshape(size, -1) @ weights
        as_good += int((scores >= observed - _ROUNDING).sum())
        drawn += size
    return (1 + as_good) / (1 + NUM_PERMUTATIONS)


def _beats(
    candidate: Measured, champion: Measured | None, rules: PromotionConfig, unseen: NDArray[np.bool_] | None
) -> tuple[bool, str]:
    if champion is None:
        return True, "It is the first champion."
    if champion.correct is None or candidate.correct is None or candidate.labels is None:
        return False, (
            f"The champion, {champion}, could not be measured on the same images: "
            f"{champion.problem or 'it has no predictions'}. {BY_HAND}"
        )
    if set(champion.classes) != set(candidate.classes):
        return False, f"The champion, {champion}, {_other_classes(champion.classes, candidate.classes)}. {BY_HAND}"
    used = np.ones(len(candidate.labels), bool) if unseen is None else unseen
    if not used.any():
        return False, f"The champion, {champion}, was trained on all of these test images. {BY_HAND}"
    labels, new, old = candidate.labels[used], candidate.correct[used], champion.correct[used]
    scores = [score(rules.metric, labels, each) for each in (new, old)]
    difference, p_value = scores[0] - scores[1], _p_value(rules.metric, labels, new, old)
    larger = difference > rules.min_improvement + _ROUNDING
    sure = p_value < rules.significance or rules.significance >= 1
    verdict = f"is {'' if larger else 'not '}above {rules.min_improvement:g}"
    if larger and not sure:
        verdict = f"may be chance, and a champion is replaced where p is below {rules.significance:g}"
    if unseen is None:
        left_out = " (which of them it was trained on is not known)"
    else:
        left_out = "" if used.all() else f" ({int((~used).sum()):,} that it was trained on were left out)"
    return larger and sure, (
        f"On the same {len(labels):,} images{left_out} the champion, {champion}, has {_article(rules.metric)} of "
        f"{scores[1]:.4f}: the difference of {difference:+.4f} {verdict} "
        f"({'exact McNemar' if rules.metric == 'accuracy' else 'paired permutation'} test: p = {p_value:.3g})."
    )


def _article(metric: PromotionMetric) -> str:
    return "an accuracy" if metric == "accuracy" else "a balanced accuracy"


def _p_value(
    metric: PromotionMetric, labels: NDArray[np.int64], new: NDArray[np.bool_], old: NDArray[np.bool_]
) -> float:
    """Two-sided: are the two models equally good?"""
    if metric == "accuracy":
        return exact_mcnemar(new, old)
    differ = new != old  # the others cannot change the difference
    if not differ.any():
        return 1.0
    weights = _weights(metric, labels)[differ]
    result = permutation_test(
        (weights * new[differ], weights * old[differ]),
        lambda first, second, axis: np.sum(first - second, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_PERMUTATIONS,
        batch=max(1, 2_000_000 // int(differ.sum())),
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def _other_classes(champion: Sequence[str], candidate: Sequence[str]) -> str:
    new, gone = sorted(set(candidate) - set(champion)), sorted(set(champion) - set(candidate))
    parts = []
    if new:
        parts.append(f"does not know {listed([*map(repr, new)], 3)}")
    if gone:
        parts.append(
            f"knows {listed([*map(repr, gone)], 3)}, which {'is no class' if len(gone) == 1 else 'are no classes'} here"
        )
    return " and ".join(parts)


def finite(values: Mapping[str, float]) -> str | None:
    """What is wrong with metrics of which some are not finite; `None`: nothing."""
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    return f"metrics are not finite: {', '.join(broken)}" if broken else None
