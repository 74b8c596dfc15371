"""The DAG file: what it loads, how its tasks hang together, what its form asks."""

from __future__ import annotations

import json

from mlpipe.config import RunParams

from .conftest import ROOT, RunPython

DAG_FILE = ROOT / "dags" / "image_classification.py"

LOAD = f"""
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("image_classification", {str(DAG_FILE)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
dag = module.image_classification()
"""


def test_parsing_loads_nothing_that_trains_tracks_or_connects(run_python: RunPython) -> None:
    script = (
        """
import socket
def refuse(*args): raise AssertionError("the DAG file opens a connection")
import airflow.sdk
socket.socket.connect = refuse
"""
        + LOAD
        + """
heavy = {"torch", "sklearn", "mlflow", "lightning", "torchvision", "boto3", "matplotlib", "PIL"}
print(json.dumps(sorted(heavy & set(sys.modules))))
"""
    )
    assert json.loads(run_python(script).splitlines()[-1]) == []


def test_airflow_accepts_the_file_with_and_without_the_gpu_executor(run_python: RunPython) -> None:
    script = f"""
from airflow.dag_processing.dagbag import DagBag
import json
bag = DagBag({str(DAG_FILE)!r})
train = bag.dags["image_classification"].get_task("train")
print(json.dumps([bag.import_errors, train.executor, train.queue]))
"""
    plain = json.loads(run_python(script, AIRFLOW__CORE__EXECUTOR="LocalExecutor").splitlines()[-1])
    assert plain == [{}, None, "gpu"]
    both = "LocalExecutor,gpu:gpu_executor.GpuExecutor"
    leased = json.loads(run_python(script, AIRFLOW__CORE__EXECUTOR=both).splitlines()[-1])
    assert leased == [{}, "gpu", "gpu"]


def test_tasks_follow_each_other(run_python: RunPython) -> None:
    script = LOAD + "print(json.dumps({t.task_id: sorted(t.downstream_task_ids) for t in dag.tasks}))"
    assert json.loads(run_python(script).splitlines()[-1]) == {
        "download": ["preprocess"],
        "preprocess": ["train"],
        "train": ["evaluate"],
        "evaluate": [],
    }


def test_the_form_is_the_configurations(run_python: RunPython) -> None:
    script = (
        LOAD
        + """
form = {name: [param.value, {**param.schema, "description": param.description}] for name, param in dag.params.items()}
print(json.dumps(form, default=str))
"""
    )
    shown = json.loads(run_python(script).splitlines()[-1])
    for name, schema in RunParams.json_schema().items():
        default = schema.pop("default")
        assert shown[name][0] == default
        assert {key: shown[name][1][key] for key in schema} == schema
    assert set(shown) == set(RunParams.json_schema())
