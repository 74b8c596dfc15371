"""Memory of the local stack's components over many DAG runs, and what became of the runs.

    python benchmarks/soak.py --runs 1000

A stack of its own is started on free ports. Each DAG run downloads, preprocesses, compares and evaluates one linear
model of real digits, which is trained once and then reused. `AT_ONCE` DAG runs are under way at any time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from common import conditions, table

from mlpipe.airflow_api import AirflowApi, NoAnswerError
from mlpipe.config import RunParams
from mlpipe.stack.supervisor import Supervisor
from mlpipe.stack.temporary import running_stack

DAG_ID = "image_classification"
AT_ONCE = 6
FORM = {"models": "logistic_regression"}
POLL_SECONDS = 2.0
EVERY = 100
"""DAG runs between two samples; of fewer than 400, a quarter."""


def memory(supervisor: Supervisor) -> dict[str, float]:
    """MB that each component's processes share with no other process, without those that run tasks."""
    used: dict[str, float] = {}
    for state in supervisor.states():
        main = psutil.Process(state.pid)
        lasting = [main, *(child for child in main.children(recursive=True) if _is_lasting(child))]
        used[state.name] = sum(_unique_bytes(process) for process in lasting) / 1e6
    return used


def _is_lasting(process: psutil.Process) -> bool:
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return "supervisor" not in words and not ("airflow worker" in words and "<idle>" not in words)


def _unique_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().uss)
    except psutil.Error:  # it has just ended
        return 0


def soak(api: AirflowApi, supervisor: Supervisor, num_runs: int) -> tuple[Counter[str], dict[int, dict[str, float]]]:
    """States of the ended DAG runs, and memory by number of ended runs."""
    waiting: set[str] = set()
    started, ended = 0, Counter[str]()
    samples: dict[int, dict[str, float]] = {}
    every = max(1, min(EVERY, num_runs // 4))
    while ended.total() < num_runs:
        while len(waiting) < AT_ONCE and started < num_runs:
            waiting.add(_trigger(api, f"soak-{started:04}"))
            started += 1
        time.sleep(POLL_SECONDS)
        for run_id in list(waiting):
            state = api.dag_run_state(DAG_ID, run_id)
            if state in ("success", "failed"):
                waiting.remove(run_id)
                ended[state] += 1
                if ended.total() % every == 0:
                    samples[ended.total()] = memory(supervisor)
                    print(ended.total(), samples[ended.total()], file=sys.stderr, flush=True)
    return ended, samples


def _trigger(api: AirflowApi, run_id: str) -> str:
    """Start the DAG run, again where no answer came."""
    try:
        return api.trigger(DAG_ID, RunParams.from_mapping(FORM).to_mapping(), run_id)
    except NoAnswerError as error:
        print(f"{run_id}: {error}", file=sys.stderr, flush=True)
        return _trigger(api, run_id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlpipe-soak-") as home, running_stack(Path(home)) as settings:
        os.environ.update(settings.client_environment())
        began = time.monotonic()
        ended, samples = soak(AirflowApi.from_env(), Supervisor(settings), arguments.runs)
        seconds = time.monotonic() - began
    print("# A soak\n")
    print(conditions("apache-airflow-core", "mlflow"), f"{AT_ONCE} DAG runs at once.\n")
    print(f"{ended['success']} of {ended.total()} DAG runs succeeded, {seconds / ended.total():.1f} s each.\n")
    names = next(iter(samples.values()))
    rows = [[name, *(f"{sample[name]:.0f}" for sample in samples.values())] for name in names]
    print(table(["MB of its own, after DAG runs", *map(str, samples)], rows))


if __name__ == "__main__":
    main()
