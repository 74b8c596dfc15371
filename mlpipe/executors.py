"""Where tasks that need torch run. Airflow's own setting, `[core] executor`, decides; the DAG is the same everywhere.

| `[core] executor` | training runs |
| --- | --- |
| `LocalExecutor,gpu:gpu_executor.GpuExecutor` | on this machine, one device or share of the CPU for each task |
| `CeleryExecutor` | on the workers of the queue `gpu` |
| `KubernetesExecutor` | in a pod of its own for each task, with a GPU |
| `CeleryExecutor,gpu:KubernetesExecutor` | in such pods; light tasks on Celery's workers |
| `LocalExecutor` | on this machine, as any other task |

The pods are described in Airflow's section `[training_pod]`. Parsing a DAG reads this module: Kubernetes' client, which
takes most of a second to import, is loaded only where pods are wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlpipe.errors import UserError

GPU = "gpu"
"""Alias of the executor, and name of Celery's queue."""

KUBERNETES = "KubernetesExecutor"
BASE_CONTAINER = "base"
"""Airflow's name for the container of a pod in which the task runs."""

Setting = Callable[[str], str | None]
"""Value of an option of `[training_pod]`; `None` where it is not set."""


@dataclass(frozen=True, kw_only=True)
class TrainingPod:
    """What a pod that trains needs; each field is an option of `[training_pod]`."""

    image: str
    """Image with torch: the target `training` of docker/airflow/Dockerfile."""
    gpus: int = 1
    """Devices of a training task; 0 trains on the CPU."""
    gpu_resource: str = "nvidia.com/gpu"
    """Kubernetes' name for a device."""
    cpu: str = "4"
    """Cores that are reserved."""
    memory: str = "16Gi"
    """Memory that is reserved, and at which the pod is stopped."""

    @classmethod
    def from_settings(cls, setting: Setting) -> TrainingPod:
        """
        Raises:
            UserError: the image is not named, or `gpus` is not a number.
        """
        given = {name: value for name in cls.__dataclass_fields__ if (value := setting(name))}
        if "image" not in given:
            raise UserError(
                "[training_pod] image: not set; name the image with torch (AIRFLOW__TRAINING_POD__IMAGE), "
                "which docker/airflow/Dockerfile builds as its target training"
            )
        gpus = given.pop("gpus", "1")
        if not gpus.isdecimal():
            raise UserError(f"[training_pod] gpus: {gpus!r} is not a number of devices; give 0 or more")
        return cls(gpus=int(gpus), **given)


def training_task(executors: str, setting: Setting) -> dict[str, Any]:
    """Arguments of the operator that trains: `queue`, and `executor` and `executor_config` where they are needed.

    Args:
        executors: Airflow's `[core] executor`.
        setting: reads an option of `[training_pod]`.

    Raises:
        UserError: a setting of the pods is wrong.
    """
    alias, kind = _training_executor(executors)
    arguments: dict[str, Any] = {"queue": GPU}
    if alias:
        arguments["executor"] = alias
    if kind == KUBERNETES:
        pod = TrainingPod.from_settings(setting)
        arguments["executor_config"] = {"pod_override": pod_override(pod, gpus=pod.gpus)}
    return arguments


def evaluation_task(executors: str, setting: Setting) -> dict[str, Any]:
    """The same for the task that loads the models: it needs torch as well, but waits for no device.

    On Celery it runs where torch is installed, on the queue's workers; with the local stack on the default executor.
    """
    alias, kind = _training_executor(executors)
    if kind != KUBERNETES:
        return {"queue": GPU}
    arguments: dict[str, Any] = {"executor_config": {"pod_override": pod_override(TrainingPod.from_settings(setting))}}
    return arguments | ({"executor": alias} if alias else {})


def _training_executor(executors: str) -> tuple[str | None, str]:
    """The alias by which training asks for its executor, if it has one of its own, and the class's name."""
    entries = [entry.strip().rpartition(":") for entry in executors.split(",")]
    own = next((path for alias, _, path in entries if alias == GPU), None)
    path = own or entries[0][2]
    return (GPU if own else None), path.rpartition(".")[2]


def pod_override(pod: TrainingPod, *, gpus: int = 0) -> Any:
    """The part of a `V1Pod` that differs from Airflow's pod template: the image and the resources."""
    from kubernetes.client import models as k8s

    limits = {"memory": pod.memory} | ({pod.gpu_resource: str(gpus)} if gpus else {})
    resources = k8s.V1ResourceRequirements(requests={"cpu": pod.cpu, "memory": pod.memory}, limits=limits)
    container = k8s.V1Container(name=BASE_CONTAINER, image=pod.image, resources=resources)
    return k8s.V1Pod(spec=k8s.V1PodSpec(containers=[container]))
