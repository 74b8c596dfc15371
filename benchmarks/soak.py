"""Many DAG runs: what becomes of them, the memory of the local stack's components, and what slows down.

    python benchmarks/soak.py --runs 1000

A stack of its own is started on free ports. Each DAG run downloads, preprocesses, compares and evaluates one linear
model of real digits, which is trained once and then reused. `AT_ONCE` DAG runs are under way at any time. Before and
after them, demo runs and what the pages of Airflow and MLflow ask for are timed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

import mlflow
import psutil
from common import conditions, spread, table
from dag import DAG_ID, DEMO, run_demo

from mlpipe.airflow_api import AirflowApi, NoAnswerError
from mlpipe.config import RunParams
from mlpipe.recipes import resolve
from mlpipe.stack.supervisor import Supervisor
from mlpipe.stack.temporary import running_stack
from mlpipe.tracking import runs
from mlpipe.tracking.dag_runs import experiment

AT_ONCE = 6
FORM = RunParams.from_mapping({"models": "logistic_regression"}).to_mapping()
POLL_SECONDS = 2.0
EVERY = 100
"""DAG runs between two samples; of fewer than 400, a quarter."""
NUM_DEMOS = 3
NUM_CALLS = 7


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
        return api.trigger(DAG_ID, FORM, run_id)
    except NoAnswerError as error:
        print(f"{run_id}: {error}", file=sys.stderr, flush=True)
        return _trigger(api, run_id)


def airflow_pages(api: AirflowApi) -> dict[str, Callable[[], object]]:
    """What Airflow's pages ask for."""
    newest = "limit=25&order_by=-run_after"

    def grid() -> None:
        api._request("GET", f"/ui/grid/structure/{DAG_ID}?{newest}")
        shown = api._request("GET", f"/ui/grid/runs/{DAG_ID}?{newest}").json()
        run_ids = "&".join(f"run_ids={quote(run['run_id'])}" for run in shown)
        api._request("GET", f"/ui/grid/ti_summaries/{DAG_ID}?{run_ids}")

    return {
        "Airflow: the DAG's page, 25 DAG runs": grid,
        "… the newest 100 DAG runs": lambda: api._request(
            "GET", f"/api/v2/dags/{DAG_ID}/dagRuns?limit=100&order_by=-run_after"
        ),
    }


def mlflow_pages() -> dict[str, Callable[[], object]]:
    """What MLflow's pages and this project's tasks ask for, about the newest demo run."""
    client, where = mlflow.MlflowClient(), [demo_experiment()]
    trained = client.search_runs(where, "tags.stage = 'train'", max_results=3)
    parent = trained[0].data.tags["mlflow.parentRunId"]
    key = trained[0].data.tags["run_key"]

    def compare() -> None:
        for run in trained:
            client.get_run(run.info.run_id)
            client.get_metric_history(run.info.run_id, "val/accuracy")

    return {
        "MLflow: the newest 100 runs": lambda: client.search_runs(where, max_results=100),
        "… ordered by a metric": lambda: client.search_runs(
            where, max_results=100, order_by=["metrics.`val/accuracy` DESC"]
        ),
        "… the runs below one parent": lambda: client.search_runs(where, f"tags.`mlflow.parentRunId` = '{parent}'"),
        "… three models and one curve side by side": compare,
        "… a task finds its run again": lambda: runs.find_run(where[0], key),
    }


def milliseconds(call: Callable[[], object]) -> list[float]:
    call()
    times = []
    for _ in range(NUM_CALLS):
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
    return times


def speed(api: AirflowApi) -> dict[str, str]:
    """Each figure by what it is of."""
    demos = [run_demo(api) for _ in range(NUM_DEMOS)]
    pages = airflow_pages(api) | mlflow_pages()
    figures = {"Demo run, seconds outside stage code": spread([demo.outside for demo in demos], 1)}
    return figures | {f"{name}, ms": spread(milliseconds(call), 0) for name, call in pages.items()}


def num_mlflow_runs() -> int:
    return len(mlflow.search_runs([demo_experiment()], output_format="list"))


def demo_experiment() -> str:
    return experiment(resolve(RunParams.from_mapping(DEMO)))


def report(
    ended: Mapping[str, int], seconds: float, samples: Mapping[int, Mapping[str, float]], figures: list[list[str]]
) -> str:
    total = sum(ended.values())
    names = next(iter(samples.values()))
    rows = [[name, *(f"{sample[name]:.0f}" for sample in samples.values())] for name in names]
    return "\n".join(
        [
            "# A soak",
            "",
            f"{conditions('apache-airflow-core', 'mlflow')} {AT_ONCE} DAG runs at once.",
            "",
            f"{ended['success']:,} of {total:,} DAG runs succeeded, {seconds / total:.1f} s each.",
            "",
            table(["MB of its own, after DAG runs", *map(str, samples)], rows),
            "",
            f"Medians (ranges) of {NUM_DEMOS} demo runs and of {NUM_CALLS} calls from a client on the same machine:",
            "",
            table(figures[0], figures[1:]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlpipe-soak-") as home, running_stack(Path(home)) as settings:
        os.environ.update(settings.client_environment())
        api = AirflowApi.from_env()
        run_demo(api)  # publishes the data set
        before, few = speed(api), num_mlflow_runs()
        began = time.monotonic()
        ended, samples = soak(api, Supervisor(settings), arguments.runs)
        seconds = time.monotonic() - began
        after, many = speed(api), num_mlflow_runs()
    head = ["", f"with {few:,} MLflow runs", f"with {many:,}, after {ended.total():,} DAG runs"]
    print(report(ended, seconds, samples, [head, *([name, before[name], after[name]] for name in before)]))


if __name__ == "__main__":
    main()
