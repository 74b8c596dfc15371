"""Measuring logged models as a user would load them, and what MLflow shows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import mlflow
import numpy as np
import pandas as pd
from botocore.exceptions import BotoCoreError, ClientError
from mlflow.pyfunc import PyFuncModel
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

from mlpipe.data.dataset import Split
from mlpipe.errors import UserError
from mlpipe.evaluation import figures
from mlpipe.evaluation.promotion import Promotion, other_classes
from mlpipe.evaluation.report import Report, render
from mlpipe.evaluation.result import ModelResult, Unmeasured
from mlpipe.evaluation.scoring import ClassScores, Evaluation, evaluate_predictions
from mlpipe.tracking import registry
from mlpipe.tracking.data_input import ImageDataset
from mlpipe.tracking.kept_predictions import KeptPredictions
from mlpipe.tracking.runs import TrackedRun, is_unreachable, tracked

BYTES_PER_CALL = 6 << 20
"""Pixels handed to `predict` at once, so that test images need not fit in memory: 2048 images of 32×32."""

BOOTSTRAP_SEED = 0
"""The same for all, so that equal predictions have equal intervals."""

CURVES = tuple(f"{part}/{metric}" for metric in ("accuracy", "loss") for part in ("train", "val"))
"""Metrics that have a value for each epoch."""

PROBABILITY = "probability_"
"""Prefix of a logged model's output columns."""


class OtherClassesError(UserError):
    """A model does not have the classes of the images."""


def measure(
    model_uri: str,
    test: Split,
    classes: Sequence[str],
    kept: KeptPredictions | None = None,
    model_id: str | None = None,
) -> tuple[Evaluation, PyFuncModel]:
    """Load a model by its address, as any user would, and score its predictions; the scores, and the model.

    Args:
        kept: predictions on these test images; a model that has some is loaded, but not asked again.
        model_id: of the logged model; `None`: its predictions are not kept.

    Raises:
        OtherClassesError: the model has other classes than the images; the message ends a sentence about the model.
        UserError: its probabilities are not finite.
    """
    model = mlflow.pyfunc.load_model(model_uri, suppress_warnings=True)  # does not compare all installed versions
    if kept and model_id and (found := kept.get(model_id, classes, len(test))) is not None:
        return evaluate_predictions(test.labels, found, classes, seed=BOOTSTRAP_SEED), model
    parts = test.images_u8.slices(BYTES_PER_CALL)
    frames = [model.predict(test.images_u8[part]) for part in parts]
    frame = pd.concat(frames, ignore_index=True)
    own = [column.removeprefix(PROBABILITY) for column in frame.columns if column.startswith(PROBABILITY)]
    if set(own) != set(classes):
        raise OtherClassesError(other_classes(own, classes))
    probabilities = frame[[f"{PROBABILITY}{name}" for name in classes]].to_numpy(np.float64)
    evaluation = evaluate_predictions(test.labels, probabilities, classes, seed=BOOTSTRAP_SEED)
    if kept and model_id:
        kept.put(model_id, classes, probabilities)
    return evaluation, model


def remeasure(
    name: str, version: str, test: Split, classes: Sequence[str], kept: KeptPredictions | None = None
) -> ModelResult | Unmeasured:
    """Measure a registered version, which may be a model that anybody wrote.

    Args:
        name: of the registered model.
        kept: predictions on these test images.
    """
    registered = registry.by_version(name, version)
    label = registered.tags.get("model", "a model of unknown name")
    try:
        evaluation, _ = measure(registered.uri, test, classes, kept, registered.model_id)
        return ModelResult(name=label, version=version, evaluation=evaluation)
    except OtherClassesError as error:
        problem = str(error)
    except Exception as error:
        if is_outage(error):
            raise
        problem = f"could not be measured on the same images: {str(error) or repr(error)}"
    return Unmeasured(name=label, version=version, problem=problem)


def is_outage(error: Exception) -> bool:
    """Whether MLflow's server, or the store that keeps predictions, is to blame, and not the model."""
    return isinstance(error, BotoCoreError | ClientError) or is_unreachable(error)


def log_evaluation(result: ModelResult, test: Split, data: ImageDataset, *, run_id: str, model_id: str | None) -> None:
    """Add test metrics and pictures to the run that trained the model; the logged model gets the metrics, too.

    Args:
        data: what the model was tested on.
    """
    run, evaluation, name = tracked(run_id), result.evaluation, result.name
    # Limits and classes go into tables: MLflow draws a chart of each metric.
    scores = {f"test/{metric}": value for metric, value in evaluation.scores.items()}
    run.log_metrics(scores, model_id=model_id, dataset=data)
    run.set_tags({"test accuracy": evaluation.accuracy_text})
    run.log_table(
        {
            "metric": list(evaluation.intervals),
            "value": [evaluation.scores[metric] for metric in evaluation.intervals],
            "low": [interval.low for interval in evaluation.intervals.values()],
            "high": [interval.high for interval in evaluation.intervals.values()],
        },
        "intervals.json",
    )
    columns = zip(*evaluation.per_class, strict=True)
    run.log_table(dict(zip(ClassScores._fields, map(list, columns), strict=True)), "per_class.json")
    run.log_figure(figures.confusion_matrix_figure(evaluation, name), "confusion_matrix.png")
    frame = pd.DataFrame(evaluation.confusion, index=evaluation.classes, columns=evaluation.classes)
    run.log_text(frame.to_csv(index_label="true \\ predicted"), "confusion_matrix.csv")
    run.log_figure(figures.reliability_figure(evaluation, name), "calibration.png")
    run.log_figure(figures.mistakes_figure(test.images_u8, evaluation, name), "worst_mistakes.png")
    if evaluation.notes:
        run.log_text("\n".join(evaluation.notes), "notes.txt")


def learning_curves(run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Epochs and values of a model's training by metric, as `train/loss`; an estimator's have one point."""
    run = tracked(run_id)
    return {name: run.history(name) for name in CURVES}


def log_comparison(run: TrackedRun, report: Report, promotion: Promotion) -> None:
    """Put table, charts, the gate's reasons and the report on the parent run."""
    comparison, best = report.comparison, report.best
    run.replace_metrics(  # a model that failed may have been trained since
        {
            "best/test/accuracy": best.evaluation.accuracy,
            "num_models": len(comparison.rows),
            "num_failed_models": len(comparison.failed),
        }
    )
    recipe = run.tags.get("recipe", "")
    run.set_tags(
        {
            MLFLOW_RUN_NAME: f"{100 * best.evaluation.accuracy:.1f} % {best.name} · {recipe} · {run.started:%H:%M}",
            "best_model": best.display_name,
            "promotion": str(promotion.moved_champion),
        }
    )
    run.log_figure(figures.comparison_figure(comparison, promotion.champion), "comparison.png")
    run.log_figure(figures.per_class_figure(comparison), "f1_per_class.png")
    validation = {model: curves["val/accuracy"] for model, curves in report.curves.items()}
    if any(validation.values()):
        run.log_figure(figures.learning_curves_figure(validation), "learning_curves.png")
    run.log_text(render(report), "report.html")
    run.log_text(comparison.csv(), "comparison.csv")
    table = comparison.markdown()
    run.log_text(table, "comparison.md")
    run.log_dict({alias: asdict(decision) for alias, decision in promotion.decisions.items()}, "promotion.json")
    told = "".join(f"- Data: {note}\n" for note in report.notes)
    ways = " · ".join(f"[{label}]({url})" for label, url in report.links.items())
    run.describe(f"{report.verdict}\n\n{table}{told}\n{ways}")
