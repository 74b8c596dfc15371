"""Training networks: what is learned, repeated, resumed and reported."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn

from mlpipe.data.batches import BatchLoader
from mlpipe.data.dataset import Dataset, Split
from mlpipe.errors import SupersededError, UserError
from mlpipe.models.networks.custom_cnn import Shift
from mlpipe.models.portable import normalise
from mlpipe.models.registry import build_network
from mlpipe.training.checkpoints import CheckpointStore
from mlpipe.training.cpu import winograd
from mlpipe.training.epochs import EpochCallback
from mlpipe.training.fitting import synchronise
from mlpipe.training.precision import choose_precision

METRICS = {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "learning_rate", "images_per_second"}


def weights(trained: Any) -> dict[str, Tensor]:
    return trained.predictor.state_dict()


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(second).values(), strict=True))


class Spy(nn.Module):
    """A linear network that keeps the images it is shown while it is evaluated, and while it is trained."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size * size * 3, 3)
        self.seen: dict[bool, list[Tensor]] = {True: [], False: []}

    def forward(self, images: Tensor) -> Tensor:
        self.seen[self.training].append(images.float().clone())
        return self.linear(images.flatten(1))


class Normalized(nn.Module):
    """Normalizes its images, 16×16 pixels, and has one linear layer."""

    def __init__(self, norm: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = norm(3)
        self.linear = nn.Linear(16 * 16 * 3, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.norm(images).flatten(1))


def normalised(dataset: Dataset, split: Split) -> Tensor:
    """All images of a split as a network sees them."""
    mean, std = (
        torch.tensor(each).view(3, 1, 1) for each in (dataset.manifest.channel_mean, dataset.manifest.channel_std)
    )
    return normalise(torch.from_numpy(split.images_u8[:]), mean, std)


@pytest.mark.parametrize("architecture", ["custom_cnn", "resnet18"])
def test_a_batch_can_be_overfitted(architecture, config, train, tracking) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (24, 32, 32, 3)).astype(np.uint8)  # nothing to generalise from
    images = noise, rng.integers(0, 3, 24)
    dataset = Dataset.in_memory(("a", "b", "c"), images, images)
    model = config(architecture, num_epochs=30, batch_size=24, learning_rate=1e-3)
    assert train(model, dataset, tracking).metrics["val/accuracy"] == 1


@pytest.mark.parametrize(
    ("architecture", "optimizer"),
    [("resnet18", "sgd"), ("resnet18", "muon"), ("custom_cnn", "sgd"), ("custom_cnn", "muon")],
)
def test_the_same_seed_gives_the_same_weights_also_without_dead_taps(
    architecture, optimizer, new_dataset, config, train, tracking
) -> None:
    """At 32×32, where kernels of resnet18's last stage are trimmed; with two threads, as in a slot of two cores."""
    dataset = new_dataset(size=32)
    settings = {"optimizer": optimizer, "schedule": "one_cycle", "weight_decay": 5e-4}
    small_first = architecture == "custom_cnn"  # where images grow, nothing is trimmed
    model = config(architecture, augmentation="flip_crop", progressive_resizing=small_first, **settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = train(model, dataset, tracking), train(model, dataset, tracking)
    finally:
        torch.set_num_threads(threads)
    assert same(first, second)
    if architecture == "resnet18":
        assert weights(first)["layer4.1.conv2.weight"].shape == (512, 512, 3, 3)


def test_the_same_seed_gives_the_same_weights_by_winograd_on_growing_images(
    new_dataset, config, train, tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the recipe strong trains resnet18 on a processor without bfloat16."""
    counted = Mock(wraps=winograd.convolve)
    monkeypatch.setattr(winograd, "convolve", counted)
    settings = {"optimizer": "muon", "schedule": "one_cycle", "progressive_resizing": True, "precision": "32-true"}
    model = config("resnet18", augmentation="flip_crop", batch_size=48, **settings)
    model = replace(model, variant="small_images")
    first, second = (train(model, new_dataset(size=32), tracking) for _ in range(2))
    assert same(first, second)
    assert counted.call_count >= 2 * 2 * 3, "the third stage's, at each step of the last epoch at least"


@pytest.mark.parametrize("num_epochs", [1, 2, 3, 4, 5, 6])
def test_a_schedule_of_few_steps_works(num_epochs, dataset, config, train, tracking) -> None:
    model = config(num_epochs=num_epochs, batch_size=96, schedule="one_cycle")
    assert train(model, dataset, tracking).epochs_run == num_epochs


def test_images_grow_with_progressive_resizing_and_those_of_validation_are_whole(
    new_dataset, config, train, tracking
) -> None:
    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.seen: dict[bool, list[int]] = {True: [], False: []}

        def forward(self, images: Tensor) -> Tensor:
            self.seen[self.training].append(images.shape[-1])
            assert images.is_contiguous(memory_format=torch.channels_last)
            return self.linear(images.mean(dim=(2, 3)))

    def sizes(num_epochs: int, size: int) -> list[int]:
        network = Sizes()
        model = config("resnet18", num_epochs=num_epochs, batch_size=96, progressive_resizing=True)
        train(model, new_dataset(size=size), tracking, network=network)
        assert set(network.seen[False]) == {size}
        return network.seen[True]

    assert sizes(10, 32) == [16] * 5 + [32] * 5
    assert sizes(3, 64) == [32, 64, 64]
    assert sizes(2, 20) == [16, 20]
    assert sizes(1, 32) == [32]


def test_the_small_images_form_is_whitened_on_the_training_images_and_repeatable(
    new_dataset, config, train, tracking
) -> None:
    dataset = new_dataset(size=32)
    model = config(augmentation="flip_crop", schedule="one_cycle", optimizer="sgd", label_smoothing=0.1)
    model = replace(model, variant="small_images")
    first, second = (train(model, dataset, tracking) for _ in range(2))
    assert same(first, second)
    assert first.description.variant == "small_images"
    stem = weights(first)["stem.weight"]
    assert torch.equal(stem[:12], -stem[12:]), "whitening has made it, and training has left it"


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, Shift])
def test_precise_batch_norm_is_of_the_training_images_without_augmentation(
    norm, dataset, config, train, tracking
) -> None:
    model = config(augmentation="flip_crop_color", precision="32-true", precise_batch_norm=True)
    trained = train(model, dataset, tracking, network=Normalized(norm))
    shown = normalised(dataset, dataset.train_split())
    torch.testing.assert_close(trained.predictor.norm.running_mean, shown.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(trained.predictor.norm.running_var, shown.var(dim=(0, 2, 3)), rtol=1e-3, atol=0)


def test_images_grow_for_a_network_that_has_dead_taps_at_their_full_size(new_dataset, config, train, tracking) -> None:
    model = config("resnet18", progressive_resizing=True)
    assert train(model, new_dataset(num_train=16, num_val=8, size=32), tracking).epochs_run == 2


@pytest.mark.parametrize(("architecture", "size"), [("vit_b_32", 64), ("inception_v3", 96)])
def test_images_do_not_grow_for_a_network_that_takes_no_smaller_ones(
    architecture, size, new_dataset, config, train, tracking
) -> None:
    model = config(architecture, progressive_resizing=True)
    dataset = new_dataset(num_train=16, num_val=8, size=size)
    with pytest.raises(UserError, match=f"^progressive_resizing: true is not allowed for {architecture}.*{size // 2}×"):
        train(model, dataset, tracking, network=nn.Identity())


@pytest.mark.parametrize("variant", ["standard", "small_images"])
def test_a_channel_may_be_constant(variant, dataset, config, train, tracking) -> None:
    parts = [(split.images_u8[:], split.labels) for split in (dataset.train_split(), dataset.val_split())]
    for images_u8, _ in parts:
        images_u8[..., 2] = 7
    trained = train(replace(config(), variant=variant), Dataset.in_memory(dataset.manifest.classes, *parts), tracking)
    assert np.isfinite(trained.metrics["val/loss"])


def test_the_same_seed_gives_the_same_weights(dataset, config, train, tracking) -> None:
    model = config(augmentation="flip_crop", schedule="one_cycle")
    first, second = train(model, dataset, tracking), train(model, dataset, tracking)
    other = train(config(augmentation="flip_crop", schedule="one_cycle", seed=1), dataset, tracking)
    assert same(first, second)
    assert not same(first, other)


def test_validation_images_are_only_normalised(dataset, config, train, tracking) -> None:
    spy = Spy(size=16)
    train(config(augmentation="flip_crop", precision="32-true"), dataset, tracking, network=spy)
    expected = normalised(dataset, dataset.val_split())
    shown = torch.cat(spy.seen[False])
    assert torch.equal(shown, torch.cat([expected, expected]))  # two epochs
    originals = normalised(dataset, dataset.train_split())
    unchanged = [any(torch.equal(image, original) for original in originals) for image in torch.cat(spy.seen[True])]
    assert sum(unchanged) < len(unchanged) / 2


def test_every_training_image_is_shown_once_per_epoch(dataset, config, train, tracking) -> None:
    spy = Spy(size=16)
    train(config(num_epochs=3, precision="32-true"), dataset, tracking, network=spy)
    first, second, third = torch.cat(spy.seen[True]).flatten(1).split(96)
    for epoch in (first, second, third):
        assert torch.equal(epoch.sum(dim=1).sort().values, first.sum(dim=1).sort().values)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_each_epoch_is_logged_once_under_the_names_all_models_share(dataset, config, train, tracking) -> None:
    trained = train(config(num_epochs=3), dataset, tracking)
    assert tracking.steps == [1, 2, 3]
    assert all(set(row) == METRICS for row in tracking.metrics)
    best = max(tracking.metrics, key=lambda row: (row["val/accuracy"], -row["val/loss"]))
    assert trained.best_epoch == 1 + tracking.metrics.index(best)
    assert trained.metrics == {name: best[name] for name in ("val/accuracy", "val/loss")}
    assert trained.epochs_run == 3
    assert trained.train_seconds > 0
    assert trained.images_per_second > 0


def test_the_best_weights_are_returned_not_the_last(new_dataset, config, train, tracking) -> None:
    dataset = new_dataset()
    # A rate at which training wanders.
    trained = train(config(num_epochs=8, learning_rate=3e-2, precision="32-true"), dataset, tracking)
    validation = dataset.val_split()
    with torch.no_grad():
        answers = trained.predictor(normalised(dataset, validation)).argmax(dim=1)
        accuracy = (answers == torch.from_numpy(validation.labels)).float().mean().item()
    assert accuracy == pytest.approx(max(row["val/accuracy"] for row in tracking.metrics))


def test_a_network_that_insists_on_its_format_s_version_is_trained(new_dataset, config, train, tracking) -> None:
    model = config("mnasnet0_5", num_epochs=1)
    assert train(model, new_dataset(num_train=16, num_val=8, size=32), tracking).epochs_run == 1


def test_early_stopping_ends_after_patience_epochs_without_a_better_one(
    dataset, config, train, tracking, store
) -> None:
    model = config(num_epochs=50, learning_rate=3e-3, early_stopping_patience=3)
    checkpoints = CheckpointStore(store, "run")
    trained = train(model, dataset, tracking, checkpoints=checkpoints)
    assert trained.epochs_run < 50
    accuracies = [row["val/accuracy"] for row in tracking.metrics]
    assert trained.epochs_run - (1 + accuracies.index(max(accuracies))) == 3
    again = train(model, dataset, tracking, checkpoints=checkpoints)
    assert again.epochs_run == trained.epochs_run, "a retry must not train on"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "sgd", "learning_rate": 0.01, "schedule": "one_cycle", "augmentation": "flip_crop"},
        {"weight_decay": 0.01, "schedule": "one_cycle", "label_smoothing": 0.1},
        {
            "optimizer": "muon",
            "learning_rate": 0.01,
            "weight_decay": 0.1,
            "schedule": "one_cycle",
            "progressive_resizing": True,
        },
        {
            "optimizer": "normalized_muon",
            "learning_rate": 0.1,
            "weight_decay": 0.01,
            "schedule": "linear",
            "augmentation": "flip_crop",
        },
        {"augmentation": "trivial", "mixing": "mixup"},
        {"mixing": "cutmix"},
    ],
    ids=["adam", "sgd", "decayed", "muon", "normalized_muon", "mixup", "cutmix"],
)
def test_an_interrupted_training_ends_like_an_unbroken_one(
    settings, dataset, config, train, tracking, store, monkeypatch
) -> None:
    model = config(num_epochs=4, **settings)
    unbroken = train(model, dataset, tracking)
    expected = tracking.metrics
    tracking.steps, tracking.metrics = [], []

    checkpoints = CheckpointStore(store, "run")
    with monkeypatch.context() as patch:
        patch.setattr("mlpipe.training.module.augment", _fails_in_epoch(3, batches_per_epoch=3))
        with pytest.raises(RuntimeError, match="killed"):
            train(model, dataset, tracking, checkpoints=checkpoints)
    assert tracking.steps == [1, 2]
    torch.manual_seed(12345)  # another process has other random numbers
    resumed = train(model, dataset, tracking, checkpoints=checkpoints)

    assert same(unbroken, resumed)
    assert tracking.steps == [1, 2, 3, 4]
    durations = {"images_per_second"}
    for before, after in zip(expected, tracking.metrics, strict=True):
        assert {k: v for k, v in before.items() if k not in durations} == {
            k: v for k, v in after.items() if k not in durations
        }
    assert (resumed.best_epoch, resumed.epochs_run) == (unbroken.best_epoch, 4)


def test_a_training_interrupted_within_an_epoch_goes_on_after_its_last_saved_batch(
    dataset, config, train, tracking, store, monkeypatch
) -> None:
    model = config(
        num_epochs=3,
        augmentation="flip_crop",
        mixing="mixup",
        optimizer="sgd",
        schedule="one_cycle",
        precise_batch_norm=True,
    )
    unbroken = train(model, dataset, tracking, network=Normalized())
    expected = tracking.metrics
    tracking.steps, tracking.metrics = [], []
    monkeypatch.setattr("mlpipe.training.epochs.SAVE_SECONDS", 0.0)
    checkpoints = CheckpointStore(store, "run")
    for epoch in (1, 2):  # each time in the second batch of three
        with monkeypatch.context() as patch:
            failing = _fails_in_epoch(1, batches_per_epoch=3) if epoch == 1 else _fails_at(2 + 2)
            patch.setattr("mlpipe.training.module.augment", failing)
            with pytest.raises(RuntimeError, match="killed"):
                train(model, dataset, tracking, checkpoints=checkpoints, network=Normalized())
        torch.manual_seed(12345)
    with monkeypatch.context() as patch:
        patch.setattr("mlpipe.training.module.augment", _fails_at(2 + 3 + 1))
        # Two batches, then an epoch of three.
        resumed = train(model, dataset, tracking, checkpoints=checkpoints, network=Normalized())
    assert same(unbroken, resumed)
    assert tracking.steps == [1, 2, 3]
    for before, after in zip(expected, tracking.metrics, strict=True):
        assert {**before, "images_per_second": 0} == {**after, "images_per_second": 0}


def _fails_at(failing_call: int) -> Any:
    return _fails_in_epoch(failing_epoch=1, batches_per_epoch=0, first=failing_call)


def _fails_in_epoch(failing_epoch: int, batches_per_epoch: int, first: int = 2) -> Any:
    from mlpipe.training.augmentation import augment

    calls = 0

    def failing(images_u8: Tensor, kind: Any, epoch: int) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == (failing_epoch - 1) * batches_per_epoch + first:  # in mid-epoch
            raise RuntimeError("killed")
        return augment(images_u8, kind, epoch)

    return failing


def test_an_attempt_that_was_superseded_saves_and_logs_no_epoch(
    dataset, config, train, tracking, store, monkeypatch
) -> None:
    model, checkpoints = config(num_epochs=3), CheckpointStore(store, "run")
    taken_over = iter([False, True])

    def ensure_current() -> None:
        if next(taken_over):
            raise SupersededError("attempt 2 has taken over")

    monkeypatch.setattr(tracking, "ensure_current", ensure_current)
    with pytest.raises(SupersededError):
        train(model, dataset, tracking, checkpoints=checkpoints)
    assert tracking.steps == [1]
    saved = checkpoints.load()
    assert saved is not None
    assert len(saved["history"]) == 1


def test_an_epoch_that_was_saved_but_not_logged_is_logged_on_resuming(dataset, config, train, tracking, store) -> None:
    model, checkpoints = config(num_epochs=3), CheckpointStore(store, "run")
    tracking.fail_at = 2
    with pytest.raises(ConnectionError):
        train(model, dataset, tracking, checkpoints=checkpoints)
    tracking.fail_at = None
    train(model, dataset, tracking, checkpoints=checkpoints)
    assert tracking.steps == [1, 2, 3]


def test_the_last_epoch_too_is_logged_when_only_its_logging_failed(dataset, config, train, tracking, store) -> None:
    model, checkpoints = config(num_epochs=2), CheckpointStore(store, "run")
    tracking.fail_at = 2
    with pytest.raises(ConnectionError):
        train(model, dataset, tracking, checkpoints=checkpoints)
    tracking.fail_at = None
    train(model, dataset, tracking, checkpoints=checkpoints)
    assert tracking.steps == [1, 2]


def test_a_finished_training_is_not_repeated(dataset, config, train, tracking, store) -> None:
    checkpoints = CheckpointStore(store, "run")
    first = train(config(), dataset, tracking, checkpoints=checkpoints)
    second = train(config(), dataset, tracking, checkpoints=checkpoints)
    assert same(first, second)
    assert first.train_seconds == second.train_seconds
    assert tracking.steps == [1, 2]


@pytest.mark.parametrize("change", [{"learning_rate": 0.01}, {"num_epochs": 3}, {"seed": 1}])
def test_a_checkpoint_of_other_settings_is_not_used(change, dataset, config, train, tracking, store) -> None:
    checkpoints = CheckpointStore(store, "run")
    train(config(), dataset, tracking, checkpoints=checkpoints)
    resumed = train(config(**change), dataset, tracking, checkpoints=checkpoints)
    tracking.steps, tracking.metrics = [], []
    assert same(resumed, train(config(**change), dataset, tracking))


def test_an_unreadable_checkpoint_means_starting_anew(dataset, config, train, tracking, store, caplog) -> None:
    checkpoints = CheckpointStore(store, "run")
    train(config(), dataset, tracking, checkpoints=checkpoints)
    store.path("checkpoints/run/last.pt").write_bytes(b"not a checkpoint")
    train(config(), dataset, tracking, checkpoints=checkpoints)
    assert "cannot be read" in caplog.text


def test_deleting_the_checkpoint_leaves_nothing(dataset, config, train, tracking, store) -> None:
    checkpoints = CheckpointStore(store, "run")
    train(config(), dataset, tracking, checkpoints=checkpoints)
    assert [path.name for path in store.root.rglob("*") if path.is_file()] == ["last.pt"]
    checkpoints.delete()
    assert checkpoints.load() is None
    assert not [path for path in store.root.rglob("*") if path.is_file()]


def test_one_cycle_ends_with_a_rate_that_is_still_one(dataset, config, train, tracking) -> None:
    train(config(num_epochs=1, batch_size=96, schedule="one_cycle"), dataset, tracking)
    train(config(num_epochs=2, batch_size=32, schedule="one_cycle"), dataset, tracking)
    assert min(epoch["learning_rate"] for epoch in tracking.metrics) > 0


def test_an_infinite_loss_names_the_learning_rate(dataset, config, train, tracking, store) -> None:
    model = config(optimizer="sgd", learning_rate=10.0, num_epochs=5, precision="32-true")
    with pytest.raises(UserError, match=r"learning_rate: 10 made the loss infinite in epoch \d; choose"):
        train(model, dataset, tracking, checkpoints=CheckpointStore(store, "run"))


def test_a_remainder_of_one_image_does_no_harm(new_dataset, config, train, tracking) -> None:
    train(config("resnet18", num_epochs=1), new_dataset(num_train=33, size=32), tracking)
    assert tracking.steps == [1]


def test_the_log_has_a_line_per_epoch_and_nothing_else_is_said_or_written(
    dataset, config, train, tracking, caplog, capfd, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(config(num_epochs=3, schedule="one_cycle"), dataset, tracking)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert all(part in lines[0] for part in ("train/loss", "val/accuracy", "images/s", "eta"))
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_a_long_epoch_says_how_far_it_is(dataset, config, train, tracking, caplog, monkeypatch) -> None:
    monkeypatch.setattr("mlpipe.training.epochs.PROGRESS_SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    train(config(num_epochs=1), dataset, tracking)
    assert "epoch 1/1: batch 2 of 3, train/loss" in caplog.text


@pytest.mark.parametrize(("capability", "precision"), [("avx512_bf16", "bf16-mixed"), ("avx2", "32-true")])
def test_bfloat16_only_where_the_processor_has_it(capability, precision, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    assert choose_precision("auto") == precision
    assert choose_precision("32-true") == "32-true"


def test_how_it_was_computed_is_logged(dataset, config, train, tracking) -> None:
    train(config(num_epochs=1), dataset, tracking)
    assert set(tracking.params) == {"images_per_step", "precision", "device", "threads"}


def test_batches_of_a_small_data_set_leave_the_wanted_steps(dataset, config, train, tracking) -> None:
    train(config(num_epochs=1, batch_size=512, min_steps=8), dataset, tracking)
    assert tracking.params["images_per_step"] == dataset.manifest.num_train // 8


def test_nothing_is_left_in_the_temporary_folder(
    dataset, config, train, tracking, store, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    Path(tmp_path / "tmp").mkdir()
    train(config(), dataset, tracking, checkpoints=CheckpointStore(store, "run"))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_deterministic_mode_fills_no_new_tensors(dataset, config, train, tracking, monkeypatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    train(config(num_epochs=1), dataset, tracking, network=Spy(16))
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_a_gpu_goes_on_within_an_epoch_that_began_on_a_cpu(dataset) -> None:
    loader = BatchLoader(dataset.train_split(), 32, seed=0, shuffle=True)
    callback = EpochCallback(loader, seed=0, resumed=None)
    random = torch.get_rng_state()
    callback._within = {"batches": 1, "totals": {}, "random": random, "random_of_device": None}
    callback.on_train_epoch_start(Mock(), Mock(epoch=0, device=torch.device("cuda")))
    assert torch.equal(torch.get_rng_state(), random)
    assert next(iter(loader)) is None


def test_what_subclasses_of_batch_normalization_add_stays_over_several_devices() -> None:
    images = torch.randn(2, 3, 32, 32)
    for name, variant in (
        ("custom_cnn", "small_images"),
        ("resnet18", "standard"),
        ("timm/test_efficientnet", "standard"),
    ):
        network = build_network(name, num_classes=3, image_size=32, seed=0, variant=variant).eval()
        before, names = network(images), set(network.state_dict())
        synchronise(network)
        assert set(network.state_dict()) == names
        torch.testing.assert_close(network(images), before)
        synchronised = any(isinstance(each, nn.SyncBatchNorm) for each in network.modules())
        assert synchronised == (name != "custom_cnn")


def test_a_shift_of_a_group_of_one_is_that_of_a_process_alone() -> None:
    results = []
    for together in (False, True):
        torch.manual_seed(0)
        layer, images = Shift(4), torch.randn(6, 4, 5, 5).requires_grad_()
        if together:
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            output = layer(images)
            output.sin().sum().backward()
        finally:
            if together:
                distributed.destroy_process_group()
        results.append([output, images.grad, layer.shift.grad, layer.running_mean, layer.running_var])
    for alone, of_group in zip(*results, strict=True):
        torch.testing.assert_close(of_group, alone, rtol=1e-4, atol=1e-5)
