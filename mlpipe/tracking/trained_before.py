"""Versions that were trained in the same way before: such a training is not done twice."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlflow
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.utils import chunk_list
from mlflow.utils.validation import MAX_METRICS_PER_BATCH

from mlpipe.config import ModelConfig
from mlpipe.models.libraries import installed_libraries, is_editable, package_of
from mlpipe.models.own_files import code_of
from mlpipe.tracking import registry
from mlpipe.tracking.runs import TrackedRun, git_sha, key_of

TAG = "training_key"
"""Of a registered version: identity of its training."""

FIXED_MODEL = re.compile(r"models:/(m-[0-9a-f]+|[^/@]+/\d+)")
"""Address of a logged model or of a version; aliases, stages and `latest` move."""


def wanted_training(model: ModelConfig, digest: str, num_folds: int) -> str:
    """Identity of what a training is to do: its data, model and settings. A cleared task may be given others.

    Args:
        digest: of the data set.
        num_folds: parts of its cross-validation; 0: none.
    """
    return key_of(json.dumps([digest, asdict(model), num_folds], sort_keys=True))


def training_key(model: ModelConfig, digest: str, num_folds: int) -> str | None:
    """Identity of a training: its data, settings, seed, code and libraries.

    Args:
        digest: of the data set.
        num_folds: parts of its cross-validation; 0: none.

    Returns:
        `None` where something is not known to stay the same: this project's code of no known commit or version, or with
        changed files; an alias of the registry; an address whose content may change; or a package that is installed
        from a folder of sources.
    """
    settings = asdict(model)
    del settings["name"]  # of this run's row alone
    addresses = (model.weights, settings["train"].get("teacher") or "none")
    code = git_sha()
    if code == "unknown":
        try:
            code = version("mlpipe")
        except PackageNotFoundError:  # an image that was built without its commit
            return None
    if code.endswith("-dirty") or not all(map(_is_fixed, addresses)):
        return None
    package = package_of(model.architecture)
    if package and is_editable(package):
        return None
    settings["architecture"] = code_of(model.architecture)
    libraries = installed_libraries(package)
    return key_of(json.dumps([digest, settings, num_folds, code, libraries], sort_keys=True))


def _is_fixed(address: str) -> bool:
    """Whether what an address leads to never changes."""
    return address in ("none", "random", "imagenet") or bool(FIXED_MODEL.fullmatch(address))


def find_trained(name: str, key: str) -> registry.RegisteredVersion | None:
    """The newest version of a registered model with that key whose training run is still there."""
    found = mlflow.MlflowClient().search_model_versions(f"name = '{name}' and tags.{TAG} = '{key}'")
    for each in sorted(found, key=lambda each: -int(each.version)):
        known = registry.by_version(name, str(each.version))
        if _has_ended_well(known.run_id):
            return known
    return None


def _has_ended_well(run_id: str) -> bool:
    try:
        run = mlflow.MlflowClient().get_run(run_id)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return False
    return run.info.lifecycle_stage == "active" and run.info.status == "FINISHED"


def copy_history(source: TrackedRun, target: TrackedRun) -> Mapping[str, float]:
    """Copy a training's parameters and metrics, their course included; their last values.

    What `evaluate` measures, and the use of the machine, stay behind.
    """
    client = mlflow.MlflowClient()
    data: Any = client.get_run(source.run_id).data
    wanted = {name: value for name, value in data.metrics.items() if not name.startswith(("system/", "test/"))}
    target.log_params(data.params)
    present = client.get_run(target.run_id).data.metrics
    for name in wanted:
        if name not in present:
            history = client.get_metric_history(source.run_id, name)
            entries = [Metric(name, each.value, each.timestamp, each.step) for each in history]
            for part in chunk_list(entries, MAX_METRICS_PER_BATCH):
                client.log_batch(target.run_id, metrics=part)
    return wanted
