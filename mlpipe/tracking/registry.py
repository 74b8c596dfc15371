"""The model registry: versions and aliases of `<dataset>-classifier`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlflow
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.store.artifact.utils.models import get_model_name_and_version

if TYPE_CHECKING:
    from mlpipe.tracking.runs import TrackedRun

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RegisteredVersion:
    """One version of a registered model."""

    name: str
    version: str
    run_id: str
    model_id: str | None
    """Of the logged model; `None`: it was registered from elsewhere."""
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        """What `mlflow.pyfunc.load_model` takes."""
        return f"models:/{self.name}/{self.version}"


def registered_name(dataset: str) -> str:
    """Name of the registered model of a data set."""
    return f"{dataset}-classifier"


def register(name: str, *, model_uri: str, run_id: str, tags: Mapping[str, str], description: str) -> RegisteredVersion:
    """Make the model a version of `name`; a retry finds the version that the attempt before it made."""
    client = mlflow.MlflowClient()
    try:
        client.create_registered_model(
            name,
            description="Image classifiers of this workflow: raw uint8 images in, a label, its confidence and a "
            "probability per class out. `@champion` is the best one so far.",
        )
        _warn_if_it_was_there(name, run_id)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    if found := find(name, run_id):
        return found
    client.create_model_version(
        name,
        source=model_uri,
        run_id=run_id,
        tags=dict(tags),
        description=description,
        model_id=model_uri.rsplit("/", 1)[-1],
    )
    # As in `runs.open_run`.
    first, *copies = _versions(name, run_id)
    for copy in copies:
        client.delete_model_version(name, copy.version)
    return first


def _warn_if_it_was_there(name: str, run_id: str) -> None:
    """A new registered model has no champion; where earlier runs had made versions of it, somebody took it away."""
    client = mlflow.MlflowClient()
    experiment = client.get_run(run_id).info.experiment_id
    if client.search_runs([experiment], f"tags.model_version LIKE '{name}/%'", max_results=1):
        logger.warning(
            "the registered model %s is gone, though earlier runs made versions of it: was it renamed or deleted in "
            "MLflow? A new one is made, which has no champion. To keep the old champion, rename that model back",
            name,
        )


def find(name: str, run_id: str) -> RegisteredVersion | None:
    """The version that an earlier attempt made of the run's model, or `None`."""
    return next(iter(_versions(name, run_id)), None)


def _versions(name: str, run_id: str) -> list[RegisteredVersion]:
    """Versions of a run's model, the oldest first."""
    found = mlflow.MlflowClient().search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    return sorted(map(_version, found), key=lambda version: int(version.version))


def discard_logged_models(run: Run) -> None:
    """Delete the models of an attempt that ended between logging and registering; nobody would ever find them."""
    client = mlflow.MlflowClient()
    of_the_run = f"source_run_id = '{run.info.run_id}'"
    for model in client.search_logged_models([run.info.experiment_id], filter_string=of_the_run):
        client.delete_logged_model(model.model_id)


def by_alias(name: str, alias: str) -> RegisteredVersion | None:
    """The version that bears the alias, or `None`."""
    try:
        version = mlflow.MlflowClient().get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in (ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return _version(version)


def _version(version: ModelVersion) -> RegisteredVersion:
    return RegisteredVersion(
        name=version.name,
        version=str(version.version),
        run_id=version.run_id or "",
        model_id=version.model_id or _logged_model(version.source),
        tags=version.tags,
    )


def _logged_model(source: str | None) -> str | None:
    """Id of the logged model that a version was made of; MLflow's search leaves it out."""
    prefix = "models:/m-"
    return source.removeprefix("models:/") if source and source.startswith(prefix) else None


def by_version(name: str, version: str) -> RegisteredVersion:
    """The version of that number."""
    return _version(mlflow.MlflowClient().get_model_version(name, version))


def model_at(uri: str) -> tuple[str | None, Mapping[str, str]]:
    """Id of the logged model behind an address, if it has one, and the tags of what the address names.

    Args:
        uri: `models:/<name>/<version>`, `models:/<name>/latest`, `models:/<name>@<alias>` or `models:/m-<id>`.

    Raises:
        MlflowException: there is no such model.
    """
    client, address = mlflow.MlflowClient(), uri.removeprefix("models:/")
    if address.startswith("m-"):
        return address, dict(client.get_logged_model(address).tags)
    found = by_version(*get_model_name_and_version(client, uri))
    return found.model_id, found.tags


def describe(name: str, version: str, text: str, tags: Mapping[str, str]) -> None:
    """Set what the version's page says, and add tags."""
    client = mlflow.MlflowClient()
    client.update_model_version(name, version, text)
    for tag, value in tags.items():
        client.set_model_version_tag(name, version, tag, value)


@dataclass(frozen=True)
class RegistryAliases:
    """Aliases of one registered model; see `mlpipe.evaluation.promotion.Aliases`."""

    name: str
    run: TrackedRun
    """The DAG run's parent, which remembers what its models replaced."""

    def holder(self, alias: str) -> str | None:
        """The version that bears the alias, or `None`."""
        version = by_alias(self.name, alias)
        return version.version if version else None

    def predecessor(self, alias: str, version: str) -> str | None:
        """What bore the alias before this DAG run gave it to the version; if it did not, that version."""
        before, _, given_to = self.run.tags.get(f"replaced/{alias}", "").partition(" by ")
        if given_to != version:
            return version
        return before if before != "none" else None

    def move(self, alias: str, version: str) -> None:
        """Point the alias at the version. What bore it before is noted first: whoever repeats this decides alike."""
        if (before := self.holder(alias)) != version:
            self.run.set_tags({f"replaced/{alias}": f"{before or 'none'} by {version}"})
            mlflow.MlflowClient().set_registered_model_alias(self.name, alias, version)
