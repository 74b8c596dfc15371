"""The links to MLflow as Airflow's API gives them to its pages, on a private Airflow with a real DAG run."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import CREATE_DATABASE, PLUGINS, RunAirflow, answer_of

DAG = """
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import dag, get_current_context, task

@dag(schedule=None)
def linked():
    @task
    def tracked():
        from airflow.utils.session import create_session
        from mlflow_links import LINKS

        ti = get_current_context()["ti"]
        ti.xcom_push(key=LINKS["MLflow run"], value="http://127.0.0.1:5000/#/experiments/1/runs/abc")
        with open({seen!r}, "w") as file:  # while the task still runs
            file.write(__import__("links_seen").of("tracked", -1))

    @task
    def mapped(run: str):
        get_current_context()["ti"].xcom_push(key="mlflow_run_url", value=f"https://mlflow/runs/{{run}}")

    @task
    def unsafe():
        get_current_context()["ti"].xcom_push(key="mlflow_run_url", value="javascript:alert(1)")

    @task
    def untracked():
        pass

    tracked() >> mapped.expand(run=["one", "two"]) >> unsafe() >> untracked() >> EmptyOperator(task_id="empty")

linked_dag = linked()
if __name__ == "__main__":
    linked_dag.test()
"""

LINKS_SEEN = """
import json
from sqlalchemy import select
from airflow.api_fastapi.core_api.routes.public.extra_links import get_extra_links
from airflow.models.dagbag import DBDagBag
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow.utils.session import create_session

def of(task_id, map_index):
    "What the API server's route for the buttons answers, with the task's state."
    with create_session() as session:
        run_id = session.scalar(select(DagRun.run_id).where(DagRun.dag_id == "linked"))
        where = TaskInstance.dag_id == "linked", TaskInstance.task_id == task_id, TaskInstance.map_index == map_index
        state = session.scalar(select(TaskInstance.state).where(*where))
        answer = get_extra_links("linked", run_id, task_id, session, DBDagBag(), map_index)
        return json.dumps({"links": answer.extra_links, "state": state})
"""

ASK = """
import json
from airflow.api_fastapi.core_api.datamodels.plugins import PluginResponse
from airflow.plugins_manager import get_plugin_info
import links_seen
tasks = [("tracked", -1), ("mapped", 0), ("mapped", 1), ("unsafe", -1), ("untracked", -1), ("empty", -1)]
plugin = next(PluginResponse.model_validate(info) for info in get_plugin_info() if info["name"] == "mlflow_links")
answer = {f"{task} {index}": json.loads(links_seen.of(task, index)) for task, index in tasks}
print("RESULT " + json.dumps({"tasks": answer, "plugin": plugin.model_dump(mode="json")}))
"""


def test_buttons_of_a_real_dag_run(run_airflow: RunAirflow, tmp_path: Path) -> None:
    seen = tmp_path / "seen.json"
    (tmp_path / "dags").mkdir()
    (tmp_path / "dags" / "linked.py").write_text(DAG.format(seen=str(seen)))
    (tmp_path / "links_seen.py").write_text(LINKS_SEEN)
    environment = {
        "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path / "dags"),
        "PYTHONPATH": f"{PLUGINS}:{tmp_path}",
        "MLFLOW_TRACKING_URI": "http://someone:secret@127.0.0.1:5000",
    }
    run_airflow("-c", CREATE_DATABASE, **environment)
    log = run_airflow(str(tmp_path / "dags" / "linked.py"), **environment)
    result = answer_of(run_airflow("-c", ASK, **environment))

    assert json.loads(seen.read_text()) == {
        "links": {
            "MLflow run": "http://127.0.0.1:5000/#/experiments/1/runs/abc",
            "Comparison": None,
            "Champion": None,
        },
        "state": "running",
    }
    assert {name: task["links"]["MLflow run"] for name, task in result["tasks"].items()} == {
        "tracked -1": "http://127.0.0.1:5000/#/experiments/1/runs/abc",
        "mapped 0": "https://mlflow/runs/one",
        "mapped 1": "https://mlflow/runs/two",
        "unsafe -1": None,  # the page shows no button
        "untracked -1": None,
        "empty -1": None,
    }
    assert {task["state"] for task in result["tasks"].values()} == {"success"}
    assert "Failed to push an xcom for task operator extra link" not in log


def test_the_link_survives_serialization(run_airflow: RunAirflow) -> None:
    script = """
import json
from airflow.sdk import DAG, task
from airflow.serialization.serialized_objects import DagSerialization
with DAG("d", schedule=None) as dag:
    @task
    def plain(): ...
    @task
    def mapped(x): ...
    plain()
    mapped.expand(x=[1])
again = DagSerialization.from_json(DagSerialization.to_json(dag))
print("RESULT " + json.dumps({name: list(again.get_task(name).extra_links) for name in ("plain", "mapped")}))
"""
    links = ["Champion", "Comparison", "MLflow run"]
    assert answer_of(run_airflow("-c", script)) == {"plain": links, "mapped": links}


def test_mlflow_is_where_the_environment_says_and_nothing_large_is_loaded(run_airflow: RunAirflow) -> None:
    local, public = "http://mlflow:5000", "https://mlflow.example/ui"
    cases: list[tuple[dict[str, str], str | None]] = [
        ({}, None),
        ({"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}, None),
        ({"MLFLOW_TRACKING_URI": "http://someone:secret@mlflow:5000"}, local),
        ({"MLFLOW_TRACKING_URI": local, "MLPIPE_MLFLOW_UI_URL": f"{public}/"}, public),
        ({"MLPIPE_MLFLOW_UI_URL": "https://someone:se/cret@mlflow.example/ui"}, public),
    ]
    script = f"""
import json, os, sys
from airflow import plugins_manager
plugins_manager.ensure_plugins_loaded()
from mlflow_links import mlflow_ui_url
answers = []
for environment in {[environment for environment, _ in cases]!r}:  # the plugin is loaded before they are set
    os.environ.update(environment)
    answers.append(mlflow_ui_url())
heavy = sorted({{"mlflow", "torch", "numpy", "matplotlib", "optuna"}} & set(sys.modules))
print("RESULT " + json.dumps([answers, heavy]))
"""
    assert answer_of(run_airflow("-c", script)) == [[url for _, url in cases], []]
