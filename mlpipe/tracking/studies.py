"""What MLflow knows of searches."""

from __future__ import annotations

import json
from typing import Any

import mlflow

from mlpipe.errors import UserError


def best_settings(study: str) -> dict[str, Any]:
    """The best settings that a search found.

    Raises:
        UserError: no search of that name has ended.
    """
    client = mlflow.MlflowClient()
    ids = [each.experiment_id for each in client.search_experiments()]
    wanted = f"tags.study = '{study.replace(chr(39), '')}' and tags.stage = 'parent'"
    for run in client.search_runs(ids, wanted, order_by=["attributes.start_time DESC"]):
        if found := run.data.tags.get("best settings"):
            return dict(json.loads(found))
    raise UserError(f"tuned: no search called {study!r} has ended; `mlpipe tune --study {study}` makes one")
