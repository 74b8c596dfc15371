"""`python -m mlpipe.training.follower FOLDER RANK`: one of the processes that train one network together.

`mlpipe.training.devices` starts it, and it never outlives the process that did.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from pathlib import Path

import torch

from mlpipe.models.portable import load_function
from mlpipe.training.devices import CODE_FILE, FIT_FILE, RESUMED_FILE, process_group, ready_key, rendezvous
from mlpipe.training.epochs import EpochCallback
from mlpipe.training.fitting import Fit, run_trainer


def follow(folder: Path, rank: int) -> None:
    """Train as process `rank`, from 1, of the training that the folder describes."""
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)  # a teacher among what is read goes there
    load_function((folder / CODE_FILE).read_text(encoding="utf-8"))
    # Written by the process that started this one, into a folder of its user alone.
    fit: Fit = torch.load(folder / FIT_FILE, weights_only=False)
    config, resumed = fit.module.train_config, folder / RESUMED_FILE
    torch.set_num_threads(fit.num_threads)
    epochs = EpochCallback(
        fit.training.shard(rank, config.num_devices),
        seed=config.seed,
        resumed=torch.load(resumed, map_location="cpu", weights_only=True) if resumed.exists() else None,
    )
    store = rendezvous(folder, config.num_devices)
    store.set(ready_key(rank), "1")
    with process_group(store, rank, config.num_devices):
        run_trainer(fit, epochs, rank)


def _end_with_the_starter() -> None:
    """Standard input is a pipe from the process that started this one; its end closes with that process."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    try:
        follow(Path(sys.argv[1]), int(sys.argv[2]))
    except BaseException:  # noqa: BLE001 - ends the process
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # at once: the others wait, and what is left to tear down may wait for them
