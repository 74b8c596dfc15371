"""The gate that a model passes to become the champion: measurements and thresholds in, a decision with reasons out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, permutation_test, random_table

from mlpipe.config import PromotionConfig, PromotionMetric, PromotionMode
from mlpipe.evaluation.comparison import exact_mcnemar, p_cell
from mlpipe.evaluation.metrics import Predictions
from mlpipe.evaluation.result import ModelResult, Unmeasured
from mlpipe.evaluation.scoring import listed

CHAMPION = "champion"
"""Alias of the best version so far."""

_ROUNDING = 1e-9
"""Far below one image's share; keeps 0.3 - 0.2 from exceeding 0.1."""
NUM_PERMUTATIONS = 9_999
_CELLS_AT_ONCE = 4_000_000  # of confusion matrices: 32 MB
BY_HAND = "Remove the alias, or move it by hand, if this model is to take its place."


@dataclass(frozen=True, eq=False, kw_only=True)
class Overlap:
    """Which of this run's images a champion was trained on."""

    unseen: NDArray[np.bool_]
    """(N,) the test images that it was not trained on."""
    same_problem: bool = True
    """Whether any image of its training is in this data set."""


@dataclass(frozen=True)
class Decision:
    """Whether the candidate is to become the champion, and every reason for or against, in sentences."""

    promote: bool
    reasons: tuple[str, ...]


def decide(
    candidate: ModelResult,
    champion: ModelResult | Unmeasured | None,
    rules: PromotionConfig,
    overlap: Overlap | None = None,
    num_models: int = 1,
) -> Decision:
    """Judge a candidate against chance and against the current champion on the same images.

    `rules.mode` is not looked at: the caller acts on the decision or does not. A champion that could not be measured
    on these images is never replaced: whether its users want that is theirs to say.

    Args:
        overlap: of the champion's training images and this data set; `None`: it is not known.
        num_models: of which the candidate is the best on these images (Bonferroni's correction).
    """
    if champion is not None and champion.version == candidate.version:
        return Decision(False, (f"{candidate} is the champion already.",))
    broken = [name for name, value in candidate.evaluation.as_metrics().items() if not math.isfinite(value)]
    if broken:
        return Decision(False, (f"{candidate} was not measured: metrics are not finite: {', '.join(broken)}.",))
    unseen = candidate.unseen
    if not unseen.any():
        return Decision(False, (f"What {candidate} started or learned from was trained on all of these test images.",))
    predictions = candidate.evaluation.predictions
    measured = Predictions(predictions.labels[unseen], predictions.probabilities[unseen])
    checks = [_above_chance(measured, rules), _beats(candidate, champion, rules, overlap, num_models)]
    return Decision(all(passed for passed, _ in checks), tuple(reason for _, reason in checks))


def score(metric: PromotionMetric, labels: NDArray[np.int64], correct: NDArray[np.bool_]) -> float:
    """Accuracy, or the mean of the classes' recalls (balanced accuracy, of the classes that have images), 0 to 1."""
    return float(np.sum(_weights(metric, labels) * correct))


def _score_of(result: ModelResult, metric: PromotionMetric) -> float:
    predictions, unseen = result.evaluation.predictions, result.unseen
    return score(metric, predictions.labels[unseen], predictions.correct[unseen]) if unseen.any() else 0.0


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


def _above_chance(predictions: Predictions, rules: PromotionConfig) -> tuple[bool, str]:
    metric, named = rules.metric, rules.metric.replace("_", " ")
    found = score(metric, predictions.labels, predictions.correct)
    least = chance(metric, predictions.labels)
    needed = least + rules.min_accuracy_over_chance
    what = "the share of the largest class" if metric == "accuracy" else "what one answer for all images would give"
    if found < needed - _ROUNDING:
        return False, (
            f"Its {named} of {found:.4f} is below {needed:.4f}: {least:.4f} is {what}, and the margin is "
            f"{rules.min_accuracy_over_chance:g}."
        )
    if rules.significance < 1 and (p_value := chance_p_value(metric, predictions.confusion)) >= rules.significance:
        test = "exact binomial" if metric == "accuracy" else "permutation"
        return False, (
            f"Its {named} of {found:.4f} may be chance, because {least:.4f} is {what} ({test} test: p = {p_value:.3g}, "
            f"{rules.significance:g} is the limit). More test images would tell."
        )
    margin = rules.min_accuracy_over_chance
    return True, f"Its {named} of {found:.4f} reaches {needed:.4f}: {what} plus {margin:g}."


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
    candidate: ModelResult,
    champion: ModelResult | Unmeasured | None,
    rules: PromotionConfig,
    overlap: Overlap | None,
    num_models: int,
) -> tuple[bool, str]:
    if champion is None:
        return True, "It is the first champion."
    if isinstance(champion, Unmeasured):
        return False, f"The champion, {champion}, {champion.problem}. {BY_HAND}"
    labels = candidate.evaluation.predictions.labels
    if overlap and not overlap.same_problem:
        return False, (
            f"The champion, {champion}, was trained on other images: none of them is in this data set, so it may solve "
            f"another problem. Give this data set a name of its own (--name). {BY_HAND}"
        )
    used = candidate.unseen & overlap.unseen if overlap else candidate.unseen
    if not used.any():
        if candidate.known is None:
            return False, f"The champion, {champion}, was trained on all of these test images. {BY_HAND}"
        return False, (
            f"No test image is left that neither the champion, {champion}, was trained on, nor what {candidate} "
            f"started or learned from. {BY_HAND}"
        )
    new, old = (each.evaluation.predictions.correct[used] for each in (candidate, champion))
    labels = labels[used]
    scores = [score(rules.metric, labels, each) for each in (new, old)]
    difference = scores[0] - scores[1]
    p_value = min(1.0, num_models * _p_value(rules.metric, labels, new, old))
    larger = difference > rules.min_improvement + _ROUNDING
    sure = p_value < rules.significance or rules.significance >= 1
    verdict = f"is {'' if larger else 'not '}above {rules.min_improvement:g}"
    if larger and not sure:
        verdict = f"may be chance, and a champion is replaced where p is below {rules.significance:g}"
    if overlap is None:
        left_out = " (which of them it was trained on is not known)"
    else:
        who = "it was" if candidate.known is None else "one of both was"
        left_out = "" if used.all() else f" ({int((~used).sum()):,} that {who} trained on were left out)"
    test = "exact McNemar" if rules.metric == "accuracy" else "paired permutation"
    corrected = f", times the {num_models} models that were compared" if num_models > 1 else ""
    return larger and sure, (
        f"On the same {len(labels):,} images{left_out} the champion, {champion}, has {_article(rules.metric)} of "
        f"{scores[1]:.4f}: the difference of {difference:+.4f} {verdict} "
        f"({test} test: p {_equals(p_value)}{corrected})."
    )


def _equals(p_value: float) -> str:
    text = p_cell(p_value)
    return text if text.startswith("<") else f"= {text}"


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


def other_classes(champion: Sequence[str], candidate: Sequence[str]) -> str:
    """How the classes of a champion differ from those of a candidate, as the end of a sentence about the champion."""
    new, gone = sorted(set(candidate) - set(champion)), sorted(set(champion) - set(candidate))
    parts = []
    if new:
        parts.append(f"does not know {listed([*map(repr, new)], 3)}")
    if gone:
        parts.append(
            f"knows {listed([*map(repr, gone)], 3)}, which {'is no class' if len(gone) == 1 else 'are no classes'} here"
        )
    return " and ".join(parts)


class Aliases(Protocol):
    """The names of versions of one registered model, as a registry keeps them."""

    def holder(self, alias: str) -> str | None:
        """The version that bears the alias, or `None`."""

    def predecessor(self, alias: str, version: str) -> str | None:
        """What bore the alias before this DAG run gave it to the version; if it did not, that version."""

    def move(self, alias: str, version: str) -> None:
        """Point the alias at the version."""


@dataclass(frozen=True, kw_only=True)
class AliasDecision:
    """What became of one alias."""

    candidate: str
    """`version (model)`"""
    holder: str | None
    """Version that bore the alias before; `None`: none did."""
    mode: PromotionMode
    promote: bool
    moved: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """What the gate decided for each alias."""

    decisions: Mapping[str, AliasDecision]
    """By alias."""
    champion: str | None
    """Version of the champion after the run; `None`: there is none, or it may solve another problem."""
    moved_champion: bool
    summary: str
    former: ModelResult | None = None
    """The champion before the run, if it was measured on the same images and is none of the run's models."""


def promote(
    rules: PromotionConfig,
    ranked: Sequence[ModelResult],
    aliases: Aliases,
    remeasure: Callable[[str], ModelResult | Unmeasured],
    overlap_with: Callable[[str], Overlap | None],
) -> Promotion:
    """Pass the best model, and the best of each architecture, through the gate; move aliases where rules say so.

    Args:
        ranked: this run's models, best first; candidates are the best by the rules' metric.
        remeasure: measures another version on the same images.
        overlap_with: of a version's training images and this data set; `None`: it is not known.
    """
    ranked = sorted(ranked, key=lambda result: -_score_of(result, rules.metric))
    candidates = {CHAMPION: ranked[0]}
    for result in ranked:
        candidates.setdefault(result.architecture, result)
    known: dict[str, ModelResult | Unmeasured] = {result.version: result for result in ranked}
    overlaps: dict[str, Overlap | None] = {}
    decisions: dict[str, AliasDecision] = {}
    for alias, candidate in candidates.items():
        num_models = len(ranked) if alias == CHAMPION else sum(result.architecture == alias for result in ranked)
        while True:
            now = holder = aliases.holder(alias)
            if holder == candidate.version:  # given by an attempt before, or before this task was cleared
                holder = aliases.predecessor(alias, candidate.version)
            if holder and holder not in known:
                known[holder] = remeasure(holder)
            if holder and holder not in overlaps:
                overlaps[holder] = overlap_with(holder)
            champion, overlap = (known[holder], overlaps[holder]) if holder else (None, None)
            decision = decide(candidate, champion, rules, overlap, num_models)
            moved = decision.promote and rules.mode == "enabled"
            if not moved or aliases.holder(alias) == now:  # another DAG run may have moved it meanwhile
                break
        if moved:
            aliases.move(alias, candidate.version)
        decisions[alias] = AliasDecision(
            candidate=str(candidate),
            holder=holder,
            mode=rules.mode,
            promote=decision.promote,
            moved=moved,
            reasons=decision.reasons,
        )
    verdict = decisions[CHAMPION]
    now = aliases.holder(CHAMPION)
    former = known.get(verdict.holder) if verdict.holder else None
    before = overlaps.get(now) if now else None
    return Promotion(
        decisions=decisions,
        champion=now if before is None or before.same_problem else None,
        moved_champion=verdict.moved,
        summary=_summary(ranked[0].name, verdict),
        former=former if isinstance(former, ModelResult) and former not in ranked else None,
    )


def _summary(name: str, verdict: AliasDecision) -> str:
    if verdict.mode == "disabled":
        return "Promotion is disabled: no alias was moved."
    reasons = " ".join(verdict.reasons)
    if not verdict.promote:
        return f"{name} does not become the champion. {reasons}"
    if verdict.mode == "dry_run":
        return f"{name} would become the champion, but this is a dry run. {reasons}"
    return f"{name} is the new champion. {reasons}"
