"""The saved view "Leaderboard" of an experiment: its models, the most accurate first.

MLflow keeps a view that somebody shares as a tag of the experiment; a fresh browser opens it by its key.
"""

from __future__ import annotations

import base64
import json
import zlib
from datetime import UTC, datetime

import mlflow

from mlpipe.tracking.runs import TRAINING_VIEW, ui_url

KEY = "mlpipe-leaderboard"
"""In the tag and in addresses."""
TAG = f"mlflow.sharedViewState.{KEY}"

COLUMNS = (
    "attributes.`Created`",
    "tags.`test accuracy`",
    "metrics.`test/accuracy`",
    "metrics.`train_seconds`",
    "metrics.`best/epoch`",
    "params.`initial_weights`",
    "params.`recipe`",
    "params.`num_epochs`",
    "params.`seed`",
    "tags.`data_digest`",
)

VIEW = {
    "searchFilter": "tags.stage = 'train' and metrics.`test/accuracy` >= 0",
    "orderByKey": "metrics.`test/accuracy`",
    "orderByAsc": False,
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "datasetsFilter": [],
    "modelVersionFilter": "All Runs",
    "selectedColumns": list(COLUMNS),
    "runsExpanded": {},
    "runsPinned": [],
    "runsHidden": [],
    "viewMaximized": False,
    "runListHidden": False,
    "groupBy": None,
}


def ensure_leaderboard(experiment_id: str) -> str:
    """Save the view where the experiment lacks it; its address in the MLflow UI."""
    client = mlflow.MlflowClient()
    if TAG not in client.get_experiment(experiment_id).tags:
        packed = base64.b64encode(zlib.compress(json.dumps(VIEW).encode())).decode()
        moment = round(1000 * datetime.now(UTC).timestamp())
        view = {"name": "Leaderboard", "createdAt": moment, "updatedAt": moment, "state": f"deflate;{packed}"}
        client.set_experiment_tag(experiment_id, TAG, json.dumps(view))
    return f"{ui_url()}/#/experiments/{experiment_id}/runs?{TRAINING_VIEW}&viewStateShareKey={KEY}"
