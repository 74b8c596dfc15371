"""Training on images that do not fit in memory, against the same images in memory.

    python benchmarks/larger_than_memory.py

A set of random images is written as a published data set is stored on a worker, and read once, so that the page cache
is warm. Each round trains custom_cnn twice, each time in a process of its own: one opens the set as all trainings do,
by `mlpipe.data.dataset.Dataset`, and may have less memory than the set is large; one holds all of it in memory.

The limit is RLIMIT_DATA: the kernel refuses a process more private writable memory (heap, anonymous and copy-on-write
mappings) than that. Pages of files that are mapped read-only do not count, and rightly: they are the kernel's cache,
which it takes back when somebody needs memory. An array of the images would not fit under the limit, which is shown by
trying.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import conditions, paired, spread, table

NUM_IMAGES = 1_000_000
SIZE = 32
LIMIT_BYTES = 2 << 30
BATCH_SIZE = 64
NUM_BATCHES = 250
"""Of each epoch: one to warm up, one that counts. Their images are drawn from all of the set."""
DIGEST = "generated"


def write_set(folder: Path) -> int:
    """A data set of random images in the cache of a worker; bytes of its images."""
    target = folder / "datasets" / DIGEST
    target.mkdir(parents=True)
    shape = (NUM_IMAGES, SIZE, SIZE, 3)
    rng = np.random.default_rng(0)
    images = np.lib.format.open_memmap(target / "train_images.npy", "w+", np.uint8, shape)
    for start in range(0, NUM_IMAGES, 10_000):
        part = images[start : start + 10_000]
        part[:] = np.frombuffer(rng.bytes(part.size), np.uint8).reshape(part.shape)
    images.flush()
    np.save(target / "train_labels.npy", rng.integers(0, 10, NUM_IMAGES))
    np.save(target / "train_indices.npy", np.arange(NUM_IMAGES))
    return images.nbytes


def train(folder: Path, *, in_memory: bool) -> dict[str, Any]:
    """Train for two short epochs; images/s of the second, and the memory that was needed."""
    from training import EpochTimer, trainer

    from mlpipe.config import NetworkSettings
    from mlpipe.data.batches import BatchLoader
    from mlpipe.data.dataset import ImageRows, Split, map_array
    from mlpipe.models.registry import build_network
    from mlpipe.training.module import ClassificationModule
    from mlpipe.training.precision import choose_precision

    target = folder / "datasets" / DIGEST
    indices = np.load(target / "train_indices.npy")
    images = ImageRows(map_array(target / "train_images.npy"), indices)
    split = Split(images, map_array(target / "train_labels.npy")[indices])
    if in_memory:
        split = Split.of(np.load(target / "train_images.npy"), split.labels)
    loader = BatchLoader(split, BATCH_SIZE, seed=0, shuffle=True)
    module = ClassificationModule(
        build_network("custom_cnn", num_classes=10, image_size=SIZE, seed=0),
        NetworkSettings(batch_size=BATCH_SIZE),
        channel_mean=(0.5, 0.5, 0.5),
        channel_std=(0.25, 0.25, 0.25),
        num_classes=10,
        total_steps=2 * NUM_BATCHES,
    )
    timer = EpochTimer()
    fitting = trainer(timer, precision=choose_precision("auto"))
    fitting.limit_train_batches = NUM_BATCHES
    fitting.fit(module, loader)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "rate": NUM_BATCHES * BATCH_SIZE / timer.seconds[-1],
        "data": int(status["VmData"].split()[0]) * 1024,
        "anonymous": int(status["RssAnon"].split()[0]) * 1024,
    }


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))


def in_process(folder: Path, kind: str) -> dict[str, Any] | None:
    """Train in a process of its own; `None`: its memory did not suffice.

    Args:
        kind: `mapped`, `in memory`, or `in memory, limited`.
    """
    command = [sys.executable, __file__, "--folder", str(folder), *(["--in-memory"] if kind != "mapped" else [])]
    done = subprocess.run(
        command, preexec_fn=None if kind == "in memory" else limit, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "MemoryError" in done.stderr or "Unable to allocate" in done.stderr:
        return None
    raise RuntimeError(done.stderr[-4000:])


def report(set_bytes: int, results: dict[str, list[dict[str, Any]]]) -> str:
    gib = 1 << 30
    rates = {kind: [result["rate"] for result in each] for kind, each in results.items()}
    rows = []
    for kind, each in results.items():
        data, anonymous = (max(result[name] for result in each) / gib for name in ("data", "anonymous"))
        allowed = f"{LIMIT_BYTES / gib:.2f}" if kind == "mapped" else "none"
        rows.append([kind, allowed, f"{data:.2f}", f"{anonymous:.2f}", spread(rates[kind], 0)])
    head = ["images", "limit, GiB", "peak allocated", "peak used of it", "images/s, median (range)"]
    ratios = paired(rates["mapped"], rates["in memory"])
    return "\n".join(
        [
            "# Larger than memory\n",
            f"{NUM_IMAGES:,} random images of {SIZE} × {SIZE} pixels ({set_bytes / gib:.2f} GiB), custom_cnn, batch "
            f"{BATCH_SIZE}, page cache warm;",
            f"{NUM_BATCHES * BATCH_SIZE:,} images drawn from all of them, after as many for warm-up. The limit is "
            "RLIMIT_DATA: private writable memory. An",
            "array of all images does not fit under it (tried).\n",
            conditions("torch", "lightning", "numpy") + f" {len(ratios)} rounds.\n",
            table(head, rows),
            "",
            table(["ratio, round by round", "median (range)"], [["mapped / in memory", spread(ratios, 3)]]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--in-memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        print(json.dumps(train(arguments.folder, in_memory=arguments.in_memory)))
        return
    with tempfile.TemporaryDirectory(prefix="mlpipe-bench-") as name:
        folder = Path(name)
        set_bytes = write_set(folder)
        if in_process(folder, "in memory, limited") is not None:
            raise RuntimeError("the limit holds nothing back")
        results: dict[str, list[dict[str, Any]]] = {"mapped": [], "in memory": []}
        for _ in range(arguments.rounds):
            for kind, each in results.items():
                result = in_process(folder, kind)
                if result is None:
                    raise RuntimeError(f"{kind}: the memory does not suffice")
                each.append(result)
    print(report(set_bytes, results))


if __name__ == "__main__":
    main()
