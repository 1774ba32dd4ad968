"""The middleware of every request, whatever its route: an id, an access line, and the RED metrics."""

import os
import re
import time

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import InternalError
from app.light_metrics import Counter, Histogram
from app.metrics import HTTP_REQUEST_SECONDS, HTTP_REQUESTS
from app.problems import send_problem

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_log = structlog.get_logger("app.access")


class Observed:
    """An application whose requests are observed; pure ASGI: `BaseHTTPMiddleware` costs more than the order itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._requests: dict[tuple[str, str, int], Counter] = {}
        self._seconds: dict[str, Histogram] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = time.monotonic()
        request_id = _request_id(scope)
        log: dict[str, object] = {}
        scope["log"] = log  # handlers add what the access line should say
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except Exception:  # noqa: BLE001 - logged and answered
            _log.exception("request_failed", request_id=request_id.decode())
            if status == 0:
                await send_problem(InternalError(outcome="unknown"), answer)
        finally:
            duration = time.monotonic() - started_at
            route = getattr(scope.get("route"), "path_format", "unmatched")
            self._record(scope["method"], route, status, duration)
            _log.info(
                "request",
                request_id=request_id.decode(),
                method=scope["method"],
                route=route,
                status=status,
                duration_ms=round(duration * 1000, 3),
                **log,
            )

    def _record(self, method: str, route: str, status: int, duration: float) -> None:
        key = (method if method in _METHODS else "other", route, status)
        counter = self._requests.get(key)
        if counter is None:
            counter = self._requests[key] = HTTP_REQUESTS.labels(key[0], route, str(status))
        counter.inc()
        seconds = self._seconds.get(route)
        if seconds is None:
            seconds = self._seconds[route] = HTTP_REQUEST_SECONDS.labels(route)
        seconds.observe(duration)


def _request_id(scope: Scope) -> bytes:
    """The client's `X-Request-ID` where it is a plain one, else a new id."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return bytes(value)
    return os.urandom(16).hex().encode()
