"""What the benchmarks share."""

from __future__ import annotations

import io
import os
import platform
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlpipe.training.cpu.processor import cpu_name


def read_images(archive: Path, part: str, count: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images of `<part>/<class>/…` in a zip, all or `count` spread over all classes: (N, H, W, 3) and labels (N,)."""
    with zipfile.ZipFile(archive) as opened:
        names = [name for name in opened.namelist() if name.startswith(f"{part}/") and not name.endswith("/")]
        classes = sorted({name.split("/")[1] for name in names})
        if count is not None:
            names = names[:: max(1, len(names) // count)][:count]
        images = [np.asarray(Image.open(io.BytesIO(opened.read(name))).convert("RGB")) for name in names]
        labels = [classes.index(name.split("/")[1]) for name in names]
    return np.stack(images), np.array(labels, np.int64)


class Logged:
    """Stands where a training logs to MLflow, and keeps what is logged of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def log_metrics(self, metrics: Any, step: int) -> None:  # noqa: ARG002
        self.epochs.append(dict(metrics))

    def log_params(self, params: Any) -> None:
        """Of no interest here."""

    def ensure_current(self) -> None:
        """There is one attempt."""

    def last_logged_step(self, metric: str) -> int:  # noqa: ARG002
        return 0


def restrict_to_avx2() -> None:
    """Let PyTorch compute as on a processor without AVX-512 and bfloat16; to be called before its first operation."""
    os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def spread(values: Sequence[float], digits: int) -> str:
    """Median and range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Ratios round by round: what disturbs a whole round disturbs both."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def conditions(*packages: str, seed: int = 0) -> str:
    """Date, machine, versions of what is measured, and seed, in a line."""
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return (
        f"{datetime.now(UTC):%Y-%m-%d}; {platform.machine()} {cpu_name()}, {os.cpu_count()} cores; "
        f"Python {platform.python_version()}, {versions}; seed {seed}."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_fresh_process(code: str, environment: Mapping[str, str] | None = None) -> str:
    """What Python code prints in an interpreter of its own.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return done.stdout
