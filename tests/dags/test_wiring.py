"""The DAG file: what it loads, how its tasks hang together, what its form asks."""

from __future__ import annotations

import json

import pytest

from mlpipe.config import RunParams
from mlpipe.search.form import TuneParams

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


ENGINES = {
    "LocalExecutor": [None, None],
    "LocalExecutor,gpu:gpu_executor.GpuExecutor": ["gpu", None],
    "CeleryExecutor": [None, None],
    "KubernetesExecutor": [None, None],
    "CeleryExecutor,gpu:KubernetesExecutor": ["gpu", "gpu"],
}
"""By `[core] executor`: the executors that `train` and `evaluate` ask for."""


@pytest.mark.parametrize("engine", ENGINES)
def test_airflow_accepts_the_file_under_every_engine(engine: str, run_python: RunPython) -> None:
    script = f"""
from airflow.dag_processing.dagbag import DagBag
from airflow.executors.executor_loader import ExecutorLoader
from airflow.serialization.serialized_objects import DagSerialization
import json, sys
bag = DagBag({str(DAG_FILE)!r})
parsed_with_kubernetes = "kubernetes.client" in sys.modules
for name in ExecutorLoader.get_executor_names():
    ExecutorLoader.import_executor_cls(name)
dag = bag.dags["image_classification"]
tasks = [DagSerialization.from_dict(DagSerialization.to_dict(dag)).get_task(name) for name in ("train", "evaluate")]
pods = [task.executor_config["pod_override"] for task in tasks if task.executor_config]
print(json.dumps({{
    "errors": bag.import_errors,
    "executors": [task.executor for task in tasks],
    "queues": [dag.get_task(name).queue for name in ("download", "preprocess", "train", "evaluate")],
    "images": [pod.spec.containers[0].image for pod in pods],
    "limits": [sorted(pod.spec.containers[0].resources.limits) for pod in pods],
    "kubernetes": parsed_with_kubernetes,
}}))
"""
    pods = "Kubernetes" in engine
    image = {"AIRFLOW__TRAINING_POD__IMAGE": "training:1"} if pods else {}
    found = json.loads(run_python(script, AIRFLOW__CORE__EXECUTOR=engine, **image).splitlines()[-1])
    assert found == {
        "errors": {},
        "executors": ENGINES[engine],
        "queues": ["default", "default", "gpu", "default" if pods else "gpu"],
        "images": ["training:1"] * 2 if pods else [],
        "limits": [["memory", "nvidia.com/gpu"], ["memory"]] if pods else [],
        "kubernetes": pods,
    }


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


def test_the_search_is_a_dag_of_its_own(run_python: RunPython) -> None:
    script = f"""
import json
from airflow.dag_processing.dagbag import DagBag
bag = DagBag({str(ROOT / "dags")!r})
dag = bag.dags["tune"]
form = {{name: param.value for name, param in dag.params.items()}}
tasks = {{t.task_id: sorted(t.downstream_task_ids) for t in dag.tasks}}
print(json.dumps([bag.import_errors, sorted(bag.dags), tasks, form]))
"""
    errors, dags, tasks, form = json.loads(run_python(script).splitlines()[-1])
    assert errors == {}
    assert dags == ["image_classification", "tune"]
    assert tasks == {
        "download": ["preprocess"],
        "preprocess": ["search"],
        "search": ["conclude"],
        "conclude": ["train"],
        "train": ["evaluate"],
        "evaluate": [],
    }
    assert form == {name: schema["default"] for name, schema in TuneParams.json_schema().items()}
