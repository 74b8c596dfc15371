"""The stack as containers: two real runs against it from outside, and what must not be seen or done from there."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import requests

from mlpipe.airflow_api import AirflowApi, TaskInstance
from mlpipe.config import RunParams
from tests.stack_fixtures import strangers_champion

from .conftest import ROOT, ComposeStack, run

pytestmark = [pytest.mark.compose, pytest.mark.timeout(5400)]

log = logging.getLogger(__name__)

MlpipeRun = Callable[..., dict[str, Any]]
AirflowGet = Callable[[str], Any]

DAG_ID = "image_classification"
NUM_AT_ONCE = 16
STARTS = "the stage starts"

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@contextmanager
def peak_memory(stack: ComposeStack, title: str) -> Iterator[None]:
    """Log the most memory that each service, and all of them at one moment, had while the block ran."""
    peaks: dict[str, float] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            now = stack.memory()
            for name, used in {**now, "all": sum(now.values())}.items():
                peaks[name] = max(peaks.get(name, 0.0), used)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        log.info("memory %s, MiB: %s", title, {name: round(used) for name, used in sorted(peaks.items())})


@pytest.fixture(scope="module")
def demo(stack: ComposeStack, mlpipe: MlpipeRun) -> dict[str, Any]:
    """Result of one run with an empty form."""
    log.info("all services are healthy after %.0f s", stack.up_seconds)
    used = stack.memory()
    log.info("memory at rest, MiB: %s", {"all": round(sum(used.values())), **{n: round(u) for n, u in used.items()}})
    with peak_memory(stack, "at most during the demo"):
        result = mlpipe()
    log.info("demo: %.0f s, tasks %s", result["wall_seconds"], result["task_seconds"])
    return result


@pytest.fixture(scope="module")
def cifar10(mlpipe: MlpipeRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Result of a short run on an archive of this machine: MLPIPE_CIFAR10_ARCHIVE, or a small one of noise."""
    path = os.environ.get("MLPIPE_CIFAR10_ARCHIVE") or noise_zip(tmp_path_factory.mktemp("data") / "small.zip")
    data = ("--dataset", "cifar10", "--data-uri", str(path))
    result = mlpipe(*data, "--models", "custom_cnn,logistic_regression", "--epochs", "1", timeout=1800)
    log.info("CIFAR-10 (%s): %.0f s, tasks %s", path, result["wall_seconds"], result["task_seconds"])
    return result


@pytest.fixture(scope="module")
def api(stack: ComposeStack) -> AirflowApi:
    return AirflowApi.from_env(stack.environment)


def until(condition: Callable[[], Any], seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "did not happen in time"
        time.sleep(1)


def noise_zip(path: Path) -> Path:
    """Ten classes of 80 images, each class of a brightness of its own."""
    from PIL import Image

    random = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for index, name in enumerate(CIFAR10):
            for number in range(80):
                pixels = random.integers(25 * index, 25 * index + 25, (32, 32, 3), np.uint8)
                file = BytesIO()
                Image.fromarray(pixels).save(file, "PNG")
                archive.writestr(f"{'train' if number < 60 else 'test'}/{name}/{number}.png", file.getvalue())
    return path


def test_the_demo_compares_three_models(demo: dict[str, Any]) -> None:
    assert demo["state"] == "success"
    assert {model["name"] for model in demo["models"]} == {"custom_cnn", "logistic_regression", "resnet18"}
    assert all(model["metrics"]["test/accuracy"] > 0.9 for model in demo["models"])
    assert demo["champion"]["name"] == "digits-classifier"


def test_a_local_archive_reaches_the_workers(cifar10: dict[str, Any]) -> None:
    assert cifar10["state"] == "success"
    assert cifar10["dataset"]["classes"] == list(CIFAR10)
    assert {model["name"] for model in cifar10["models"]} == {"custom_cnn", "logistic_regression"}


def test_tasks_ran_in_the_containers_of_their_queues(
    demo: dict[str, Any], stack: ComposeStack, airflow_get: AirflowGet
) -> None:
    rows = airflow_get(f"/dags/image_classification/dagRuns/{quote(demo['dag_run_id'], safe='')}/taskInstances")
    containers = stack.containers()
    hosts = {service: row["Config"]["Hostname"] for service, row in containers.items()}
    ran_on = {(row["task_id"], row["hostname"]) for row in rows["task_instances"]}
    assert ran_on == {
        ("download", hosts["worker"]),
        ("preprocess", hosts["worker"]),
        ("train", hosts["worker-gpu"]),
        ("evaluate", hosts["worker-gpu"]),
    }


def test_logs_of_both_workers_can_be_read(demo: dict[str, Any], airflow_get: AirflowGet) -> None:
    tasks = f"/dags/image_classification/dagRuns/{quote(demo['dag_run_id'], safe='')}/taskInstances"
    for task, map_index in (("download", -1), ("train", 0)):
        lines = airflow_get(f"{tasks}/{task}/logs/1?map_index={map_index}&full_content=true")["content"]
        assert any(STARTS in str(line) for line in lines)


def test_a_stranger_loads_the_champion(demo: dict[str, Any], stack: ComposeStack, tmp_path: Path) -> None:
    assert strangers_champion(stack.environment, tmp_path)["accuracy"] > 0.9
    assert demo["champion"]


def test_the_champions_run_names_the_commit_of_its_image(demo: dict[str, Any], stack: ComposeStack) -> None:
    def ask(path: str, **query: str) -> dict[str, Any]:
        login = (stack.environment["MLFLOW_TRACKING_USERNAME"], stack.environment["MLFLOW_TRACKING_PASSWORD"])
        url = f"{stack.environment['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/{path}"
        answer = requests.get(url, params=query, auth=login, timeout=30)
        answer.raise_for_status()
        return answer.json()

    champion = ask("model-versions/get", name=demo["champion"]["name"], version=demo["champion"]["version"])
    run = ask("runs/get", run_id=champion["model_version"]["run_id"])["run"]
    tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
    assert tags["git_sha"] == stack.settings["GIT_SHA"]


def test_anonymous_callers_change_and_read_nothing(stack: ComposeStack) -> None:
    airflow, mlflow = stack.environment["MLPIPE_AIRFLOW_URL"], stack.environment["MLFLOW_TRACKING_URI"]
    body = {"logical_date": None, "conf": {}}
    trigger = f"{airflow}/api/v2/dags/image_classification/dagRuns"
    assert requests.post(trigger, json=body, timeout=30).status_code == 401
    assert requests.get(f"{airflow}/api/v2/dags", timeout=30).status_code == 401
    login = {"username": stack.environment["MLPIPE_AIRFLOW_USER"], "password": "wrong"}
    assert requests.post(f"{airflow}/auth/token", json=login, timeout=30).status_code == 401
    api = f"{mlflow}/api/2.0/mlflow"
    assert requests.post(f"{api}/experiments/create", json={"name": "x"}, timeout=30).status_code == 401
    assert requests.get(f"{api}/experiments/search?max_results=1", timeout=30).status_code == 401
    upload = f"{mlflow}/api/2.0/mlflow-artifacts/artifacts/uploads/x"
    assert requests.put(upload, data=b"x", timeout=30).status_code == 401
    assert requests.get(mlflow, auth=("admin", "password1234"), timeout=30).status_code == 401


def test_mlflow_refuses_hosts_that_nobody_named(stack: ComposeStack) -> None:
    url = stack.environment["MLFLOW_TRACKING_URI"]
    answer = requests.get(f"{url}/api/2.0/mlflow/experiments/search", headers={"Host": "attacker.example"}, timeout=30)
    assert answer.status_code == 403


def test_only_the_two_interfaces_are_published_and_on_loopback(stack: ComposeStack) -> None:
    published = {
        (service, binding["HostIp"], binding["HostPort"])
        for service, row in stack.containers().items()
        for bindings in row["NetworkSettings"]["Ports"].values()
        for binding in bindings or []
    }
    assert published == {
        ("api-server", "127.0.0.1", stack.settings["MLPIPE_AIRFLOW_PORT"]),
        ("mlflow", "127.0.0.1", stack.settings["MLPIPE_MLFLOW_PORT"]),
    }


def test_no_command_shows_a_secret(stack: ComposeStack) -> None:
    example = (ROOT / ".env.example").read_text().splitlines()
    secrets = {stack.settings[line[:-1]] for line in example if line.endswith("=")}
    assert len(secrets) == 15
    for service, row in stack.containers().items():
        config = row["Config"]
        shown = json.dumps([row["Path"], row["Args"], config["Cmd"], config.get("Healthcheck"), config["Labels"]])
        assert not [secret for secret in secrets if secret in shown], service
        if row["State"]["Running"]:
            processes = stack.compose("top", service)
            assert not [secret for secret in secrets if secret in processes], service


def test_each_service_is_given_the_secrets_that_it_needs(stack: ComposeStack) -> None:
    def knows(service: str, name: str) -> bool:
        return any(stack.settings[name] in value for value in containers[service]["Config"]["Env"])

    containers = stack.containers()
    for worker in ("worker", "worker-gpu"):
        assert knows(worker, "S3_SECRET_KEY")
        for name in (
            "POSTGRES_AIRFLOW_PASSWORD",
            "AIRFLOW_JWT_SECRET",
            "AIRFLOW_FERNET_KEY",
            "MLPIPE_AIRFLOW_PASSWORD",
        ):
            assert not knows(worker, name)
    for service in ("api-server", "scheduler", "dag-processor", "triggerer"):
        assert not knows(service, "S3_SECRET_KEY")


def test_our_containers_run_without_root(stack: ComposeStack) -> None:
    own = {service: row for service, row in stack.containers().items() if row["Config"]["Image"].startswith("mlpipe-")}
    assert len(own) == 8
    assert not [service for service, row in own.items() if row["Config"]["User"] in ("", "root", "0")]
    # These two drop it themselves.
    for service, process in (("redis", "redis-server"), ("postgres", "postgres")):
        shown = run(["docker", "top", stack.containers()[service]["Id"], "-eo", "pid,uid,comm"], 60).splitlines()[1:]
        users = {line.split()[1] for line in shown if line.split()[2] == process}
        assert users
        assert "0" not in users


def test_only_what_trains_has_torch(stack: ComposeStack) -> None:
    script = "import importlib.util; print(importlib.util.find_spec('torch') is not None)"
    has = {name: stack.compose("exec", "-T", name, "python", "-c", script).strip() for name in ("worker", "worker-gpu")}
    assert has == {"worker": "False", "worker-gpu": "True"}


def test_a_stopped_worker_hands_its_training_back(stack: ComposeStack, api: AirflowApi) -> None:
    form = RunParams.from_mapping({"models": "custom_cnn", "epochs": 150, "promotion": "disabled"}).to_mapping()
    run_id = api.trigger(DAG_ID, form, "worker-stopped")
    until(lambda: any((model["epoch"] or 0) > 3 for model in api.progress(DAG_ID, run_id)), 300)
    began = time.monotonic()
    stack.compose("stop", "worker-gpu")
    assert time.monotonic() - began < 40, "it was killed after its time of grace"
    until(lambda: _training(api, run_id).state in ("up_for_retry", "scheduled", "queued"), 30)
    stack.compose("start", "worker-gpu")
    until(lambda: api.dag_run_state(DAG_ID, run_id) in ("success", "failed"), 600)
    training = _training(api, run_id)
    assert (training.state, training.try_number) == ("success", 2)
    events = [str(line.get("event")) for line in api.log(DAG_ID, run_id, training)]
    assert any(event.startswith("resuming after epoch") for event in events), events


def _training(api: AirflowApi, run_id: str) -> TaskInstance:
    return next(task for task in api.task_instances(DAG_ID, run_id) if task.task_id == "train")


def test_two_schedulers_run_each_task_once(stack: ComposeStack, api: AirflowApi) -> None:
    stack.compose("up", "-d", "--no-recreate", "--scale", "scheduler=2", "scheduler")
    try:
        forms = [
            {"models": "logistic_regression", "seed": seed, "promotion": "disabled"} for seed in range(NUM_AT_ONCE)
        ]
        run_ids = [
            api.trigger(DAG_ID, RunParams.from_mapping(form).to_mapping(), f"two-schedulers-{form['seed']}")
            for form in forms
        ]
        for run_id in run_ids:
            until(lambda run_id=run_id: api.dag_run_state(DAG_ID, run_id) in ("success", "failed"), 1500)
        tasks = [task for run_id in run_ids for task in api.task_instances(DAG_ID, run_id)]
        assert len(stack.compose("ps", "-q", "scheduler").split()) == 2
    finally:
        stack.compose("up", "-d", "--no-recreate", "--scale", "scheduler=1", "scheduler")
    assert {(task.state, task.try_number) for task in tasks} == {("success", 1)}
    assert len(tasks) == 4 * NUM_AT_ONCE
    for run_id in run_ids:
        starts = [line for line in api.log(DAG_ID, run_id, _training(api, run_id)) if line.get("event") == STARTS]
        assert len(starts) == 1, run_id


def test_no_log_holds_a_secret(demo: dict[str, Any], cifar10: dict[str, Any], stack: ComposeStack) -> None:
    assert demo
    assert cifar10
    printed = stack.compose("logs", "--no-color")
    tasks = stack.compose("exec", "-T", "worker", "sh", "-c", "find /opt/airflow/logs -type f -exec cat {} +")
    assert STARTS in tasks
    example = (ROOT / ".env.example").read_text().splitlines()
    for name in (line[:-1] for line in example if line.endswith("=")):
        assert stack.settings[name] not in printed, name
        assert stack.settings[name] not in tasks, name
