"""What MLflow knows of searches."""

from __future__ import annotations

import json
from typing import Any

import mlflow

from mlpipe.errors import UserError

MODEL = "searched model"
SETTINGS = "best settings"
"""Tags of a search's parent run."""


def found_by(study: str) -> tuple[str, dict[str, Any]]:
    """The model of a search, as it is written in `models`, and its best settings.

    Raises:
        UserError: no search of that name has ended.
    """
    client = mlflow.MlflowClient()
    ids = [each.experiment_id for each in client.search_experiments()]
    wanted = f"tags.study = '{study.replace(chr(39), '')}' and tags.stage = 'parent'"
    for run in client.search_runs(ids, wanted, order_by=["attributes.start_time DESC"]):
        if {MODEL, SETTINGS} <= run.data.tags.keys():
            return run.data.tags[MODEL], dict(json.loads(run.data.tags[SETTINGS]))
    raise UserError(f"tuned: no search called {study!r} has ended; `mlpipe tune --study {study}` makes one")
