from __future__ import annotations

import pickle
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn

from mlpipe.data.batches import BatchLoader
from mlpipe.data.dataset import ImageRows, Split


def split_of(count: int, path: Path | None = None) -> Split:
    """Image i is filled with i, and its label is i."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 4, 4, 3))
    if path is not None:
        np.save(path, images)
        images = np.load(path, mmap_mode="c")
    return Split(ImageRows(images), np.arange(count))


def order(loader: BatchLoader) -> list[int]:
    return torch.cat([labels for _, labels in loader]).tolist()


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.filterwarnings("error")
def test_batches_hold_matching_images_and_labels(tmp_path: Path, mapped: bool) -> None:
    loader = BatchLoader(split_of(50, tmp_path / "a.npy" if mapped else None), 16, seed=0, shuffle=True)
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
    for images, labels in batches:
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert images.shape[1:] == (4, 4, 3)
        assert (images == labels.view(-1, 1, 1, 1)).all()
    assert sorted(order(loader)) == list(range(50))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def epoch(seed: int, number: int, batch_size: int = 8) -> list[int]:
        loader = BatchLoader(split_of(50), batch_size, seed=seed, shuffle=True)
        loader.set_epoch(number)
        torch.manual_seed(number + seed)
        return order(loader)

    assert epoch(0, 3) == epoch(0, 3) == epoch(0, 3, 16)
    assert len({tuple(epoch(seed, number)) for seed in range(3) for number in range(3)}) == 9


@pytest.mark.parametrize("num_shards", [1, 2])
def test_batches_gathered_on_a_device_are_the_same(monkeypatch: pytest.MonkeyPatch, num_shards: int) -> None:
    """With the CPU as the device."""
    monkeypatch.setattr("mlpipe.data.batches.BYTES_PER_COPY", 7 * 4 * 4 * 3)
    plain, kept, large = (BatchLoader(split_of(50), 16, seed=0, shuffle=True) for _ in range(3))
    kept.keep_on(torch.device("cpu"), max_bytes=50 * 4 * 4 * 3)
    large.keep_on(torch.device("cpu"), max_bytes=50 * 4 * 4 * 3 - 1)
    assert kept._kept is not None
    assert large._kept is None
    for rank in range(num_shards):
        shares = [list(loader.shard(rank, num_shards)) for loader in (plain, kept, large)]
        for batch, *others in zip(*shares, strict=True):
            for other in others:
                assert all(torch.equal(ours, theirs) for ours, theirs in zip(batch, other, strict=True))


def test_without_shuffling_the_order_is_the_splits() -> None:
    loader = BatchLoader(split_of(20), 8, seed=0, shuffle=False)
    loader.set_epoch(5)
    assert order(loader) == list(range(20))


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(9, 4, [4, 5]), (8, 4, [4, 4]), (10, 4, [4, 4, 2]), (3, 8, [3]), (1, 8, [1]), (3, 1, [1, 1, 1]), (5, 4, [5])],
)
def test_no_image_is_left_alone(count: int, batch_size: int, sizes: list[int]) -> None:
    loader = BatchLoader(split_of(count), batch_size, seed=0, shuffle=True)
    assert [len(labels) for _, labels in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize(("count", "batch_size", "num_shards"), [(50, 16, 2), (53, 16, 3), (21, 8, 4), (9, 64, 2)])
def test_shares_divide_each_batch_evenly(count: int, batch_size: int, num_shards: int) -> None:
    whole = BatchLoader(split_of(count), batch_size, seed=0, shuffle=True)
    shares = [whole.shard(rank, num_shards) for rank in range(num_shards)]
    for loader in (whole, *shares):
        loader.set_epoch(2)
    assert len({len(loader) for loader in shares}) == 1
    start = 0
    for number, parts in enumerate(zip(*shares, strict=True)):
        labels = [set(part[1].tolist()) for part in parts]
        sizes = [len(part[1]) for part in parts]
        assert min(sizes) >= 2
        assert max(sizes) - min(sizes) <= 1
        assert set.union(*labels) == set(whole.order()[start : start + sum(sizes)])
        weights = [loader.loss_weight(number) for loader in shares]
        assert weights == pytest.approx([size / np.mean(sizes) for size in sizes])
        start += sum(sizes)
    assert start == count


def test_a_mapped_split_travels_to_another_process_by_its_path(tmp_path: Path) -> None:
    rows = ImageRows(split_of(200, tmp_path / "a.npy").images_u8._stored_u8, np.arange(50, 60))
    sent = pickle.dumps(rows)
    assert len(sent) < 1000
    assert np.array_equal(np.asarray(pickle.loads(sent)), np.asarray(rows))  # noqa: S301
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"holds \(3, 4, 4, 3\)"):
        pickle.loads(sent)  # noqa: S301


def test_batch_size_is_checked() -> None:
    with pytest.raises(ValueError, match="batch_size: 0"):
        BatchLoader(split_of(3), 0, seed=0, shuffle=True)


class Recorder(lightning.LightningModule):
    """Notes which images it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: dict[int, list[int]] = {}
        self.validated: list[int] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        self.seen.setdefault(self.current_epoch, []).extend(batch[1].tolist())
        return self.layer(batch[0].float().mean((1, 2, 3))[:, None]).mean()

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.validated.extend(batch[1].tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


def fit(module: Recorder, epochs: int, folder: Path, checkpoint: Path | None = None) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
    )  # fmt: skip
    training = BatchLoader(split_of(20), 8, seed=3, shuffle=True)
    trainer.callbacks.append(  # type: ignore[attr-defined]
        LambdaCallback(on_train_epoch_start=lambda trainer, _: training.set_epoch(trainer.current_epoch))
    )
    trainer.fit(module, training, BatchLoader(split_of(6), 4, seed=3, shuffle=False), ckpt_path=checkpoint)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_under_lightnings_trainer(tmp_path: Path) -> None:
    module = Recorder()
    trainer = fit(module, 3, tmp_path)
    expected = BatchLoader(split_of(20), 8, seed=3, shuffle=True)
    for epoch in range(3):
        expected.set_epoch(epoch)
        assert module.seen[epoch] == order(expected)
    assert module.validated == [0, 1, 2, 3, 4, 5] * 3
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = Recorder()
    fit(resumed, 5, tmp_path, tmp_path / "a.ckpt")
    assert list(resumed.seen) == [3, 4]
    expected.set_epoch(3)
    assert resumed.seen[3] == order(expected)
