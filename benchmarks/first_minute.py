"""From a clone to the comparison: `make demo` of several commits in turn, each in a fresh clone, by phase.

    python benchmarks/first_minute.py 022113d HEAD --rounds 2

The wheels are in the operating system's cache after a round that is not counted, or after any installation before
(`--warm`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from common import conditions, spread, table

ROOT = Path(__file__).resolve().parent.parent
PORTS = {"MLPIPE_AIRFLOW_PORT": "18080", "MLPIPE_MLFLOW_PORT": "15000", "MLPIPE_S3_PORT": "18333"}
PHASES = ("installation", "stack", "DAG run", "in all", "make demo again")
MARKS = (".venv/bin/mlpipe up", ".venv/bin/mlpipe run")


def phases(commit: str) -> list[float]:
    """Seconds of each phase, in a clone that is removed afterwards.

    Raises:
        RuntimeError: `make demo` failed.
    """
    folder = Path(tempfile.mkdtemp(prefix="mlpipe-clone-"))
    environment = {name: value for name, value in os.environ.items() if name != "MLPIPE_HOME"} | PORTS
    try:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        subprocess.run(["git", "-C", str(folder), "checkout", "--quiet", commit], check=True)
        moments = [time.monotonic()]
        with subprocess.Popen(
            ["make", "demo"], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as making:
            for line in making.stdout or ():
                if line.startswith(MARKS[len(moments) - 1 : len(moments)]):
                    moments.append(time.monotonic())
        if making.returncode or len(moments) != 3:
            raise RuntimeError(f"make demo of {commit} failed")
        moments.append(time.monotonic())
        subprocess.run(["make", "demo"], cwd=folder, env=environment, check=True, capture_output=True)
        again = time.monotonic() - moments[-1]
        parts = [after - before for before, after in pairwise(moments)]
        return [*parts, moments[-1] - moments[0], again]
    finally:
        subprocess.run(["make", "down"], cwd=folder, env=environment, capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="+")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warm", action="store_true", help="count the first round, too")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found: dict[str, list[list[float]]] = {commit: [] for commit in arguments.commits}
    for number in range(arguments.rounds + (not arguments.warm)):
        for commit in arguments.commits:
            measured = phases(commit)
            if number or arguments.warm:
                found[commit].append(measured)
    print("# From a clone to the comparison\n")
    print(conditions("apache-airflow", "mlflow", "torch") + " Seconds, median (range).\n")
    rows = [
        [phase, *(spread([each[index] for each in found[commit]], 1) for commit in arguments.commits)]
        for index, phase in enumerate(PHASES)
    ]
    print(table(["phase", *arguments.commits], rows))


if __name__ == "__main__":
    main()
