"""Which executor a training task asks for, and the pod that Kubernetes would be asked for."""

from __future__ import annotations

from typing import Any

import pytest

from mlpipe.errors import UserError
from mlpipe.executors import evaluation_task, training_task

POD = {"image": "registry.example/mlpipe-training:0.1.0"}


@pytest.mark.parametrize(
    ("executors", "training", "evaluation"),
    [
        ("LocalExecutor", {"queue": "gpu"}, {"queue": "gpu"}),
        (
            "LocalExecutor, gpu:gpu_executor.GpuExecutor",
            {"queue": "gpu", "executor": "gpu"},
            {"queue": "gpu"},
        ),
        ("CeleryExecutor", {"queue": "gpu"}, {"queue": "gpu"}),
        ("LocalExecutor,gpu:CeleryExecutor", {"queue": "gpu", "executor": "gpu"}, {"queue": "gpu"}),
    ],
)
def test_without_kubernetes_there_is_no_pod(
    executors: str, training: dict[str, Any], evaluation: dict[str, Any]
) -> None:
    assert training_task(executors, POD.get) == training
    assert evaluation_task(executors, POD.get) == evaluation


@pytest.mark.parametrize(
    ("executors", "alias"),
    [
        ("KubernetesExecutor", None),
        ("airflow.providers.cncf.kubernetes.executors.kubernetes_executor.KubernetesExecutor", None),
        ("CeleryExecutor,gpu:KubernetesExecutor", "gpu"),
    ],
)
def test_a_pod_is_asked_for_where_the_executor_makes_pods(executors: str, alias: str | None) -> None:
    for arguments in (training_task(executors, POD.get), evaluation_task(executors, POD.get)):
        assert arguments.get("executor") == alias
        assert arguments["executor_config"]["pod_override"].spec.containers[0].image == POD["image"]


def built_pod(override: Any) -> dict[str, Any]:
    """The pod as Airflow's executor merges it from its template and the override, as it goes over the wire."""
    from airflow.providers.cncf.kubernetes.pod_generator import PodGenerator
    from kubernetes.client import ApiClient
    from kubernetes.client import models as k8s

    variable = k8s.V1EnvVar(name="MLFLOW_TRACKING_URI", value="http://mlflow:5000")
    template = k8s.V1Pod(
        metadata=k8s.V1ObjectMeta(name="template"),
        spec=k8s.V1PodSpec(
            service_account_name="airflow-worker",
            containers=[k8s.V1Container(name="base", image="mlpipe-airflow:0.1.0", env=[variable])],
        ),
    )
    pod = PodGenerator.construct_pod(
        dag_id="image_classification",
        task_id="train",
        pod_id="train-1",
        try_number=1,
        kube_image="mlpipe-airflow:0.1.0",
        date=None,
        args=["python", "-m", "airflow.sdk.execution_time.execute_workload"],
        pod_override_object=override,
        base_worker_pod=template,
        namespace="airflow",
        scheduler_job_id="7",
        map_index=2,
    )
    return ApiClient().sanitize_for_serialization(pod)


def test_the_pod_that_trains_has_its_image_resources_and_devices() -> None:
    settings = POD | {"gpus": "2", "gpu_resource": "amd.com/gpu", "cpu": "8", "memory": "32Gi"}
    spec = built_pod(training_task("KubernetesExecutor", settings.get)["executor_config"]["pod_override"])["spec"]
    [container] = spec["containers"]
    assert container["image"] == POD["image"]
    assert container["resources"] == {
        "requests": {"cpu": "8", "memory": "32Gi"},
        "limits": {"memory": "32Gi", "amd.com/gpu": "2"},
    }
    # What the template gives every task is still there.
    assert spec["serviceAccountName"] == "airflow-worker"
    assert "MLFLOW_TRACKING_URI" in {variable["name"] for variable in container["env"]}
    assert container["args"][-1] == "airflow.sdk.execution_time.execute_workload"


def test_a_training_pod_has_one_device_unless_told_otherwise_and_an_evaluating_pod_none() -> None:
    def limits(arguments: dict[str, Any]) -> dict[str, str]:
        return built_pod(arguments["executor_config"]["pod_override"])["spec"]["containers"][0]["resources"]["limits"]

    assert limits(training_task("KubernetesExecutor", POD.get)) == {"memory": "16Gi", "nvidia.com/gpu": "1"}
    assert limits(training_task("KubernetesExecutor", (POD | {"gpus": "0"}).get)) == {"memory": "16Gi"}
    assert limits(evaluation_task("KubernetesExecutor", POD.get)) == {"memory": "16Gi"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, r"\[training_pod\] image: not set"), (POD | {"gpus": "-1"}, r"\[training_pod\] gpus: '-1' is not a number")],
)
def test_a_wrong_setting_is_named(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        training_task("KubernetesExecutor", settings.get)
    assert "\n" not in str(raised.value)
