"""The model registry: versions and aliases of `<dataset>-classifier`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST, ErrorCode

CHAMPION = "champion"


@dataclass(frozen=True, kw_only=True)
class RegisteredVersion:
    """One version of a registered model."""

    name: str
    version: str
    run_id: str
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        """What `mlflow.pyfunc.load_model` takes."""
        return f"models:/{self.name}/{self.version}"


def registered_name(dataset: str) -> str:
    """Name of the registered model of a data set."""
    return f"{dataset}-classifier"


def register(name: str, *, model_uri: str, run_id: str, tags: Mapping[str, str], description: str) -> RegisteredVersion:
    """Make the model a version of `name`; a retry finds the version that the try before it made."""
    client = mlflow.MlflowClient()
    try:
        client.create_registered_model(
            name,
            description="Image classifiers of this workflow: raw uint8 images in, a label, its confidence and a "
            "probability per class out. `@champion` is the best one so far.",
        )
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    if found:
        version = found[0]
    else:
        version = client.create_model_version(
            name,
            source=model_uri,
            run_id=run_id,
            tags=dict(tags),
            description=description,
            model_id=model_uri.rsplit("/", 1)[-1],
        )
    return RegisteredVersion(name=name, version=str(version.version), run_id=run_id, tags=dict(tags))


def by_alias(name: str, alias: str) -> RegisteredVersion | None:
    """The version that bears the alias, or `None`."""
    try:
        version = mlflow.MlflowClient().get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in (ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return RegisteredVersion(name=name, version=str(version.version), run_id=version.run_id or "", tags=version.tags)


def move_alias(name: str, alias: str, version: str) -> None:
    """Point the alias at the version."""
    mlflow.MlflowClient().set_registered_model_alias(name, alias, version)
