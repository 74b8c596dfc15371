"""Training and prediction on one CUDA device; `benchmarks/gpu.sh` calls it.

    python benchmarks/gpu.py cifar10.zip
    python benchmarks/gpu.py --device cpu --tiny

A section that fails is reported as such, and the others go on: a lent device has minutes, not tries.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = tuple[NDArray[np.uint8], NDArray[np.int64]]
Section = dict[str, Any]

USUAL_EPOCHS = 2
COMPILED_STEPS = 60
PREDICTED_IMAGES = 10_000
UNDETERMINED = " does not have a deterministic implementation"
"""What PyTorch warns of, after the operation's name."""


@dataclass(frozen=True)
class Lab:
    """What is measured on what."""

    device: str
    tiny: bool
    train: Images
    test: Images
    data: Path | None


def read_data(path: Path | None, tiny: bool) -> tuple[Images, Images]:
    """Training and test images: of a zip, of the official download, or noise."""
    if tiny:
        rng = np.random.default_rng(0)
        labels = np.arange(600) % 10
        images_u8 = rng.integers(0, 256, (600, 32, 32, 3), np.uint8)
        return (images_u8[:500], labels[:500]), (images_u8[500:], labels[500:])
    if path:
        from common import read_images

        return read_images(path, "train"), read_images(path, "test")
    from torchvision.datasets import CIFAR10

    with tempfile.TemporaryDirectory() as folder:
        parts = [CIFAR10(folder, train=is_train, download=True) for is_train in (True, False)]
        train, test = ((np.array(part.data), np.array(part.targets, np.int64)) for part in parts)
    return train, test


def model(recipe: Any, architecture: str, lab: Lab, seed: int = 0) -> Any:
    from mlpipe.config import RunParams
    from mlpipe.recipes import resolve

    form = RunParams(dataset="cifar10", recipe=recipe, models=f"{architecture}=random", seed=seed)
    config: Any = resolve(form).models[0]
    return replace(config, train=replace(config.train, num_epochs=1)) if lab.tiny else config


def peak_memory(lab: Lab) -> float | None:
    """GiB since the last call; `None` without a GPU."""
    import torch

    if lab.device != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 2)


def training(lab: Lab) -> Section:
    """Whole trainings by `report` and `strong`, as a run makes them."""
    from accuracy import held_out_tenth, hits, trained
    from common import Logged

    data, found = held_out_tenth(*lab.train), {}
    for recipe in ("report", "strong"):
        for architecture in ("custom_cnn", "resnet18"):
            peak_memory(lab)
            logged = Logged()
            done = trained(data, model(recipe, architecture, lab), logged)
            rates = [epoch["images_per_second"] for epoch in logged.epochs]
            found[f"{architecture} by {recipe}"] = {
                "images/s, median epoch": round(statistics.median(rates)),
                "images/s, first epoch": round(rates[0]),
                "training and validation, s": round(done.train_seconds, 1),
                "test accuracy": round(float(hits(done, *lab.test).mean()), 4),
                "peak memory, GiB": peak_memory(lab),
            }
    return found


def usual_loop(lab: Lab) -> Section:
    """ResNet-18 of `report` by DataLoader workers, transforms per image and Adam."""
    import torch
    from torch.nn import functional as F
    from torch.utils.data import DataLoader
    from training import PerImage, usual_network

    workers = min(8, os.cpu_count() or 1)
    network = usual_network("resnet18").to(lab.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    loader = DataLoader(
        PerImage(*lab.train), 64, shuffle=True, num_workers=workers, persistent_workers=True, pin_memory=True
    )
    seconds = 0.0
    for _ in range(1 if lab.tiny else USUAL_EPOCHS):
        began = time.perf_counter()
        for images, labels in loader:
            loss = F.cross_entropy(network(images.to(lab.device)), labels.to(lab.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        wait_for(lab)
        seconds = time.perf_counter() - began
    return {"resnet18": {"images/s": round(len(lab.train[1]) / seconds), "DataLoader workers": workers}}


def wait_for(lab: Lab) -> None:
    import torch

    if lab.device == "cuda":
        torch.cuda.synchronize()


def published(lab: Lab) -> Section:
    """`airbench94_muon` as in benchmarks/frontier.py, on all training images; twice, the first to warm up."""
    import frontier
    import torch

    if lab.tiny:
        frontier.BATCH_SIZE, frontier.EPOCHS = 100, 1
    parts = [torch.from_numpy(each).to(lab.device) for each in (*lab.train, *lab.test)]
    seconds = accuracy = 0.0
    for seed in range(2):
        recipe = frontier.Recipe(parts[0], parts[1], seed)
        wait_for(lab)
        began = time.perf_counter()
        recipe.run()
        wait_for(lab)
        seconds = time.perf_counter() - began
        accuracy = recipe.accuracy(parts[2], parts[3])
    return {"airbench94_muon": {"training, s": round(seconds, 2), "test accuracy": round(accuracy, 4)}}


def repeated(lab: Lab) -> Section:
    """Whether a seed gives the same weights again; else the operation that PyTorch names."""
    import torch
    from accuracy import held_out_tenth, trained

    data, found = held_out_tenth(*lab.train), {}
    for architecture in ("custom_cnn", "resnet18"):
        config = model("strong", architecture, lab)
        config = replace(config, train=replace(config.train, num_epochs=1))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            weights = [trained(data, config).predictor.state_dict() for _ in range(2)]
        equal = all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))
        # A training sets deterministic mode so that PyTorch warns of such operations, and goes on.
        said = [str(each.message).partition(UNDETERMINED) for each in caught]
        named = ", ".join(sorted({operation for operation, known, _ in said if known})) or "PyTorch names none"
        found[architecture] = {"equal weights": equal, "what prevents it": "" if equal else named}
    return found


def compiled(lab: Lab) -> Section:
    """Steps of `strong` for custom_cnn, as they are and by `torch.compile`."""
    import torch
    from torch.nn import functional as F

    from mlpipe.models.registry import build_network

    images = torch.randn(512, 3, 32, 32, device=lab.device).to(memory_format=torch.channels_last)
    labels = torch.arange(512, device=lab.device) % 10
    found = {}
    for mode in (None, "default", "reduce-overhead"):
        network: Any = build_network("custom_cnn", num_classes=10, image_size=32, seed=0, variant="small_images")
        network = network.to(lab.device, memory_format=torch.channels_last)
        step = network if mode is None else torch.compile(network, mode=mode)

        def run(count: int, network: Any = network, step: Any = step) -> float:
            wait_for(lab)
            began = time.perf_counter()
            for _ in range(count):
                with torch.autocast(lab.device, torch.bfloat16):
                    loss = F.cross_entropy(step(images), labels)
                network.zero_grad()
                loss.backward()
            wait_for(lab)
            return time.perf_counter() - began

        first, steps = run(3), 3 if lab.tiny else COMPILED_STEPS
        found[mode or "as it is"] = {
            "first three steps, s": round(first, 1),
            "images/s, forward and backward": round(512 * steps / run(steps)),
        }
        if lab.tiny:
            break  # compiling takes a processor minutes
    return found


def prediction(lab: Lab) -> Section:
    """`mlflow.pyfunc` on raw images."""
    from predict import logged_model, tracking_store

    from mlpipe.models.registry import build_network

    images_u8 = lab.test[0][:PREDICTED_IMAGES]
    found = {}
    for architecture in ("custom_cnn", "resnet18"):
        with tracking_store():
            network = build_network(architecture, num_classes=10, image_size=32, seed=0)
            classifier = logged_model(architecture, network, images_u8)
            classifier.predict(images_u8[:512])
            began = time.perf_counter()
            classifier.predict(images_u8)
            found[architecture] = {"images/s": round(len(images_u8) / (time.perf_counter() - began))}
    return found


def two_tasks(lab: Lab) -> Section:
    """ResNet-18 of `report` in one process, and in two on one device: images/s of each."""
    found = {}
    for count in (1, 2):
        command = [sys.executable, __file__, "--device", lab.device, "--one-epoch"]
        command += ["--tiny"] if lab.tiny else [str(lab.data)] if lab.data else []
        started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        rates = [float(each.communicate(timeout=300)[0].splitlines()[-1]) for each in started]
        found[f"{count} at once"] = {"images/s, each": [round(rate) for rate in rates]}
    return found


def one_epoch(lab: Lab) -> None:
    """Print the images/s of two epochs of ResNet-18."""
    from accuracy import held_out_tenth, trained
    from common import Logged

    config, logged = model("report", "resnet18", lab), Logged()
    trained(held_out_tenth(*lab.train), replace(config, train=replace(config.train, num_epochs=2)), logged)
    print(logged.epochs[-1]["images_per_second"])


SECTIONS: tuple[Callable[[Lab], Section], ...] = (
    training, usual_loop, published, repeated, compiled, prediction, two_tasks
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="zip; default: the official download of CIFAR-10")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a few hundred images of noise")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--one-epoch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    from common import conditions, table

    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch finds no CUDA device; see nvidia-smi, or give --device cpu")
    train, test = read_data(arguments.data, arguments.tiny)
    lab = Lab(arguments.device, arguments.tiny, train, test, arguments.data)
    if arguments.one_epoch:
        one_epoch(lab)
        return
    name = torch.cuda.get_device_name() if lab.device == "cuda" else "no GPU"
    head = f"{name}; CUDA {torch.version.cuda}; {conditions('torch', 'lightning', 'mlflow')}"
    results: dict[str, Any] = {"conditions": head, "tiny": lab.tiny}
    text = ["# One CUDA device", head + (" Noise in place of images: only that it runs." if lab.tiny else "")]
    failed = False
    for section in SECTIONS:
        began = time.perf_counter()
        title = section.__name__.replace("_", " ")
        torch.use_deterministic_algorithms(False)  # a training leaves it on
        try:
            found = section(lab)
        except Exception as error:  # noqa: BLE001 - the other sections go on
            failed, found = True, {"failed": {"reason": f"{type(error).__name__}: {error}"[:500]}}
        results[section.__name__] = found
        columns = list(next(iter(found.values())))
        rows = [[name, *(str(values.get(column) or "–") for column in columns)] for name, values in found.items()]
        text.append(f"## {title.capitalize()}\n\n{section.__doc__}\n\n{table(['', *columns], rows)}")
        print(f"{title}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        arguments.out.mkdir(parents=True, exist_ok=True)  # after each section: the machine may be taken back
        (arguments.out / "gpu.json").write_text(json.dumps(results, indent=1))
        (arguments.out / "gpu.md").write_text("\n\n".join(text) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
