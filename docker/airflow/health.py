"""`python health.py api-server | scheduler | dag-processor | triggerer | worker`: exit 0 if that component works.

Asks in a few milliseconds what `airflow jobs check` answers after loading all of Airflow, some seconds of processor
time, again and again in each container.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import urllib.request

TIMEOUT = 8
"""Seconds for an answer."""

REPORTS = {  # an address, and the part of its report to look at; none where the status code says it all
    "api-server": ("http://127.0.0.1:8080/api/v2/monitor/health", "metadatabase"),
    "scheduler": ("http://127.0.0.1:8974/health", None),
    # These two have no server of their own: the API server knows their heartbeats.
    "dag-processor": ("http://api-server:8080/api/v2/monitor/health", "dag_processor"),
    "triggerer": ("http://api-server:8080/api/v2/monitor/health", "triggerer"),
}


def healthy(component: str) -> bool:
    """Whether the component says so itself, or sends heartbeats."""
    if component == "worker":
        return _worker_answers()
    url, part = REPORTS[component]
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:  # noqa: S310 - fixed addresses
        return part is None or bool(json.load(answer)[part]["status"] == "healthy")


def _worker_answers() -> bool:
    """Ping this container's Celery worker by way of the broker."""
    from celery import Celery

    with Celery(broker=os.environ["AIRFLOW__CELERY__BROKER_URL"]) as app:
        return bool(app.control.ping(destination=[f"celery@{socket.gethostname()}"], timeout=TIMEOUT))


if __name__ == "__main__":
    sys.exit(not healthy(sys.argv[1]))
