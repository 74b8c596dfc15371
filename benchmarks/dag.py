"""What the workflow costs beside its work: seconds of a demo run outside stage code, and parsing the DAG file.

    python benchmarks/dag.py

A stack of its own is started on free ports for as long as this takes. A stage's code runs from the log line "the stage
starts" of its task to "the stage has ended": the call of the one function of `mlpipe.stages`. The rest of a run is what
is left of the time from the trigger's request to the DAG run's end without the union of these intervals: scheduling,
starting processes, and the imports in them. No model of an earlier round is reused.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from common import conditions, in_fresh_process, spread, table

from mlpipe.airflow_api import AirflowApi, TaskInstance
from mlpipe.config import RunParams
from mlpipe.stack.temporary import running_stack

DAG_ID = "image_classification"
DAG_FILE = Path(__file__).parents[1] / "dags" / "image_classification.py"
GAPS = ("trigger to download", "to preprocess", "to the first training", "to evaluate", "to done")
STAGES = ("download", "preprocess", "train", "evaluate")
DEMO = RunParams.from_mapping({"retrain": True}).to_mapping()


class Interval(NamedTuple):
    """Seconds since the epoch."""

    start: float
    end: float


class Demo(NamedTuple):
    """One DAG run, seconds."""

    total: float
    stages: float
    """In which at least one stage's code ran."""
    code: dict[str, float]
    """Of each task."""
    gaps: tuple[float, ...]
    """Between these, from the trigger to the end."""
    starting: float
    """Of the gaps: from a task's start to its stage's code, where nothing else ran."""

    @property
    def outside(self) -> float:
        return self.total - self.stages


def union(intervals: Sequence[Interval]) -> list[Interval]:
    """Disjoint intervals that cover the same."""
    merged: list[Interval] = []
    for each in sorted(intervals):
        if merged and each.start <= merged[-1].end:
            merged[-1] = Interval(merged[-1].start, max(merged[-1].end, each.end))
        else:
            merged.append(each)
    return merged


def stage_interval(api: AirflowApi, run_id: str, task: TaskInstance) -> Interval:
    """When the stage's own code ran, by the task's log."""
    moments = {event["event"]: event["timestamp"] for event in api.log(DAG_ID, run_id, task) if "timestamp" in event}
    start, end = (
        datetime.fromisoformat(moments[line]).timestamp() for line in ("the stage starts", "the stage has ended")
    )
    return Interval(start, end)


def run_demo(api: AirflowApi) -> Demo:
    """Trigger the DAG and wait."""
    triggered = time.time()
    run_id = api.trigger(DAG_ID, DEMO)
    while (run := api.dag_run(DAG_ID, run_id))["state"] not in ("success", "failed"):
        time.sleep(1)  # each question costs the server what it would rather do for the run
    if run["state"] != "success":
        raise RuntimeError(f"the DAG run {run_id} failed")
    whole = Interval(triggered, datetime.fromisoformat(run["end_date"]).timestamp())
    tasks = api.task_instances(DAG_ID, run_id)
    code = {task.label: stage_interval(api, run_id, task) for task in tasks}
    covered = union(list(code.values()))
    edges = [whole.start, *(edge for part in covered for edge in part), whole.end]
    gaps = [Interval(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    starting = union(
        [
            Interval(max(gap.start, task.started.timestamp()), code[task.label].start)
            for task in tasks
            for gap in gaps
            if task.started and code[task.label].start == gap.end
        ]
    )
    return Demo(
        total=whole.end - whole.start,
        stages=sum(part.end - part.start for part in covered),
        code={label: part.end - part.start for label, part in code.items()},
        gaps=tuple(gap.end - gap.start for gap in gaps),
        starting=sum(part.end - part.start for part in starting),
    )


_PARSE = f"""
import json, sys, time
sys.path.append({str(DAG_FILE.parent)!r})  # as Airflow does
began = time.perf_counter()
import airflow, airflow.sdk
from airflow.sdk import Asset, AssetAlias, ExceptionRetryPolicy, Param, dag, get_current_context, task
from airflow.sdk.configuration import conf
imported = time.perf_counter()
exec(compile(open({str(DAG_FILE)!r}).read(), "dag", "exec"), {{"__name__": "dag_file"}})
print(json.dumps([imported - began, time.perf_counter() - imported]))
"""

_IMPORT = """
import time
import airflow.sdk, mlpipe.recipes
began = time.perf_counter()
import mlpipe.stages.{0}
print(time.perf_counter() - began)
"""


def parse_times(rounds: int) -> str:
    """Seconds of importing Airflow and of the DAG file after it, in fresh interpreters."""
    with tempfile.TemporaryDirectory() as home:
        environment = {"AIRFLOW_HOME": home, "AIRFLOW__CORE__LOAD_EXAMPLES": "false"}
        in_fresh_process(_PARSE, environment)  # writes its configuration
        times = [json.loads(in_fresh_process(_PARSE, environment).splitlines()[-1]) for _ in range(rounds)]
        imports = {
            name: [float(in_fresh_process(_IMPORT.format(name), environment).splitlines()[-1]) for _ in range(3)]
            for name in STAGES
        }
    airflow, file = zip(*times, strict=True)
    rows = [["`import airflow.sdk`", spread(airflow, 2)], ["`dags/image_classification.py` after it", spread(file, 3)]]
    rows += [[f"`import mlpipe.stages.{name}`, only in its task", spread(imports[name], 2)] for name in STAGES]
    return table(["in a fresh interpreter", "s, median (range)"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="mlpipe-bench-") as home, running_stack(Path(home)) as settings:
        os.environ.update(settings.client_environment())
        api = AirflowApi.from_env()
        demos = [run_demo(api) for _ in range(rounds)]
    rows = [
        ["trigger to done", spread([demo.total for demo in demos], 1)],
        ["stage code", spread([demo.stages for demo in demos], 1)],
        *([f"… of {label}", spread([demo.code[label] for demo in demos], 1)] for label in demos[0].code),
        ["**outside stage code**", spread([demo.outside for demo in demos], 1)],
        ["… of it from a task's start to its stage (imports)", spread([demo.starting for demo in demos], 1)],
    ]
    if {len(demo.gaps) for demo in demos} == {len(GAPS)}:
        gaps = zip(*(demo.gaps for demo in demos), strict=True)
        rows += [[f"… {name}", spread(gap, 1)] for name, gap in zip(GAPS, gaps, strict=True)]
    print("# Workflow overhead\n")
    print("Demo run (recipe `quick` on digits) on the local stack, from the trigger's request to the DAG run's end.")
    print("Outside stage code: no function of `mlpipe.stages` runs. Consecutive rounds on one stack.\n")
    print(conditions("apache-airflow-core", "apache-airflow-task-sdk", "mlflow"), f"{rounds} rounds.\n")
    print(table(["demo run", "s, median (range)"], rows) + "\n")
    print(parse_times(2 * rounds + 1))


if __name__ == "__main__":
    main()
