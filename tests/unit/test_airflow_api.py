"""Calls to Airflow, whose API server may be away for a moment."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from mlpipe.airflow_api import AirflowApi


@pytest.fixture
def busy_once() -> Iterator[str]:
    """A server whose first answer to a question is that it is not available."""
    asked: list[str] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self._answer(503 if len(asked) == 1 else 200, {"state": "running"})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(201, {"access_token": "t"})

        def _answer(self, status: int, content: dict[str, str]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_question_is_asked_again(busy_once: str) -> None:
    assert AirflowApi(busy_once, "u", "p").dag_run_state("image_classification", "r") == "running"
