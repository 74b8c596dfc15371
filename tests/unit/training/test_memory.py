"""A batch that is too large is refused before the training."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from mlpipe.errors import UserError
from mlpipe.training import memory
from mlpipe.training.fitting import bytes_for_images


def test_what_a_pass_keeps_is_counted_once_and_the_network_stays_as_it_is() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    found = memory.bytes_of_an_image(network, 16, bfloat16=False)
    maps = 16 * 16 * 4  # bytes of one channel
    # The image, the convolution's result, what ReLU leaves, and dropout's mask (as float32 or bytes).
    assert (3 + 8 + 8 + 2) * maps <= found <= (3 + 8 + 8 + 8 + 8) * maps + 200
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_bfloat16_takes_less() -> None:
    network = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(8)))
    single, half = (memory.bytes_of_an_image(network, 32, bfloat16=each) for each in (False, True))
    assert half < 0.7 * single


def test_copies_of_the_weights_in_bfloat16_are_not_counted_for_each_image() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 64), nn.Linear(64, 4096))
    assert memory.bytes_of_an_image(network, 8, bfloat16=True) <= (3 * 8 * 8 + 64) * 4


def test_a_batch_that_does_not_fit_names_the_numbers_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 2**30)
    network = nn.Conv2d(3, 64, 3)
    memory.check_memory(network, "mine", batch_size=16, side=64, bfloat16=False)
    with pytest.raises(
        UserError, match=r"batch_size: 4096 images of 512×512 pixels need about .* GiB to train mine, and 1\.0"
    ):
        memory.check_memory(network, "mine", batch_size=4096, side=512, bfloat16=False)


def test_devices_share_a_batch_where_each_has_a_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 100 * 3 * 64 * 64 * 4)
    network = nn.Conv2d(3, 24, 3, padding=1)  # keeps the image
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory.check_memory(network, "mine", batch_size=160, side=64, bfloat16=False, num_devices=2)
    with pytest.raises(UserError, match="GiB of each device to train mine"):
        memory.check_memory(network, "mine", batch_size=240, side=64, bfloat16=False, num_devices=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="GiB to train mine"):
        memory.check_memory(network, "mine", batch_size=160, side=64, bfloat16=False, num_devices=2)


def test_processes_that_share_a_memory_have_an_optimizer_each(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 30 * 30, 4096))
    weights = sum(4 * each.numel() for each in network.parameters())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(memory, "free_bytes", lambda: 2 * memory.STATES * weights)
    memory.check_memory(network, "mine", batch_size=16, side=32, bfloat16=False)
    with pytest.raises(UserError, match="GiB to train mine"):
        memory.check_memory(network, "mine", batch_size=16, side=32, bfloat16=False, num_devices=3)


def test_images_are_kept_on_a_gpu_in_what_a_batch_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Conv2d(3, 24, 3, padding=1)  # keeps the image
    image_bytes = 3 * 64 * 64 * 4
    monkeypatch.setattr(memory, "free_bytes", lambda: 100 * image_bytes)
    needed = memory.check_memory(network, "mine", batch_size=80, side=64, bfloat16=False)
    assert 80 * image_bytes <= needed <= 90 * image_bytes
    for free, kept in ((100, 2.5), (160, 17.5), (80, 0)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free * image_bytes, 200 * image_bytes))
        assert bytes_for_images(0, 90 * image_bytes) == kept * image_bytes


@pytest.mark.parametrize(("memory_bytes", "found"), [(2**10, 2), (2**24, 512), (2**40, 4096)])
def test_the_largest_batch_takes_half_of_the_memory(
    memory_bytes: int, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: Mock(total=2**50))
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{memory_bytes}\n")
    network = nn.Conv2d(3, 24, 3, padding=1)  # keeps the image, 12 KiB
    assert memory.largest_batch(network, side=32, bfloat16=False) == found


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    unlimited = memory.free_bytes()
    (tmp_path / "memory.max").write_text(f"{2**20}\n")
    (tmp_path / "memory.current").write_text(f"{2**19}\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 1024\n")
    assert memory.free_bytes() == 2**19 + 1024 < unlimited
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes() > 2**20
