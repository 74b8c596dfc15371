"""The login of the local stack's MLflow, which is Airflow's.

Programs send user and password (MLFLOW_TRACKING_USERNAME and _PASSWORD). A browser that is not logged in goes to
Airflow, which asks for them where it has no session either, and sends it back with a signed ticket; MLflow then keeps
a session of its own in a cookie.
"""

from __future__ import annotations

import base64
import secrets
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from itsdangerous import BadSignature, URLSafeTimedSerializer
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

AIRFLOWS_PAGE = "/mlpipe-report/mlflow-login"
"""Where Airflow gives tickets to those who are logged in there."""
TICKETS_PAGE = "/mlpipe-login"
"""Where MLflow takes them."""
OPEN = ("/health", "/version")
"""What MLflow answers to anyone."""

COOKIE = "mlpipe_mlflow"
TICKET, SESSION = "ticket", "session"
SECONDS = {TICKET: 60, SESSION: 30 * 24 * 3600}
"""For which each is accepted."""

# A script, since a server never sees what stands behind the # of MLflow's addresses.
TO_AIRFLOW = """<!doctype html><html lang="en"><meta charset="utf-8"><title>MLflow: log in</title>
<p>Log in to <a id="airflow" href="{page}">Airflow</a>; it leads back here.</p>
<script>
  const link = document.getElementById("airflow");
  link.href += "?to=" + encodeURIComponent(location.pathname + location.search + location.hash);
  location.replace(link.href);
</script></html>"""

HOW = "Log in: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD as `mlpipe env` prints them."


def sign(password: str, what: str) -> str:
    """A ticket or a session."""
    return URLSafeTimedSerializer(password, salt=what).dumps("")


def ticket_address(mlflow_url: str, password: str, to: str) -> str:
    """Where to send the browser of someone who is logged in to Airflow.

    Args:
        to: the page of MLflow, from its path on, that is wanted.
    """
    return f"{mlflow_url}{TICKETS_PAGE}?{urlencode({TICKET: sign(password, TICKET), 'to': to})}"


class Login:
    """ASGI middleware that lets in whoever has the password, a ticket or a session."""

    def __init__(self, app: ASGIApp, *, user: str, password: str, airflow_url: str) -> None:
        self._app = app
        self._password = password
        self._basic = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        self._page = airflow_url + AIRFLOWS_PAGE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        if request.url.path == TICKETS_PAGE:
            await self._begin_session(request)(scope, receive, send)
        elif request.url.path in OPEN or self._is_known(request):
            await self._app(scope, receive, send)
        else:
            await self._refuse(request.headers)(scope, receive, send)

    def _is_known(self, request: Request) -> bool:
        given = request.headers.get("Authorization", "")
        return secrets.compare_digest(given.encode(), self._basic.encode()) or self._accepts(
            request.cookies.get(COOKIE, ""), SESSION
        )

    def _accepts(self, signed: str, what: str) -> bool:
        try:
            URLSafeTimedSerializer(self._password, salt=what).loads(signed, max_age=SECONDS[what])
        except BadSignature:  # or an old one
            return False
        return True

    def _begin_session(self, request: Request) -> Response:
        to = request.query_params.get("to", "/")
        answer = RedirectResponse(to if to.startswith("/") and not to.startswith(("//", "/\\")) else "/")
        if self._accepts(request.query_params.get(TICKET, ""), TICKET):
            session = sign(self._password, SESSION)
            answer.set_cookie(COOKIE, session, max_age=SECONDS[SESSION], httponly=True, samesite="lax")
        elif not self._is_known(request):  # its ticket is of an old address, as a browser's history has
            return self._refuse(request.headers)
        return answer

    def _refuse(self, headers: Headers) -> Response:
        if "text/html" in headers.get("Accept", ""):
            return HTMLResponse(TO_AIRFLOW.format(page=self._page), 401)
        return PlainTextResponse(HOW, 401, {"WWW-Authenticate": 'Basic realm="mlflow"'})
