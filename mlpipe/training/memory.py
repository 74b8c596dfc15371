"""Whether a training fits into memory, found before it begins: a killed process could not say why it died."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from mlpipe.errors import UserError

CGROUP = Path("/sys/fs/cgroup")
NUM_IMAGES = 2, 4
"""Of the batches by which memory is measured; one image alone has no variance to normalize by."""
MOST_OF_AN_INPUT = 1000
"""A network keeps less of an image than this many times its input: EfficientNet-B7 890 times, ResNet-152 300 times."""
LARGEST_BATCH = 4096
STATES = 3
"""A parameter's gradient and its two averages, which an optimizer keeps."""


def _memories(num_devices: int) -> int:
    """How many memories share a batch: one of each GPU; processes without GPUs have that of the machine in common."""
    return num_devices if torch.cuda.is_available() else 1


def check_memory(
    network: nn.Module, name: str, *, batch_size: int, side: int, bfloat16: bool, num_devices: int = 1
) -> float:
    """What the part of a batch that one memory takes needs at most, bytes.

    Args:
        name: of the network, for the message.
        batch_size: images of a step, of all devices.
        side: height and width of the images, pixels.
        bfloat16: whether activations are computed in it.

    Raises:
        UserError: a batch needs more than is free.
    """
    free = free_bytes()
    shares = _memories(num_devices)
    images = math.ceil(batch_size / shares)
    states = _bytes_of_states(network, num_devices)
    most = images * 3 * side**2 * 4 * MOST_OF_AN_INPUT + states
    if most < free / 2:  # half, for the images may have a part of what is left
        return most
    needed = images * bytes_of_an_image(network, side, bfloat16=bfloat16) + states
    if needed > free:
        raise UserError(
            f"batch_size: {batch_size} images of {side}×{side} pixels need about {needed / 2**30:.1f} GiB "
            f"{'of each device ' if shares > 1 else ''}to train {name}, and {free / 2**30:.1f} GiB are free; "
            "lower batch_size or image_size"
        )
    return needed


def largest_batch(network: nn.Module, *, side: int, bfloat16: bool, num_devices: int = 1) -> int:
    """The largest batch that takes half of the memory to train on: for each GPU a power of two from 2 to 4096.

    Half of all memory, not of what is free now: a training that is resumed finds the same.
    """
    for_images = all_bytes() / 2 - _bytes_of_states(network, num_devices)
    images = for_images / bytes_of_an_image(network, side, bfloat16=bfloat16)
    return _memories(num_devices) << int(min(max(images, 2), LARGEST_BATCH)).bit_length() - 1


def _bytes_of_states(network: nn.Module, num_devices: int) -> int:
    """In one memory, of all devices that share it."""
    in_memory = num_devices // _memories(num_devices)
    return in_memory * STATES * sum(each.numel() * each.element_size() for each in network.parameters())


def bytes_of_an_image(network: nn.Module, side: int, *, bfloat16: bool) -> float:
    """What is kept of an image from the forward to the backward pass, bytes; the network stays as it is.

    By the difference of two batches: copies of the weights in bfloat16 are kept, too, but once for all images.
    """
    copied = copy.deepcopy(network).cpu().train()
    few, more = (_bytes_kept(copied, number, side, bfloat16=bfloat16) for number in NUM_IMAGES)
    return (more - few) / (NUM_IMAGES[1] - NUM_IMAGES[0])


def _bytes_kept(network: nn.Module, num_images: int, side: int, *, bfloat16: bool) -> int:
    own = {each.untyped_storage().data_ptr() for each in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.zeros(num_images, 3, side, side).contiguous(memory_format=torch.channels_last)
    with (
        torch.random.fork_rng(devices=[]),
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
    ):
        network(images)
    return sum(kept.values())


def all_bytes() -> int:
    """Memory of the device, else of the machine or the container's limit."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[1])
    whole, limit = int(psutil.virtual_memory().total), _limit_of_container()
    return whole if limit is None else min(whole, limit)


def free_bytes() -> int:
    """Memory that this process may still take: of the device, else of the machine or of the container's limit."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    free, limit = int(psutil.virtual_memory().available), _limit_of_container()
    if limit is None:
        return free
    try:
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    return min(free, limit - used + int(stat["inactive_file"]))


def _limit_of_container() -> int | None:
    """Bytes; `None`: there is no limit, or no container."""
    try:
        return int((CGROUP / "memory.max").read_text())
    except (OSError, ValueError):  # it says max, where there is none
        return None
