"""This project's reader of zips against Python's zipfile: what the second costs that the first spares.

    python benchmarks/zip_reader.py cifar10-images.zip

Both list the archive and read every image in one thread; then both decode them to 32 × 32 arrays by as many threads as
there are processors, which is what preparing a data set does with them.
"""

from __future__ import annotations

import argparse
import os
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
from common import conditions, paired, spread, table

from mlpipe.data.archives.archive import open_archive
from mlpipe.data.archives.decode import decode_image

RUN = 1024
Run = Callable[[], list[bytes | memoryview]]


@contextmanager
def ours(path: Path) -> Iterator[list[Run]]:
    with open_archive(path) as archive:
        yield [lambda packed=packed: list(packed.read()) for packed in archive.stream(RUN, 16 << 20)]  # type: ignore[misc]


@contextmanager
def python(path: Path) -> Iterator[list[Run]]:
    with zipfile.ZipFile(path) as archive:
        names = [member.filename for member in archive.infolist() if not member.is_dir()]
        parts = [names[start : start + RUN] for start in range(0, len(names), RUN)]
        yield [lambda part=part: [archive.read(name) for name in part] for part in parts]  # type: ignore[misc]


def read(run: Run) -> None:
    run()


def decode(run: Run) -> None:
    target = np.empty((32, 32, 3), np.uint8)
    for content in run():
        decode_image(content, target, Counter())


def seconds(archive: AbstractContextManager[list[Run]], work: Callable[[Run], None], num_threads: int) -> float:
    began = time.perf_counter()
    with archive as runs, ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, runs))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for work, doing, num_threads in ((read, "read", 1), (decode, "read and decode", os.cpu_count() or 1)):
            for reader in (ours, python):
                took = seconds(reader(arguments.archive), work, num_threads)
                times.setdefault(f"{doing}, {reader.__name__}", []).append(took)
    rows = [[name, spread(each, 2)] for name, each in times.items()]
    ratios = [
        [doing, spread(paired(times[f"{doing}, ours"], times[f"{doing}, python"]), 2)]
        for doing in ("read", "read and decode")
    ]
    print("# Reading zips\n")
    print(conditions("numpy", "simplejpeg"), f"{arguments.rounds} rounds.\n")
    print(table(["way", "s, median (range)"], rows), "", table(["ours / zipfile", "median (range)"], ratios), sep="\n")


if __name__ == "__main__":
    main()
