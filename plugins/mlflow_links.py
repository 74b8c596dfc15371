"""Airflow's pages lead to MLflow: buttons on tasks.

A task gives its button a target by `ti.xcom_push(key="mlflow_run_url", value=url)`, best when its run begins: the API
server looks the value up when the page asks for it, so the button is there while the task still runs. A retry clears it
until the task pushes again. On tasks that push nothing, in any DAG, there is no button.

MLflow refuses to be framed (X-Frame-Options), so they open a tab of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from airflow.plugins_manager import AirflowPlugin
from airflow.sdk import BaseOperatorLink

from mlpipe.environment import Environment

if TYPE_CHECKING:
    from airflow.models.taskinstancekey import TaskInstanceKey
    from airflow.serialization.definitions.mappedoperator import Operator

LINKS = {
    "MLflow run": "mlflow_run_url",
    "Comparison": "mlflow_comparison_url",
    "Champion": "mlflow_champion_url",
}
"""Buttons, and the keys under which tasks push the addresses that they lead to."""


@attrs.define
class MlflowLink(BaseOperatorLink):
    """A button on a task's page."""

    name: str
    key: str

    @property
    def xcom_key(self) -> str:
        return self.key

    def get_link(self, operator: Operator, *, ti_key: TaskInstanceKey) -> str:  # type: ignore[override]
        """Address that the task pushed, or an empty string, which hides the button.

        Of a global link Airflow calls this in the API server, not in the worker; there the XCom is read as Airflow
        reads those of its own links.
        """
        # It opens the metadata database: workers, which load this module too, have no access to that.
        from airflow.serialization.definitions.operatorlink import XComOperatorLink

        url = XComOperatorLink(name=self.name, xcom_key=self.xcom_key).get_link(operator, ti_key=ti_key)
        return url if is_web_address(url) else ""


class MlflowLinksPlugin(AirflowPlugin):
    """Registers the buttons."""

    name = "mlflow_links"
    global_operator_extra_links = [MlflowLink(name, key) for name, key in LINKS.items()]  # noqa: RUF012 - declared by AirflowPlugin


def mlflow_ui_url() -> str | None:
    """Address of MLflow's pages, without login and final slash, or `None` if there is none for a browser."""
    url = Environment.from_env().mlflow_ui_url
    return url if url and is_web_address(url) else None


def is_web_address(url: str) -> bool:
    """Whether a browser should follow the address."""
    return url.startswith(("http://", "https://"))
