"""Measuring logged models as a user would load them, and what MLflow shows of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mlpipe.config import PromotionConfig
from mlpipe.data.dataset import Split
from mlpipe.errors import UserError
from mlpipe.evaluation import figures
from mlpipe.evaluation.comparison import Comparison
from mlpipe.evaluation.metrics import Evaluation, evaluate_predictions
from mlpipe.evaluation.promotion import Decision, Measured, decide, finite
from mlpipe.tracking import registry
from mlpipe.tracking.runs import TrackedRun, is_unreachable, tracked

BYTES_PER_CALL = 6 << 20
"""Pixels handed to `predict` at once, so that test images need not fit in memory: 2048 images of 32×32."""

BOOTSTRAP_SEED = 0
"""The same for all, so that equal predictions have equal intervals."""

PROBABILITY = "probability_"
"""Prefix of a logged model's output columns."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """One model on the test images."""

    evaluation: Evaluation
    probabilities: NDArray[np.float64]
    """(N, K) in the order of the data set's classes."""
    correct: NDArray[np.bool_]
    """(N,) whether the most probable class is the true one."""


def measure(model_uri: str, test: Split, classes: Sequence[str]) -> Result:
    """Load a model by its address, as any user would, and score its predictions.

    Raises:
        UserError: the model tells other classes apart.
    """
    model = mlflow.pyfunc.load_model(model_uri)
    parts = test.images_u8.slices(BYTES_PER_CALL)
    frames = [model.predict(test.images_u8[part]) for part in parts]
    frame = pd.concat(frames, ignore_index=True)
    columns = [f"{PROBABILITY}{name}" for name in classes]
    own = [column for column in frame.columns if column.startswith(PROBABILITY)]
    if set(own) != set(columns):
        unknown = sorted(set(columns) - set(own)) or sorted(set(own) - set(columns))
        raise UserError(
            f"{model_uri} has other classes than these images: {len(own)} in place of {len(columns)}, "
            f"such as {unknown[0].removeprefix(PROBABILITY)!r}"
        )
    probabilities = frame[columns].to_numpy(np.float64)
    return Result(
        evaluation=evaluate_predictions(test.labels, probabilities, classes, seed=BOOTSTRAP_SEED),
        probabilities=probabilities,
        correct=probabilities.argmax(axis=1) == test.labels,
    )


def log_evaluation(model: Mapping[str, Any], result: Result, test: Split) -> None:
    """Add test metrics and pictures to the run that trained the model.

    Args:
        model: its `name`, `run_id` and `model_id`.
    """
    run, evaluation, name = tracked(model["run_id"]), result.evaluation, model["name"]
    run.log_metrics(evaluation.as_metrics(), model_id=model["model_id"])
    run.log_figure(figures.confusion_matrix_figure(evaluation, name), "confusion_matrix.png")
    frame = pd.DataFrame(evaluation.confusion, index=evaluation.classes, columns=evaluation.classes)
    run.log_text(frame.to_csv(index_label="true \\ predicted"), "confusion_matrix.csv")
    run.log_figure(figures.reliability_figure(evaluation, name), "calibration.png")
    worst = figures.mistakes_figure(test.images_u8, test.labels, result.probabilities, evaluation.classes, name)
    run.log_figure(worst, "worst_mistakes.png")
    if evaluation.notes:
        run.log_text("\n".join(evaluation.notes), "notes.txt")


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """What the gate decided for each alias."""

    decisions: dict[str, dict[str, Any]]
    """By alias: version, whether it was promoted and moved, and the reasons."""
    champion: dict[str, Any] | None
    """`name`, `version` and `model_uri` of the champion after the run; `None`: there is none."""
    moved_champion: bool
    summary: str


def promote(
    rules: PromotionConfig,
    name: str,
    ranked: Sequence[tuple[dict[str, Any], Result]],
    remeasure: Callable[[str], Result],
    unseen_by: Callable[[registry.RegisteredVersion], NDArray[np.bool_] | None],
    labels: NDArray[np.int64],
) -> Promotion:
    """Pass the best model, and the best of each architecture, through the gate; move aliases where rules say so.

    Args:
        name: of the registered model.
        ranked: this run's models with their results, best first.
        remeasure: scores another version on the same images.
        unseen_by: (N,) which of those a version was not trained on; `None`: that is not known.
        labels: (N,) of the images.
    """
    candidates = {registry.CHAMPION: ranked[0]}
    for model, result in ranked:
        candidates.setdefault(model["architecture"], (model, result))
    known = {model["version"]: _measured(model["name"], model["version"], result, labels) for model, result in ranked}
    unseen: dict[str, NDArray[np.bool_] | None] = {}
    decisions: dict[str, dict[str, Any]] = {}
    for alias, (model, _) in candidates.items():
        holder = registry.by_alias(name, alias)
        if holder and holder.version not in known:
            known[holder.version] = _remeasured(holder, remeasure, labels)
        if holder and holder.version not in unseen:
            unseen[holder.version] = unseen_by(holder)
        decision = decide(
            known[model["version"]],
            known[holder.version] if holder else None,
            rules,
            unseen[holder.version] if holder else None,
        )
        moved = decision.promote and rules.mode == "enabled"
        if moved:
            registry.move_alias(name, alias, model["version"])
        decisions[alias] = {
            "candidate": f"{name}/{model['version']} ({model['name']})",
            "holder": f"{name}/{holder.version}" if holder else None,
            "mode": rules.mode,
            "promote": decision.promote,
            "moved": moved,
            "reasons": list(decision.reasons),
        }
    now = registry.by_alias(name, registry.CHAMPION)
    verdict = decisions[registry.CHAMPION]
    return Promotion(
        decisions=decisions,
        champion={"name": name, "version": now.version, "model_uri": now.uri} if now else None,
        moved_champion=verdict["moved"],
        summary=_promotion_summary(ranked[0][0]["name"], rules, Decision(verdict["promote"], verdict["reasons"])),
    )


def _measured(name: str, version: str, result: Result, labels: NDArray[np.int64]) -> Measured:
    evaluation = result.evaluation
    problem = finite(evaluation.as_metrics())
    return Measured(
        name=name,
        version=version,
        classes=evaluation.classes,
        labels=labels,
        correct=None if problem else result.correct,
        confusion=evaluation.confusion,
        problem=problem,
    )


def _remeasured(
    holder: registry.RegisteredVersion, remeasure: Callable[[str], Result], labels: NDArray[np.int64]
) -> Measured:
    label = holder.tags.get("model", "a model of unknown name")
    try:
        return _measured(label, holder.version, remeasure(holder.uri), labels)
    except Exception as error:  # an alias may have been moved to a model that anybody wrote
        if is_unreachable(error):
            raise
        return Measured(name=label, version=holder.version, classes=(), problem=str(error) or repr(error))


def _promotion_summary(name: str, rules: PromotionConfig, decision: Decision) -> str:
    if rules.mode == "disabled":
        return "Promotion is disabled: no alias was moved."
    reasons = " ".join(decision.reasons)
    if not decision.promote:
        return f"{name} does not become the champion. {reasons}"
    if rules.mode == "dry_run":
        return f"{name} would become the champion, but this is a dry run. {reasons}"
    return f"{name} is the new champion. {reasons}"


def log_comparison(run: TrackedRun, comparison: Comparison, promotion: Promotion, description: str) -> None:
    """Put table, charts and the gate's reasons on the parent run."""
    best = comparison.rows[0]
    run.replace_metrics(  # a model that failed may have been trained since
        {
            "best/test/accuracy": best.evaluation.accuracy,
            "num_models": len(comparison.rows),
            "num_failed_models": len(comparison.failed),
        }
    )
    run.set_tags({"best_model": best.display_name, "promotion": str(promotion.decisions[registry.CHAMPION]["moved"])})
    run.log_figure(figures.comparison_figure(comparison), "comparison.png")
    run.log_figure(figures.per_class_figure(comparison), "f1_per_class.png")
    run.log_text(comparison.csv(), "comparison.csv")
    run.log_text(comparison.markdown(), "comparison.md")
    run.log_dict(promotion.decisions, "promotion.json")
    run.describe(f"{description}\n\n{comparison.markdown()}")
