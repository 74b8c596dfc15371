"""Publish the images as arrays."""

from __future__ import annotations

import gc
import logging

from mlpipe.config import RunConfig
from mlpipe.data.dataset import open_dataset
from mlpipe.data.manifest import Manifest
from mlpipe.data.prepare import DamagedImagesError, prepare_dataset
from mlpipe.data.sources.fetch import SourceRef
from mlpipe.data.storage.store import ObjectStore
from mlpipe.data.versions import DatasetVersion, record_version
from mlpipe.environment import Environment
from mlpipe.services import services_named
from mlpipe.stages.messages import PublishedData
from mlpipe.tracking import runs
from mlpipe.tracking.dag_runs import OnRun, experiment, parent_run
from mlpipe.tracking.data_run import log_data, log_left_out
from mlpipe.tracking.runs import TaskContext, TrackedRun

logger = logging.getLogger(__name__)


@services_named()
def preprocess(config: RunConfig, origin: TaskContext, source: SourceRef, *, on_run: OnRun) -> PublishedData:
    """Publish the images as arrays, and log what they look like.

    Raises:
        UserError: the archive or its images cannot be used.
    """
    gc.freeze()  # else a full collection may walk through all that torch and MLflow made when they were imported
    environment = Environment.from_env()
    store = ObjectStore.from_environment(environment)
    try:
        manifest = prepare_dataset(config.data, source, store)
    except DamagedImagesError as error:
        log_left_out(TrackedRun(parent_run(config, origin)), error.images)
        raise
    dataset = open_dataset(manifest.digest, store, environment.cache_dir)
    version = record_version(dataset, store, environment.cache_dir)
    if version.change:
        logger.info("%s", version.change)
    # A task that was cleared may find other images: they have a run of their own.
    experiment_id, run_key = experiment(config), origin.key(f"data {manifest.digest}")
    runs.set_aside(experiment_id, origin, f"tags.stage = 'data' and tags.run_key != '{run_key}'")
    run = runs.open_run(
        experiment_id,
        run_key,
        name=f"data · {manifest.dataset}",
        tags={
            **origin.tags(),
            "stage": "data",
            "dataset": manifest.dataset,
            "data_digest": manifest.digest,
            "data_version": str(version.number),
        },
        description=_data_description(manifest, version, origin),
        parent_run_id=parent_run(config, origin).info.run_id,
    )
    with runs.active(run) as tracked:
        on_run(tracked.url)
        log_data(tracked, dataset, store.uri(f"datasets/{manifest.digest}"))
    return PublishedData(
        name=manifest.dataset,
        digest=manifest.digest,
        uri=store.uri(f"datasets/{manifest.digest}"),
        num_train=manifest.num_train,
        num_val=manifest.num_val,
        num_test=manifest.num_test,
        classes=manifest.classes,
        notes=manifest.notes,
    )


def _data_description(manifest: Manifest, version: DatasetVersion, origin: TaskContext) -> str:
    sentences = [*manifest.notes, *([version.change] if version.change else [])]
    notes = "\n".join(f"- {note}" for note in sentences)
    return (
        f"{origin.link}\n\n{manifest.dataset}, version {version.number}: {manifest.num_train:,} images to train on, "
        f"{manifest.num_val:,} to validate, {manifest.num_test:,} to test; {len(manifest.classes)} classes; "
        f"{manifest.image_size} × {manifest.image_size} pixels.\n\n{notes}"
    )
