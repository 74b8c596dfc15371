"""The object store's disk fills up: a real SeaweedFS on a disk of its own, of 100 MB."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from mlpipe.config import DataConfig
from mlpipe.data.dataset import open_dataset
from mlpipe.data.manifest import load_manifest
from mlpipe.data.prepare import prepare_dataset
from mlpipe.data.sources.fetch import fetch_source
from mlpipe.data.storage.store import ObjectStore
from mlpipe.errors import ServiceUnavailableError
from mlpipe.services import services_named
from mlpipe.stack.temporary import running_object_store
from mlpipe.training.checkpoints import CheckpointStore
from tests.faults.lab import Table

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

IN_A_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
MOUNT_AND_RUN = 'mount -t tmpfs -o size=100m tmpfs "$0" && exec "$@"'
MEGABYTE = 2**20

T = TypeVar("T")


@dataclass(frozen=True)
class SmallDisk:
    """A bucket whose server has little room."""

    store: ObjectStore
    enlarge: Callable[[], None]


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    if not (shutil.which("unshare") and shutil.which("nsenter")):
        pytest.fail("needs `unshare` and `nsenter` for a disk of its own; install util-linux")
    tried = subprocess.run([*IN_A_NAMESPACE, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.fail(f"needs user and mount namespaces for a disk of its own; allow them here: {tried.stderr.strip()}")
    folder = tmp_path / "disk"
    folder.mkdir()
    # An answer that the disk is full is tried again as any other failure: this is about the disk, not about patience.
    monkeypatch.setattr("mlpipe.data.storage.store._CLIENT_RETRIES", {"mode": "standard", "max_attempts": 4})

    def enlarge() -> None:
        running = psutil.process_iter(["cmdline"])  # `None` for one that has just ended
        (pid,) = [process.pid for process in running if f"-dir={folder}" in (process.info["cmdline"] or ())]
        inside = ["nsenter", "--user", "--mount", "--preserve-credentials", "--target", str(pid)]
        subprocess.run([*inside, "mount", "-o", "remount,size=1000m", str(folder)], check=True)

    launcher = [*IN_A_NAMESPACE, "sh", "-c", MOUNT_AND_RUN, str(folder)]
    with running_object_store(folder, launcher=launcher) as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        store = ObjectStore("small")
        store.create_bucket()
        yield SmallDisk(store, enlarge)


def fill(store: ObjectStore) -> None:
    """Write until nothing more fits."""
    for number in range(100):
        try:
            with services_named():
                store.put_bytes(f"ballast/{number}", os.urandom(4 * MEGABYTE))
        except ServiceUnavailableError:
            return
    pytest.fail("the disk has no end")


def tried_again(work: Callable[[], T]) -> T:
    """As Airflow does it: the server needs some seconds to notice that there is room."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return work()
        except ServiceUnavailableError:
            assert time.monotonic() < deadline
            time.sleep(1)


def test_while_a_data_set_is_published(disk: SmallDisk, tmp_path: Path, table: Table) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(200):
            buffer = BytesIO()
            Image.new("RGB", (8, 8), (number, number // 2, 7)).save(buffer, "PNG")
            archive.writestr(f"{'ab'[number % 2]}/{number}.png", buffer.getvalue())
    data = DataConfig(dataset="images", uri=str(tmp_path / "a.zip"), image_size=512)  # 157 MB of arrays
    source = fetch_source(data, disk.store)

    def publish() -> str:
        with services_named():
            return prepare_dataset(data, source, disk.store).digest

    with pytest.raises(ServiceUnavailableError, match="is its disk full.* make room, then clear this task") as refused:
        publish()
    assert len(str(refused.value).splitlines()) == 1
    assert not [key for key in disk.store.list("datasets") if key.endswith("manifest.json")]

    disk.enlarge()

    digest = tried_again(publish)
    manifest = load_manifest(digest, disk.store)
    assert manifest.num_train + manifest.num_val + manifest.num_test == 200
    assert len(open_dataset(digest, disk.store, tmp_path / "cache").test_split().images_u8[:]) == manifest.num_test
    table.add(
        "Object store's disk full",
        "preprocessing",
        "`prepare_dataset`, called as the stage calls it, asked for disk space in one line and published nothing; with "
        "space it published the data set.",
    )


def test_while_a_checkpoint_is_saved(disk: SmallDisk, table: Table) -> None:
    checkpoints = CheckpointStore(disk.store, "run")
    weights = {epoch: torch.from_numpy(np.random.default_rng(epoch).random(2 * MEGABYTE)) for epoch in (1, 2)}
    checkpoints.save({"weights": weights[1]})
    fill(disk.store)

    def save() -> None:
        with services_named():
            checkpoints.save({"weights": weights[2]})

    with pytest.raises(ServiceUnavailableError, match="is its disk full"):
        save()
    kept = checkpoints.load()
    assert kept is not None
    assert torch.equal(kept["weights"], weights[1])

    disk.enlarge()

    tried_again(save)
    now = checkpoints.load()
    assert now is not None
    assert torch.equal(now["weights"], weights[2])
    table.add(
        "Object store's disk full",
        "training, saving a checkpoint",
        "`CheckpointStore.save`, called as the stage calls it, asked for disk space in one line; the previous "
        "checkpoint stayed intact, and the next one was saved once there was space.",
    )
