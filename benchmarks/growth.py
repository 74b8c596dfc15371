"""What slows down when runs pile up: the scheduler and the pages of Airflow, the pages of MLflow.

    python benchmarks/growth.py                # on a stack of its own
    python benchmarks/growth.py --running      # on the stack that the environment names, which keeps what is made up

Demo runs and pages are timed, then 100 more DAG runs are made up, and all is timed again. A made-up DAG run is a real
one that is marked as done before it starts, with MLflow runs of its own, written by `mlpipe.tracking` as its tasks
would: one parent, one for the data, one for each of three models, with parameters and ten epochs of metrics.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import mlflow
from common import conditions, spread, table
from dag import DAG_ID, run_demo

from mlpipe.airflow_api import AirflowApi
from mlpipe.config import RunParams
from mlpipe.recipes import resolve
from mlpipe.stack.temporary import running_stack
from mlpipe.tracking import runs
from mlpipe.tracking.dag_runs import experiment, parent_run
from mlpipe.tracking.runs import TaskContext

NUM_MADE_UP = 100
NUM_DEMOS = 3
NUM_CALLS = 7
CONFIG = resolve(RunParams.from_mapping({}))
METRICS = ("train/loss", "train/accuracy", "val/loss", "val/accuracy", "learning_rate", "images_per_second",
           "system/cpu_utilization_percentage", "system/system_memory_usage_megabytes")  # fmt: skip


class Airflow:
    """Airflow's API beyond what `AirflowApi` needs, and what the user interface reads."""

    def __init__(self) -> None:
        self.api = AirflowApi.from_env()
        self.call = self.api._request

    def make_up(self, number: int) -> list[str]:
        """DAG runs that are marked as done before they start."""
        self.call("PATCH", f"/api/v2/dags/{DAG_ID}", {"is_paused": True})
        made_up = [self.api.trigger(DAG_ID, RunParams.from_mapping({}).to_mapping()) for _ in range(number)]
        for run_id in made_up:
            self.call("PATCH", f"/api/v2/dags/{DAG_ID}/dagRuns/{quote(run_id)}", {"state": "success"})
        self.call("PATCH", f"/api/v2/dags/{DAG_ID}", {"is_paused": False})
        return made_up

    def grid(self) -> None:
        """What the DAG's page asks for: its structure, its newest runs, their tasks."""
        newest = "limit=25&order_by=-run_after"
        self.call("GET", f"/ui/grid/structure/{DAG_ID}?{newest}")
        shown = self.call("GET", f"/ui/grid/runs/{DAG_ID}?{newest}").json()
        run_ids = "&".join(f"run_ids={quote(run['run_id'])}" for run in shown)
        self.call("GET", f"/ui/grid/ti_summaries/{DAG_ID}?{run_ids}")

    def listed(self) -> None:
        """The newest 100 DAG runs."""
        self.call("GET", f"/api/v2/dags/{DAG_ID}/dagRuns?limit=100&order_by=-run_after")


def write_runs(run_id: str) -> None:
    """The MLflow runs of one DAG run."""
    origin = TaskContext(dag_id=DAG_ID, dag_run_id=run_id, task_id="growth")
    parent = parent_run(CONFIG, origin)
    for part in ("data", *(model.name for model in CONFIG.models)):
        tags = {**origin.tags(), "stage": "data" if part == "data" else "train"}
        run = runs.open_run(
            experiment(CONFIG), origin.key(part), name=part, tags=tags, description="", parent_run_id=parent.info.run_id
        )
        with runs.active(run) as tracked:
            tracked.log_params({f"param_{i}": i for i in range(25)})
            if part != "data":
                for epoch in range(1, 11):
                    tracked.log_metrics(dict.fromkeys(METRICS, epoch / 10), step=epoch)
    mlflow.MlflowClient().set_terminated(parent.info.run_id)


def mlflow_pages(dag_run_id: str) -> dict[str, Callable[[], object]]:
    """What MLflow's pages and our tasks ask for."""
    client, where = mlflow.MlflowClient(), [experiment(CONFIG)]
    origin = TaskContext(dag_id=DAG_ID, dag_run_id=dag_run_id, task_id="growth")
    parent = runs.find_run(where[0], origin.key("parent"))
    if parent is None:
        raise RuntimeError(f"{dag_run_id} has no MLflow run")
    below = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    models = [run.info.run_id for run in client.search_runs(where, below) if run.data.metrics]

    def compare() -> None:
        for run_id in models:
            client.get_run(run_id)
            client.get_metric_history(run_id, "val/accuracy")

    return {
        "MLflow: the newest 100 runs": lambda: client.search_runs(where, max_results=100),
        "… ordered by a metric": lambda: client.search_runs(
            where, max_results=100, order_by=["metrics.`val/accuracy` DESC"]
        ),
        "… the runs below one parent": lambda: client.search_runs(where, below),
        "… three models and one curve side by side": compare,
        "… a task finds its run again": lambda: runs.find_run(where[0], origin.key("custom_cnn")),
    }


def milliseconds(call: Callable[[], object]) -> list[float]:
    call()
    times = []
    for _ in range(NUM_CALLS):
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
    return times


def timed(airflow: Airflow) -> tuple[dict[str, str], int]:
    """Each figure by what it is of, and how many MLflow runs there are."""
    demos = [run_demo(airflow.api) for _ in range(NUM_DEMOS)]
    newest = airflow.call("GET", f"/api/v2/dags/{DAG_ID}/dagRuns?limit=1&order_by=-run_after").json()
    pages = mlflow_pages(newest["dag_runs"][0]["dag_run_id"])
    shown = {"Airflow: the DAG's page, 25 runs": airflow.grid, "… the newest 100 runs": airflow.listed, **pages}
    figures = {"Demo run, seconds outside stage code": spread([demo.outside for demo in demos], 1)}
    figures |= {f"{name}, ms": spread(milliseconds(call), 0) for name, call in shown.items()}
    return figures, len(mlflow.MlflowClient().search_runs([experiment(CONFIG)], max_results=10_000))


@contextlib.contextmanager
def own_stack() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="mlpipe-bench-") as home, running_stack(Path(home)) as settings:
        os.environ.update(settings.client_environment())
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", action="store_true", help="use the stack that the environment names")
    running = parser.parse_args().running
    with contextlib.nullcontext() if running else own_stack():
        airflow = Airflow()
        run_demo(airflow.api)  # publishes the data set
        before, few = timed(airflow)
        seconds = []
        for run_id in airflow.make_up(NUM_MADE_UP):
            began = time.perf_counter()
            write_runs(run_id)
            seconds.append(time.perf_counter() - began)
        after, many = timed(airflow)
    print("# When runs pile up\n")
    print(f"Medians (ranges) of {NUM_DEMOS} demo runs and of {NUM_CALLS} calls, from a client on the same machine.\n")
    print(conditions("apache-airflow-core", "mlflow") + "\n")
    head = ["", f"with {few} MLflow runs", f"after {NUM_MADE_UP} more DAG runs, with {many}"]
    print(table(head, [[name, before[name], after[name]] for name in before]) + "\n")
    print(f"Writing the five MLflow runs of one DAG run took {statistics.median(seconds):.1f} s.")


if __name__ == "__main__":
    main()
