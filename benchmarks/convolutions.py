"""Winograd's convolutions against PyTorch's, in float32: forward and both gradients.

    python benchmarks/convolutions.py

The layers are those of resnet18's form for small images, batch 256, from 64 channels on: the first two are why narrow
ones keep PyTorch's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from common import conditions, paired, restrict_to_avx2, spread, table
from torch import Tensor
from torch.nn import functional as F

from mlpipe.training.cpu.memory import keep_freed_memory
from mlpipe.training.cpu.winograd import convolve

BATCH_SIZE = 256
LAYERS = [(64, 64, 32), (64, 128, 16), (128, 128, 16), (128, 256, 16), (256, 256, 8), (256, 512, 8), (512, 512, 4)]
"""Inputs, outputs, height and width."""


def step(convolution: Callable[[Tensor, Tensor], Tensor], images: Tensor, kernels: Tensor, gradient: Tensor) -> float:
    """Seconds."""
    began = time.perf_counter()
    torch.autograd.grad(convolution(images, kernels), (images, kernels), gradient)
    return time.perf_counter() - began


def measure(num_inputs: int, num_outputs: int, size: int, rounds: int) -> list[str]:
    """A row of the table."""
    torch.manual_seed(0)
    images = torch.randn(BATCH_SIZE, num_inputs, size, size).to(memory_format=torch.channels_last).requires_grad_()
    kernels = (torch.randn(num_outputs, num_inputs, 3, 3) / (9 * num_inputs) ** 0.5).to(
        memory_format=torch.channels_last
    )
    kernels.requires_grad_()
    with torch.no_grad():
        expected = F.conv2d(images, kernels, padding=1)
        error = float((convolve(images, kernels) - expected).abs().max() / expected.std())
    gradient = torch.randn_like(expected)
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "PyTorch": partial(F.conv2d, padding=1),
        "Winograd": convolve,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            taken = step(way, images, kernels, gradient)
            if round_number:  # after one to warm up
                seconds[name].append(1000 * taken)
    faster = paired(seconds["PyTorch"], seconds["Winograd"])
    figures = [spread(seconds["PyTorch"], 0), spread(seconds["Winograd"], 0), spread(faster, 2)]
    return [f"{num_inputs} to {num_outputs}, {size} × {size}", *figures, f"{error:.0e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    restrict_to_avx2()
    keep_freed_memory()
    rows = [measure(*layer, arguments.rounds) for layer in LAYERS]
    print("# Convolutions in float32\n")
    print(f"3×3, batch {BATCH_SIZE}, forward and both gradients: this project's, with Winograd's F(4×4, 3×3), against")
    print("PyTorch's. Training uses it from 128 channels up, on processors without bfloat16. Error: the largest")
    print("difference of an output, in standard deviations of the outputs.\n")
    print(conditions("torch"))
    print(f"{torch.get_num_threads()} threads, {arguments.rounds} rounds; PyTorch is restricted to AVX2.\n")
    head = ["layer", "PyTorch, ms, median (range)", "Winograd, ms", "PyTorch / Winograd", "error"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
