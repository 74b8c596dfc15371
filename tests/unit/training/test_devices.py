"""Several processes that train one network together, by gloo on the CPU."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from mlpipe.data.dataset import Dataset
from mlpipe.errors import StoppedError, UserError
from mlpipe.training.checkpoints import CheckpointStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.05, "schedule": "one_cycle", "label_smoothing": 0.1}
SETTINGS |= {"batch_size": 31, "num_epochs": 4, "precision": "32-true"}

NETWORKS = """
    import os, signal
    from pathlib import Path

    import torch
    from torch import distributed, nn

    HERE = Path(__file__).parent


    class Watching(nn.Module):
        '''Notes the images that it is shown, by the number in their first pixel; does what files ask for.'''

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16 * 16 * 3, 3)

        def forward(self, images):
            numbers = (images[:, 0, 0, 0] * 0.3 + 0.4).mul(255).round().int().tolist()
            rank = distributed.get_rank() if distributed.is_initialized() else 0
            with (HERE / f"seen-{rank}").open("a") as file:
                file.write("".join(f"{self.training:d} {number}\\n" for number in numbers))
            shown = sum(1 for _ in (HERE / f"seen-{rank}").open())
            kill = HERE / f"kill-{rank}"
            if kill.exists() and shown > int(kill.read_text()):
                os.kill(os.getpid(), signal.SIGKILL)
            return self.linear(images.flatten(1))
"""


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that the other processes can import too."""
    folder = tmp_path / "networks"
    folder.mkdir()
    (folder / "watching_networks.py").write_text(textwrap.dedent(NETWORKS))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "watching_networks", raising=False)
    import watching_networks  # type: ignore[import-not-found]

    return watching_networks


@pytest.fixture
def mapped(new_dataset: Any, tmp_path: Path) -> Any:
    """97 and 31 images, so that shares of batches differ, in a file as published ones are.

    The first value of an image is its number.
    """
    dataset = new_dataset(num_train=97, num_val=31)
    images_u8 = np.concatenate([dataset.train_split().images_u8[:], dataset.val_split().images_u8[:]])
    images_u8[:, 0, 0, 0] = np.arange(len(images_u8))
    np.save(tmp_path / "images.npy", images_u8)
    stored = np.load(tmp_path / "images.npy", mmap_mode="r")
    labels = np.concatenate([dataset.train_split().labels, dataset.val_split().labels])
    arrays = {
        "train_images.npy": stored,
        "train_labels.npy": labels,
        "train_indices.npy": np.arange(97),
        "val_indices.npy": np.arange(97, 128),
    }
    manifest = replace(dataset.manifest, channel_mean=(0.4, 0.4, 0.4), channel_std=(0.3, 0.3, 0.3))
    return Dataset(manifest, arrays.__getitem__)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(8 * 4 * 4, 3)
    )


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_two_processes_train_as_one(mapped, config, train, tracking, store) -> None:
    """Also where shares of a batch differ, where a try ends after two epochs, and with early stopping."""
    alone = train(config(**SETTINGS), mapped, tracking, network=small_network())
    expected = tracking.metrics
    tracking.steps, tracking.metrics = [], []

    before, checkpoints = children(), CheckpointStore(store, "run")
    model = config(**SETTINGS, num_devices=2)
    tracking.fail_at = 2
    with pytest.raises(ConnectionError, match="MLflow is away"):
        train(model, mapped, tracking, network=small_network(), checkpoints=checkpoints)
    tracking.fail_at = None
    torch.manual_seed(12345)
    together = train(model, mapped, tracking, network=small_network(), checkpoints=checkpoints)

    assert tracking.steps == [1, 2, 3, 4]
    for one, two in zip(expected, tracking.metrics, strict=True):
        del one["images_per_second"], two["images_per_second"]
        assert two == pytest.approx(one, rel=1e-5)
    for one, two in zip(alone.predictor.parameters(), together.predictor.parameters(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    assert together.best_epoch == alone.best_epoch
    assert children() == before
    assert not torch.distributed.is_initialized()

    stopping = config(**SETTINGS | {"learning_rate": 1e-9, "num_epochs": 9}, num_devices=2, early_stopping_patience=1)
    assert train(stopping, mapped, tracking, network=small_network()).epochs_run == 2
    assert children() == before


def test_each_image_is_shown_once_per_epoch_over_both(mapped, config, train, tracking, networks) -> None:
    train(config(**SETTINGS | {"num_epochs": 2}, num_devices=2), mapped, tracking, network=networks.Watching())
    shares = [_epochs(networks.HERE / f"seen-{rank}") for rank in (0, 1)]
    for rank in (0, 1):
        modes = [mode for mode, _ in shares[rank]]
        assert modes == ["1", "0", "1", "0"]
    for (mode, first), (_, second) in zip(*shares, strict=True):
        assert sorted(first + second) == list(range(97) if mode == "1" else range(97, 128))
        assert 0 <= len(first) - len(second) <= 4
    (_, first), _, (_, second), _ = shares[0]
    assert first != second


def _epochs(path: Path) -> list[tuple[str, list[int]]]:
    """Runs of training and of validation, each with the numbers of its images."""
    lines = [line.split() for line in path.read_text().splitlines() if line]
    rows = [(mode, int(number)) for mode, number in lines]
    return [(mode, [number for _, number in run]) for mode, run in itertools.groupby(rows, key=lambda row: row[0])]


def test_a_killed_process_ends_the_training_and_the_next_try_goes_on(
    mapped, config, train, tracking, store, networks
) -> None:
    """The exchange's own timeout is half an hour."""
    model, before = config(**SETTINGS, num_devices=2), children()

    def network() -> nn.Module:
        torch.manual_seed(0)
        return networks.Watching()

    alone = train(config(**SETTINGS), mapped, tracking, network=network())
    tracking.steps, tracking.metrics = [], []
    (networks.HERE / "kill-1").write_text("150")  # in the third epoch
    checkpoints = CheckpointStore(store, "run")
    with pytest.raises(RuntimeError, match="the process of device 1 of 2 was killed by SIGKILL"):
        train(model, mapped, tracking, network=network(), checkpoints=checkpoints)
    assert tracking.steps == [1, 2]
    assert children() == before
    assert not torch.distributed.is_initialized()

    (networks.HERE / "kill-1").unlink()
    resumed = train(model, mapped, tracking, network=network(), checkpoints=checkpoints)
    assert tracking.steps == [1, 2, 3, 4]
    for one, two in zip(alone.predictor.parameters(), resumed.predictor.parameters(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


def test_a_process_that_cannot_start_says_why(mapped, config, train, tracking, networks, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")  # where it does not find the network
    before = children()
    with pytest.raises(RuntimeError, match="ended with exit code 1: ModuleNotFoundError: .*watching_networks"):
        train(config(**SETTINGS, num_devices=2), mapped, tracking, network=networks.Watching())
    assert children() == before


def test_a_task_that_is_told_to_end_ends_the_others(mapped, config, train, tracking, monkeypatch) -> None:
    """SIGTERM at any moment of an epoch, handled as the DAG does."""

    def stop(signal_number: int, _: Any) -> None:
        raise StoppedError(signal.strsignal(signal_number))

    log = tracking.log_metrics

    def log_and_be_stopped(metrics: Any, step: int) -> None:
        log(metrics, step)
        if step == 2:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    monkeypatch.setattr(tracking, "log_metrics", log_and_be_stopped)
    before, handler = children(), signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(StoppedError):
            train(config(**SETTINGS | {"num_epochs": 1000}, num_devices=2), mapped, tracking, network=small_network())
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert children() == before


def test_the_others_end_with_the_process_that_started_them(networks, tmp_path) -> None:
    (networks.HERE / "kill-0").write_text("20")
    script = f"""
        import importlib.util, sys
        import numpy as np
        from mlpipe.data.dataset import Dataset
        spec = importlib.util.spec_from_file_location("stand_ins", {str(Path(__file__).with_name("conftest.py"))!r})
        stand_ins = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(stand_ins)
        from watching_networks import Watching
        dataset = stand_ins.tiny_dataset()
        model = stand_ins.make_config(num_devices=3, precision="32-true")
        stand_ins.run_training(model, dataset, stand_ins.RecordingLogger(), network=Watching())
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path)
    started: set[psutil.Process] = set()
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            started |= set(psutil.Process(process.pid).children(recursive=True))
        time.sleep(0.05)
    assert process.returncode == -signal.SIGKILL
    assert len({each.pid for each in started}) >= 2
    _, alive = psutil.wait_procs(list(started), timeout=60)
    for each in alive:
        each.kill()
    assert not alive


def test_more_devices_than_are_visible_are_refused(mapped, config, train, tracking, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    with pytest.raises(UserError, match=r"^devices: 2 .* sees 1 \(CUDA_VISIBLE_DEVICES=GPU-1\); give 1 to 1"):
        train(config(num_devices=2), mapped, tracking, network=small_network())


def test_fewer_than_two_images_for_a_device_are_refused(mapped, config, train, tracking) -> None:
    with pytest.raises(UserError, match=r"^devices: 5 .* batches of 8, .* give 1 to 4"):
        train(config(num_devices=5, batch_size=8), mapped, tracking, network=small_network())
