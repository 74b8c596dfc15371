"""Bring the source's bytes into object storage."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec

from mlpipe.addresses import redact_uri
from mlpipe.config import RunConfig
from mlpipe.data.sources.fetch import SourceRef, fetch_source
from mlpipe.data.storage.store import ObjectStore
from mlpipe.data.storage.uris import check_local
from mlpipe.environment import Environment
from mlpipe.models import architectures
from mlpipe.models.weights_address import suffix_of_weights
from mlpipe.services import services_named
from mlpipe.tracking.dag_runs import OnRun, parent_run
from mlpipe.tracking.runs import TaskContext, TrackedRun


@services_named()
def download(config: RunConfig, origin: TaskContext, *, on_run: OnRun) -> SourceRef:
    """Bring the source's bytes into object storage and open the MLflow run of this DAG run.

    Raises:
        UserError: an unknown model, an address that is none of weights, or a source that cannot be had.
    """
    _check_architectures(config)
    for model in config.models:
        if model.weights not in ("none", "random", "imagenet") and not model.weights.startswith("models:/"):
            suffix_of_weights(model.weights)
    source = fetch_source(config.data, ObjectStore.from_environment(Environment.from_env()))
    parent = TrackedRun(parent_run(config, origin))
    on_run(parent.url)
    parent.log_params({**config.form, "recipe": config.recipe, "models": ",".join(m.name for m in config.models)})
    data = asdict(config.data) | {"uri": redact_uri(config.data.uri or "")}
    parent.log_params({f"data/{name}": value for name, value in data.items()})
    return source


def _check_architectures(config: RunConfig) -> None:
    others = [
        model
        for model in config.models
        if not architectures.find(model.architecture).surely_takes(config.data.image_size, model.variant)
    ]
    for model in others:
        if own_file := architectures.find(model.architecture).own_file:
            check_local(own_file, field="models")
    # A worker that only downloads may have no torch; then training finds what is too small.
    if others and find_spec("torchvision"):
        from mlpipe.models.registry import check_architecture

        for model in others:
            check_architecture(model.architecture, config.data.image_size, model.variant, model.input_size)
