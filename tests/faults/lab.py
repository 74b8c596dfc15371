"""A stack under test: starting DAG runs, breaking things at a given moment, and looking at what is left."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import mlflow
import numpy as np
import psutil
import requests
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from PIL import Image
from sklearn.datasets import load_digits

from mlpipe.airflow_api import AirflowApi
from mlpipe.errors import UserError
from mlpipe.stack.credentials import Credentials
from mlpipe.stack.health import Health, s3_client
from mlpipe.stack.local import DATA_BUCKET, StackSettings
from mlpipe.stack.supervisor import Supervisor
from mlpipe.training.epochs import LOGGED

DAG_ID = "image_classification"
MODEL_NAME = "digits-classifier"

AWAY = (UserError, MlflowException, requests.RequestException)
"""What looking raises while the component that is asked is down."""

TASK_OF = {"preprocess": "preprocess", "train": "custom_cnn", "evaluate": "evaluate"}
"""The task that is looked at, by stage."""
WORD_FOR = {"preprocess": "preprocessing", "train": "training", "evaluate": "evaluation"}

STARTS, HAS_ENDED = "the stage starts", "the stage has ended"
"""Lines that the DAG writes to a task's log around the stage's own code."""


@dataclass
class Table:
    """Fault, stage and what happened: the rows of docs/reliability.md."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, fault: str, stage: str, outcome: str) -> None:
        self.rows.append((fault, stage, outcome))


class Lab:
    """One running stack."""

    def __init__(self, settings: StackSettings, dag_id: str = DAG_ID) -> None:
        self.dag_id = dag_id
        environment = settings.client_environment()
        self.settings = settings
        self.api = AirflowApi(
            environment["MLPIPE_AIRFLOW_URL"],
            environment["MLPIPE_AIRFLOW_USER"],
            environment["MLPIPE_AIRFLOW_PASSWORD"],
        )
        self.mlflow = mlflow.MlflowClient(settings.mlflow_url)
        self.supervisor = Supervisor(settings)

    # -- DAG runs

    def start(self, **form: Any) -> str:
        """Trigger the DAG; returns the DAG run's id."""
        return self.api.trigger(self.dag_id, {"dataset": "digits", "retrain": True, **form})

    def cancel(self, run_id: str) -> None:
        """Set the DAG run to failed, as a person does in the UI."""
        self._airflow("PATCH", f"/dagRuns/{quote(run_id)}", {"state": "failed"})

    def clear(self, run_id: str) -> None:
        """Clear what failed, as a person does in the UI."""
        body = {"dag_run_id": run_id, "only_failed": True, "reset_dag_runs": True, "dry_run": False}
        self._airflow("POST", "/clearTaskInstances", body)

    def tasks(self, run_id: str) -> list[dict[str, Any]]:
        """Airflow's own description of each task of the DAG run."""
        return self._airflow("GET", f"/dagRuns/{quote(run_id)}/taskInstances?limit=100")["task_instances"]

    def task(self, run_id: str, name: str) -> dict[str, Any] | None:
        """The task of that id, or the training of the model of that name."""
        for row in self.tasks(run_id):
            if name in (row["task_id"], row.get("rendered_map_index")):
                return row
        return None

    def log_of(self, run_id: str, name: str, try_number: int | None = None) -> list[dict[str, Any]]:
        """Events of a task's log."""
        row = self.task(run_id, name)
        assert row is not None
        path = f"/dagRuns/{quote(run_id)}/taskInstances/{row['task_id']}/logs/{try_number or row['try_number']}"
        answer = self._airflow("GET", f"{path}?map_index={row['map_index']}&full_content=true")
        return [event for event in answer["content"] if isinstance(event, dict)]

    def events(self, run_id: str, name: str, try_number: int | None = None) -> list[str]:
        """Messages of a task's log."""
        return [str(event.get("event")) for event in self.log_of(run_id, name, try_number)]

    def events_of_all_tries(self, run_id: str, name: str) -> list[dict[str, Any]]:
        """Events of the logs of all tries of a task; none where there is no such task yet."""
        row = self.task(run_id, name)
        numbers = range(1, row["try_number"] + 1) if row else ()
        return [event for number in numbers for event in self.log_of(run_id, name, number)]

    def was_at_work(self, run_id: str, stage: str, moment: float) -> bool:
        """Whether the stage's own code ran at that moment, `time.time()`, by its task's log."""
        lines = sorted(
            (datetime.fromisoformat(event["timestamp"]).timestamp(), event["event"])
            for event in self.events_of_all_tries(run_id, TASK_OF[stage])
            if event.get("event") in (STARTS, HAS_ENDED)
        )
        return [line for at, line in lines if at <= moment][-1:] == [STARTS]

    def wait(self, run_id: str, state: str = "success", seconds: float = 900) -> None:
        """Wait until the DAG run has ended, and see that it ended so."""
        ended = until(lambda: ended_state(self.api.dag_run_state(self.dag_id, run_id)), f"the end of {run_id}", seconds)
        assert ended == state, self.story(run_id)

    def story(self, run_id: str) -> str:
        """What became of each task, for messages."""
        lines = [f"{name(row)}: {row['state']} after {row['try_number']} tries" for row in self.tasks(run_id)]
        failed = [name(row) for row in self.tasks(run_id) if row["state"] == "failed"]
        return "\n".join([*lines, *(event for each in failed for event in self.events(run_id, each)[-15:])])

    def tries(self, run_id: str) -> dict[str, int]:
        """Number of tries of each task."""
        return {name(row): row["try_number"] for row in self.tasks(run_id)}

    def wait_for_stage(self, run_id: str, stage: str) -> None:
        """Wait until the stage is at work in the midst of what it does."""
        questions: dict[str, Callable[[], Any]] = {
            "preprocess": lambda: self.was_at_work(run_id, stage, time.time()),
            "train": lambda: self.steps(run_id, "custom_cnn"),
            "evaluate": lambda: self.parent(run_id).data.tags["task_id"] == "evaluate",
        }
        until(questions[stage], f"{stage} of {run_id}", 900)

    def process_of(self, run_id: str, task: str) -> psutil.Process:
        """The process that runs the task's own code: a fork of the worker that watches over it."""
        row = self.task(run_id, task)
        assert row is not None
        mine = [process for process in self.supervisor.processes() if row["id"] in " ".join(process.cmdline())]
        ids = {process.pid for process in mine}
        return next(process for process in mine if process.ppid() in ids)

    # -- MLflow

    def runs(self, run_id: str) -> list[Run]:
        """All MLflow runs of the DAG run."""
        experiments = [experiment.experiment_id for experiment in self.mlflow.search_experiments()]
        return list(self.mlflow.search_runs(experiments, f"tags.dag_run_id = '{run_id}'"))

    def parent(self, run_id: str) -> Run:
        return next(run for run in self.runs(run_id) if run.data.tags["stage"] == "parent")

    def child(self, run_id: str, what: str) -> Run | None:
        """The run of the data (`data`) or of a model."""
        for run in self.runs(run_id):
            if what in (run.data.tags["stage"], run.data.tags.get("model")):
                return run
        return None

    def steps(self, run_id: str, model: str, metric: str = "val/accuracy") -> list[int]:
        """Steps at which the metric was written, in the order of writing."""
        run = self.child(run_id, model)
        return [entry.step for entry in self.mlflow.get_metric_history(run.info.run_id, metric)] if run else []

    def versions(self, run_id: str) -> dict[str, str]:
        """Registered versions of the DAG run's models, by model."""
        found = self.mlflow.search_model_versions(f"tags.dag_run_id = '{run_id}'")
        assert len({version.tags["model"] for version in found}) == len(found), "two versions of one model"
        return {version.tags["model"]: str(version.version) for version in found}

    def weights_sha256(self, run_id: str, model: str, folder: Path) -> str:
        """Of the network's parameters in the registered version."""
        uri = f"models:/{MODEL_NAME}/{self.versions(run_id)[model]}"
        local = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))
        (file,) = local.rglob("*.safetensors")
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def assert_nothing_lost_or_twice(self, run_id: str, models: Mapping[str, int | None]) -> None:
        """One parent, one run for the data and for each model, each finished; one version each; no metric step twice.

        Args:
            models: number of epochs by name; `None` for estimators, which have one step.
        """
        runs = self.runs(run_id)
        kinds = Counter(run.data.tags.get("model", run.data.tags["stage"]) for run in runs)
        assert kinds == Counter(["parent", "data", *models])
        assert {run.info.status for run in runs} == {"FINISHED"}
        assert self.versions(run_id).keys() == models.keys()
        for run in runs:
            for metric in run.data.metrics:
                if metric.startswith("system/"):
                    continue
                steps = [entry.step for entry in self.mlflow.get_metric_history(run.info.run_id, metric)]
                assert len(steps) == len(set(steps)), f"{run.info.run_name}: {metric} was written twice: {steps}"
        for model, epochs in models.items():
            for metric in LOGGED if epochs else ("val/accuracy",):
                steps = sorted(self.steps(run_id, model, metric))
                assert steps == list(range(1, (epochs or 1) + 1)), f"{model}: {metric} has the steps {steps}"
            assert self.steps(run_id, model, "test/accuracy") == [0]
            run = self.child(run_id, model)
            assert run is not None
            logged = self.mlflow.search_logged_models(
                [run.info.experiment_id], filter_string=f"source_run_id = '{run.info.run_id}'"
            )
            assert len(logged) == 1, f"{model} was logged {len(logged)} times"
        left = [run.info.run_id for run in runs if self.objects(f"checkpoints/{run.info.run_id}/")]
        assert not left, "checkpoints of finished trainings are left"

    # -- object store

    def objects(self, prefix: str) -> list[str]:
        client = s3_client(self.settings.client_environment())
        return [item["Key"] for item in client.list_objects_v2(Bucket=DATA_BUCKET, Prefix=prefix).get("Contents", [])]

    # -- components

    def pid(self, component: str) -> int | None:
        return next((state.pid for state in self.supervisor.states() if state.name == component and state.alive), None)

    def kill(self, component: str) -> float:
        """kill -9; the supervisor starts it again at once. Returns when it was, `time.time()`."""
        pid = self.pid(component)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        moment = time.time()
        until(lambda: self.pid(component) not in (None, pid), f"the successor of {component}", 60)
        return moment

    def take_away(self, component: str) -> float:
        """kill -9, and no successor. Returns when it was, `time.time()`."""
        pid = self.pid(component)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        moment = time.time()
        self.supervisor._rpc("stopProcess", component, True)
        assert self.pid(component) is None
        return moment

    def bring_back(self, component: str) -> None:
        since = time.time()
        self.supervisor.start_components([component])
        self.wait_healthy(component, since)

    def wait_healthy(self, component: str, since: float) -> None:
        """Wait for a sign of life that is younger than `since`, `time.time()`."""
        health = Health(self.settings, Credentials.load(self.settings.credentials_path), since)
        until(lambda: health.problem(component) is None, f"{component} in health", 120)

    def _airflow(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return self.api._call(method, f"/api/v2/dags/{self.dag_id}{path}", body)


def name(row: Mapping[str, Any]) -> str:
    """A model's name for its training, else the task's id."""
    return str(row.get("rendered_map_index") or row["task_id"])


def ended_state(state: str) -> str | None:
    return state if state in ("success", "failed") else None


def until(question: Callable[[], Any], what: str, seconds: float) -> Any:
    """Ask until the answer is true, and return it. That who is asked does not answer is no answer yet."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if answer := question():
                return answer
        except (*AWAY, StopIteration):
            pass
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)


def pack_digits(path: Path, num_images: int, num_large: int = 0) -> Path:
    """Write real digits as an archive of images.

    Args:
        num_large: so many more are of 2500 × 2500 pixels, each of which takes a core some 30 ms to decode.
    """
    digits = load_digits()

    def png(number: int, side: int) -> bytes:
        image = Image.fromarray((digits.images[number] * 15).astype(np.uint8))
        buffer = io.BytesIO()
        image.resize((side, side), Image.Resampling.NEAREST).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    large = [png(number, 2500) for number in range(10 if num_large else 0)]  # one of each class
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(num_large):
            archive.writestr(f"{digits.target[number % 10]}/large{number}.png", large[number % 10])
        for number in range(num_images):
            archive.writestr(f"{digits.target[number]}/{number}.png", png(number, 8))
    return path
