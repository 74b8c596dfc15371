"""Small web servers of the tests."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

Content = tuple[int, Mapping[str, str], bytes]
"""Status, headers and body of an answer."""


class Request(NamedTuple):
    """What a server is asked."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class _Handler(http.server.BaseHTTPRequestHandler):
    respond: Callable[[Request], Content | None]

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = self.respond(Request(self.command, self.path, dict(self.headers), body))
        if content is None:
            return
        status, headers, answer = content
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(answer))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def serving(respond: Callable[[Request], Content | None]) -> Iterator[str]:
    """The address of a web server; where it has no content for a request, it closes the connection."""
    handler = type("Handler", (_Handler,), {"respond": staticmethod(respond)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def web_server(*answers: Content) -> Iterator[tuple[str, list[str]]]:
    """A web server that gives these answers in turn, the last one for ever; its address, and what it was asked."""
    left, requests = list(answers), list[str]()

    def respond(request: Request) -> Content:
        requests.append(f"{request.method} {request.path}")
        return left[0] if len(left) == 1 or request.method == "HEAD" else left.pop(0)

    with serving(respond) as address:
        yield address, requests
