"""Files of weights that must not be loaded; each function writes one and returns its address."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch

from mlpipe.models.registry import build_network

Maker = Callable[[Path], str]


def state(architecture: str = "custom_cnn") -> dict[str, torch.Tensor]:
    return build_network(architecture, num_classes=10, image_size=32, seed=1).state_dict()


def saved(value: object, name: str = "weights.pth") -> Maker:
    def make(folder: Path) -> str:
        torch.save(value() if callable(value) else value, folder / name)
        return str(folder / name)

    return make


def raw(content: bytes, name: str = "weights.pth") -> Maker:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return make


def of_resnet(folder: Path) -> str:
    return saved(lambda: state("resnet18"))(folder)


def cut(folder: Path) -> str:
    path = Path(saved(state)(folder))
    path.write_bytes(path.read_bytes()[:-5000])
    return str(path)


def wrong_checksum(folder: Path) -> str:
    return Path(saved(state)(folder)).as_uri() + "#sha256=" + "0" * 64


class Malicious:
    """Unpickled, it makes a file `hacked`, which the test looks for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.folder}/hacked'",)


def malicious(folder: Path) -> str:
    return saved({"weight": Malicious(folder)})(folder)


def malicious_pickle(folder: Path) -> str:
    return raw(pickle.dumps(Malicious(folder)))(folder)


def script(folder: Path) -> str:
    """A TorchScript archive, which holds code."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(folder / "weights.pt"))
    return str(folder / "weights.pt")
