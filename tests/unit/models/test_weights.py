"""What networks start from."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from mlpipe.config import ModelConfig, NetworkSettings
from mlpipe.data.dataset import Dataset
from mlpipe.errors import UserError
from mlpipe.models import registry, weights
from mlpipe.models.weights import InitialNetwork, initial_network

CLASSES = ("a", "b", "c")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An HTTP server's address and the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


def model(weights: str, architecture: str = "custom_cnn") -> ModelConfig:
    return ModelConfig(architecture=architecture, weights=weights, name=architecture, train=NetworkSettings())


def new(architecture: str = "custom_cnn", num_classes: int = 3, seed: int = 0, image_size: int = 32) -> nn.Module:
    return registry.build_network(architecture, num_classes=num_classes, image_size=image_size, seed=seed)


def load(
    network: nn.Module, source: str, store: Any, architecture: str = "custom_cnn", image_size: int = 32
) -> InitialNetwork:
    """Start from `source`, and give the network at hand what came of it."""
    config = model(source, architecture)
    images = Dataset.in_memory(CLASSES, *[(np.full((3, image_size, image_size, 3), 51, np.uint8), np.arange(3))] * 2)
    start = initial_network(config, registry.describe(config, images.manifest), store)
    network.load_state_dict(start.network.state_dict())
    return start


def written(network: nn.Module, path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict(), path)
    return path


def differing(first: nn.Module, second: nn.Module) -> list[str]:
    other = second.state_dict()
    return [key for key, value in first.state_dict().items() if not torch.equal(value, other[key])]


def test_random_weights_stay_as_they_were_made(store: Any) -> None:
    network = new()
    start = load(network, "random", store)
    assert (start.source, start.sha256) == ("random", None)
    assert differing(network, new()) == []


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_a_file_with_as_many_classes_is_taken_whole(suffix: str, tmp_path: Path, store: Any) -> None:
    path = written(source := new(seed=1), tmp_path / f"weights{suffix}")
    network = new()
    initial = load(network, path.as_uri(), store)
    assert differing(network, source) == []
    assert "; head (" not in initial.source
    assert initial.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert initial.description.channel_mean == (0.2, 0.2, 0.2)


def test_a_path_may_have_a_number_sign(tmp_path: Path, store: Any) -> None:
    path = written(new(seed=1), tmp_path / "run#1.pth")
    load(network := new(), str(path), store)
    assert differing(network, new(seed=1)) == []


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_a_state_within_a_checkpoint_is_found(wrapper: str, tmp_path: Path, store: Any) -> None:
    torch.save({wrapper: new(seed=1).state_dict(), "epoch": 3}, path := tmp_path / "c.pth")
    load(network := new(), str(path), store)
    assert differing(network, new(seed=1)) == []


@pytest.mark.parametrize("architecture", ["custom_cnn", "resnet18", "squeezenet1_1", "vit_b_32", "mnasnet0_5"])
def test_a_head_of_another_size_is_replaced_and_said_so(architecture, tmp_path, store, caplog) -> None:
    caplog.set_level("INFO")
    path = written(source := new(architecture, num_classes=11, seed=1), tmp_path / "w.pth")
    network, fresh = new(architecture), new(architecture)
    initial = load(network, path.as_uri(), store, architecture)
    head = weights.head_keys(architecture)
    assert "; head (" in initial.source
    assert all(key in caplog.text for key in head)
    assert "for 3 classes" in initial.source
    assert not set(head) & set(differing(network, fresh)), "the head must be the new one"
    kept = {key: value for key, value in network.state_dict().items() if key not in head}
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in kept.items())


def test_a_file_without_a_head_gets_a_new_one(tmp_path: Path, store: Any) -> None:
    source = new("resnet18", seed=1)
    body = {key: value for key, value in source.state_dict().items() if not key.startswith("fc.")}
    torch.save(body, path := tmp_path / "w.pth")
    network = new("resnet18")
    assert "; head (" in load(network, str(path), store, "resnet18").source
    assert set(differing(network, source)) == {"fc.weight", "fc.bias"}


def test_a_file_with_imagenet_s_classes_brings_imagenet_s_normalisation(tmp_path: Path, store: Any) -> None:
    path = written(new("resnet18", num_classes=1000), tmp_path / "w.safetensors")
    assert load(new("resnet18"), str(path), store, "resnet18").description.channel_mean == weights.IMAGENET_MEAN


def test_auxiliary_outputs_are_left_out(tmp_path: Path, store: Any) -> None:
    full = torchvision.models.googlenet(weights=None, num_classes=3, aux_logits=True, init_weights=False)
    path = written(full, tmp_path / "w.pth")
    network = new("googlenet")
    load(network, str(path), store, "googlenet")
    assert torch.equal(network.fc.weight, full.fc.weight)  # type: ignore[union-attr]


def test_torchvision_s_old_names_in_densenet_files_are_understood(tmp_path: Path, store: Any) -> None:
    state = new("densenet121", seed=1).state_dict()
    old = {}
    for key, value in state.items():
        if "denselayer" in key and not key.endswith("num_batches_tracked"):
            for digit in "12":
                key = key.replace(f".norm{digit}.", f".norm.{digit}.").replace(f".conv{digit}.", f".conv.{digit}.")
        if not key.endswith("num_batches_tracked"):
            old[key] = value
    torch.save(old, path := tmp_path / "w.pth")
    load(network := new("densenet121"), str(path), store, "densenet121")
    assert differing(network, new("densenet121", seed=1)) == []


def test_positions_of_a_transformer_are_interpolated_to_the_image_size(tmp_path: Path, store: Any) -> None:
    path = written(new("vit_b_32", image_size=224), tmp_path / "w.pth")
    network = new("vit_b_32", image_size=64, seed=1)
    load(network, str(path), store, "vit_b_32", image_size=64)
    assert network.encoder.pos_embedding.shape[1] == 5  # type: ignore[union-attr]


def test_layers_of_another_shape_are_named(tmp_path: Path, store: Any) -> None:
    path = written(new("resnet34"), tmp_path / "w.pth")
    with pytest.raises(UserError, match="does not fit resnet50: .*of another shape"):
        load(new("resnet50"), str(path), store, "resnet50")


def test_over_http_a_checksum_is_required_and_checked(served: tuple[str, Path], store: Any) -> None:
    address, folder = served
    digest = hashlib.sha256(written(new(seed=1), folder / "w.pth").read_bytes()).hexdigest()
    with pytest.raises(UserError, match="has no checksum; append #sha256="):
        load(new(), f"{address}/w.pth", store)
    with pytest.raises(UserError, match=rf"{digest} instead of {'0' * 64}"):
        load(new(), f"{address}/w.pth#sha256={'0' * 64}", store)
    load(network := new(), f"{address}/w.pth#sha256={digest}", store)
    assert differing(network, new(seed=1)) == []


class TestImageNet:
    """Downloads, against a server of our own."""

    @pytest.fixture
    def published(self, served: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
        """The file that torchvision's enumeration points to; its name has the right checksum."""
        address, folder = served
        path = written(new("resnet18", num_classes=1000, seed=1), folder / "w.pth")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path = path.rename(folder / f"resnet18-{digest[:8]}.pth")
        transform = SimpleNamespace(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
        entry = SimpleNamespace(url=f"{address}/{path.name}", transforms=lambda: transform)
        monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: SimpleNamespace(DEFAULT=entry))  # noqa: ARG005
        return path

    def test_they_are_downloaded_once_and_then_come_from_the_object_store(self, published: Path, store: Any) -> None:
        first, second = new("resnet18"), new("resnet18")
        initial = load(first, "imagenet", store, "resnet18")
        published.unlink()
        assert load(second, "imagenet", store, "resnet18").description == initial.description
        assert differing(first, second) == []
        assert torch.equal(first.conv1.weight, new("resnet18", 1000, seed=1).conv1.weight)  # type: ignore[union-attr]
        assert [path.name for path in (store.root / "weights").iterdir()] == [published.name]
        assert "; head (" in initial.source
        assert (initial.description.channel_mean, initial.description.channel_std) == (
            weights.IMAGENET_MEAN,
            weights.IMAGENET_STD,
        )

    def test_another_file_than_the_name_says_is_refused_and_not_kept(self, published: Path, store: Any) -> None:
        written(new("resnet18", 1000, seed=2), published)
        with pytest.raises(UserError, match="does not have the sha256 of its name"):
            load(new("resnet18"), "imagenet", store, "resnet18")
        assert not store.root.exists()

    def test_out_of_reach_they_are_an_error_that_names_both_ways_out(self, published: Path, store: Any) -> None:
        published.unlink()
        with pytest.raises(UserError, match=r"'resnet18=imagenet' cannot be downloaded.* choose random, or .*file:///"):
            load(new("resnet18"), "imagenet", store, "resnet18")


def test_every_network_of_torchvision_has_imagenet_weights_with_a_checksum_in_the_name() -> None:
    for name in torchvision.models.list_models(module=torchvision.models):
        entry = torchvision.models.get_model_weights(name).DEFAULT
        prefix = Path(entry.url).stem.rsplit("-", 1)[-1]
        assert len(prefix) >= 8
        int(prefix, 16)
        assert len(entry.transforms().mean) == 3
