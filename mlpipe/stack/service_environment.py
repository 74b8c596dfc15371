"""Environment variables of the supervised components: all of their configuration. No file is edited by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from mlpipe.stack.credentials import Credentials
from mlpipe.stack.files import write_private
from mlpipe.stack.local import StackSettings

FOREIGN = ("AIRFLOW_", "_AIRFLOW_", "AWS_", "MLFLOW_", "_MLFLOW_", "WEED_", "S3_", "PYTHON")
"""Beginnings of variables that the caller's shell may carry for other systems; none of them reaches the stack."""
EXECUTOR = "LocalExecutor,gpu:gpu_executor.GpuExecutor"
"""Airflow's own for light tasks, and the one that leases devices under the alias `gpu`."""
AIRFLOW_CONFIG = Path(__file__).with_name("airflow.cfg")
EXECUTOR_SETTINGS = "AIRFLOW__GPU_EXECUTOR__"
"""But these, which are this project's own."""


def service_environment(settings: StackSettings, credentials: Credentials) -> dict[str, str]:
    """What every component, and every task that Airflow starts, is given. Writes Airflow's password file."""
    passwords = settings.airflow_home / "passwords.json"
    write_private(passwords, json.dumps({credentials.airflow_user: credentials.airflow_password}) + "\n")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(FOREIGN) and not _is_socks_proxy(name, value)
    }
    return {
        **inherited,
        **settings.service_addresses(credentials),
        **_storage(credentials),
        **_mlflow(settings, credentials),
        **_airflow(settings, credentials),
        **{name: value for name, value in os.environ.items() if name.startswith(EXECUTOR_SETTINGS)},
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
    }


def _is_socks_proxy(name: str, value: str) -> bool:
    """Whether a variable names a proxy at whose sight Airflow's HTTP client fails, whatever it is asked for."""
    return name.lower().endswith("_proxy") and value.lower().startswith("socks")


def _storage(credentials: Credentials) -> dict[str, str]:
    # The inner ports of SeaweedFS take no S3 keys; with these, its parts answer only each other.
    return {
        "WEED_JWT_SIGNING_KEY": credentials.storage_write_key,
        "WEED_JWT_FILER_SIGNING_KEY": credentials.storage_write_key,
        "WEED_JWT_FILER_SIGNING_READ_KEY": credentials.storage_read_key,
        "WEED_ADMIN_PASSWORD": credentials.storage_write_key,
    }


def _mlflow(settings: StackSettings, credentials: Credentials) -> dict[str, str]:
    return {
        "MLFLOW_S3_ENDPOINT_URL": settings.s3_url,
        "MLFLOW_CRYPTO_KEK_PASSPHRASE": credentials.mlflow_secret_passphrase,
        # A call is tried for about a minute: longer than a restart takes, and the task's own retries follow.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",
        # Of no use here, and it would start a second process tree (huey) beside the server.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def _airflow(settings: StackSettings, credentials: Credentials) -> dict[str, str]:
    """What is of this machine; `airflow.cfg` has the rest."""
    sections: Mapping[str, Mapping[str, object]] = {
        "core": {
            "executor": EXECUTOR,
            "dags_folder": settings.dags,
            # This project's are found by their entry points.
            "plugins_folder": settings.airflow_home / "plugins",
            # LocalExecutor forks as many processes at its start.
            "parallelism": min(16, max(8, os.cpu_count() or 1)),
            # It hands them tasks through a pipe of 16 pages, a page each, and limits their number by the pool alone. A
            # full pipe would stop the scheduler until a process takes a task (Airflow issue 70526).
            "default_pool_task_slot_count": 16,
            "simple_auth_manager_users": f"{credentials.airflow_user}:admin",
            "simple_auth_manager_passwords_file": settings.airflow_home / "passwords.json",
            "fernet_key": credentials.airflow_fernet_key,
            "execution_api_server_url": f"{settings.airflow_url}/execution/",
            # Shorter than the default 30 s, so that an edited DAG shows soon.
            "min_serialized_dag_update_interval": 5,
            "dagbag_import_timeout": 120,
        },
        "database": {"sql_alchemy_conn": f"sqlite:///{settings.airflow_database}?timeout=60"},
        "logging": {
            "base_log_folder": settings.logs / "airflow",
            "dag_processor_child_process_log_directory": settings.logs / "airflow" / "dag_processor",
            # That no slot is open, at each heartbeat: the usual state of a machine that trains.
            "namespace_levels": "gpu_executor.GpuExecutor=WARNING",
        },
        "api": {
            "host": "127.0.0.1",
            "port": settings.airflow_port,
            "base_url": settings.airflow_url,
            "secret_key": credentials.airflow_api_secret_key,
            "auto_refresh_interval": 2,
        },
        "api_auth": {"jwt_secret": credentials.airflow_jwt_secret},
        "scheduler": {
            # Tasks of a killed scheduler run again after at most 30 (its health threshold) + 15 seconds.
            "orphaned_tasks_check_interval": 15,
        },
        "dag_processor": {
            "dag_bundle_storage_path": settings.airflow_home / "bundles",
            "parsing_processes": 1,
            "dag_file_processor_timeout": 120,
        },
    }
    variables = {
        f"AIRFLOW__{section}__{option}".upper(): str(value)
        for section, options in sections.items()
        for option, value in options.items()
    }
    return {"AIRFLOW_HOME": str(settings.airflow_home), "AIRFLOW_CONFIG": str(AIRFLOW_CONFIG), **variables}
