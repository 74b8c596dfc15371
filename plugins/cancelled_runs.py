"""A DAG run that a person ends in Airflow leaves no open MLflow runs, and one that succeeds has its verdict as a note.

A task that runs at that moment is told to end and closes its own run. But nothing runs between two tasks or while they
wait for a device, and Airflow calls a DAG's callbacks only for ends that the scheduler finds. It does
tell its listeners, in the API server; MLflow takes seconds to import, so that is done in a process of its own.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from airflow.listeners import hookimpl
from airflow.plugins_manager import AirflowPlugin

if TYPE_CHECKING:
    from airflow.models.dagrun import DagRun

log = logging.getLogger(__name__)

DAG_IDS = ("image_classification", "tune")
BY_HAND = "manually"
"""In the message that Airflow sends with a state that somebody set; a failure that the scheduler finds has another."""
TIMEOUT_SECONDS = 300
VERDICT = "verdict"
"""Key under which `evaluate` pushes the result in sentences."""


class StoppedDagRuns:
    """Listens to ends of DAG runs."""

    @hookimpl
    def on_dag_run_failed(self, dag_run: DagRun, msg: str) -> None:
        """Close the MLflow runs of a DAG run that was set to failed by hand."""
        _close_runs(dag_run, msg, "KILLED", "the DAG run was stopped in Airflow")

    @hookimpl
    def on_dag_run_success(self, dag_run: DagRun, msg: str) -> None:
        """Close the MLflow runs of a DAG run that was set to success by hand; note the verdict of another."""
        _close_runs(dag_run, msg, "FINISHED", "the DAG run was marked as a success in Airflow")
        if dag_run.dag_id in DAG_IDS and BY_HAND not in msg:
            _note_verdict(dag_run)


def _note_verdict(dag_run: DagRun) -> None:
    """Make what `evaluate` found the note that Airflow shows beside a DAG run. The scheduler calls it."""
    from airflow.models.xcom import XComModel
    from sqlalchemy import select
    from sqlalchemy.orm import object_session

    session = object_session(dag_run)
    note = dag_run.dag_run_note
    if session is None or (note and note.user_id):  # a person wrote it
        return
    wanted = (XComModel.dag_id == dag_run.dag_id, XComModel.run_id == dag_run.run_id, XComModel.key == VERDICT)
    found = session.scalar(select(XComModel).where(*wanted))
    if found is not None:
        dag_run.note = str(XComModel.deserialize_value(found))[:1000]


def _close_runs(dag_run: DagRun, msg: str, *how: str) -> None:
    """In a process of its own; `how` are the last arguments of `mlpipe.tracking.close_runs`."""
    if dag_run.dag_id not in DAG_IDS or BY_HAND not in msg:
        return
    from mlpipe.errors import UserError
    from mlpipe.forms import FORMS
    from mlpipe.recipes import resolve

    try:
        dataset = resolve(FORMS[dag_run.dag_id].from_mapping(dag_run.conf or {}).run_params()).data.name
    except UserError:  # then no task has opened an MLflow run
        return
    command = [sys.executable, "-m", "mlpipe.tracking.close_runs", dataset, dag_run.dag_id, dag_run.run_id, *how]
    threading.Thread(target=_run, args=(command,), daemon=True).start()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    if done.returncode:
        log.error("MLflow runs of %s could not be closed: %s", command[5], done.stderr[-2000:])


class CancelledRunsPlugin(AirflowPlugin):
    """Registers the listener."""

    name = "cancelled_runs"
    listeners = [StoppedDagRuns()]  # noqa: RUF012 - declared by AirflowPlugin
