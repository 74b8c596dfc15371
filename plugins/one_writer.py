"""On SQLite, the API server's calls that write come one after the other.

Airflow writes the audit log of a call on the server's event loop (`action_logging`), and the loop is also what lets
another call commit. On SQLite, which has one writer, the first then waits for the second, which it keeps from going on:
the server stands still until the database's time-out, and the call fails with status 500. Seen with Airflow 3.3.2, when
a DAG run is triggered in the moment of a task's heartbeat. Other databases need none of this.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from airflow.configuration import conf
from airflow.plugins_manager import AirflowPlugin

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

READING = ("GET", "HEAD", "OPTIONS")


class OneWriter:
    """Middleware that lets one writing call through at a time."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._writing = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in READING:
            await self._app(scope, receive, send)
            return
        async with self._writing:  # until the call has committed, which is after its answer
            await self._app(scope, receive, send)


class OneWriterPlugin(AirflowPlugin):
    """Registers the middleware where Airflow's database is SQLite."""

    name = "one_writer"
    fastapi_root_middlewares = (
        [{"middleware": OneWriter, "name": "one writer"}]
        if conf.get("database", "sql_alchemy_conn").startswith("sqlite")
        else []
    )
