"""The middleware of every request, whatever its route: an id, an access line, and the RED metrics."""

import asyncio
import functools
import os
import re
import time
from collections.abc import Mapping

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import InternalError, ServiceError
from app.headers import headers_of
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if "refusal" in scope:  # the protocol answered before this had begun, and booked it
            return
        started_at = time.monotonic()
        scope["request_id"] = request_id = request_id_of(headers_of(scope))
        log: dict[str, object] = {}
        scope["log"] = log  # handlers add what the access line should say
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
                await send(message)
                status = message["status"]
            else:
                await send(message)

        try:
            await self._app(scope, receive, answer)
        except (Exception, asyncio.CancelledError) as exc:  # logged and answered
            if isinstance(exc, asyncio.CancelledError) and is_cancelled():
                raise
            _log.exception("request_failed", request_id=request_id.decode())
            if status == 0:
                await send_problem(InternalError(outcome="unknown"), answer)
        finally:
            refusal: ServiceError | None = scope.get(
                "refusal"
            )  # the protocol's own, in the application's stead
            if status == 0 and refusal is not None:
                status = refusal.http_status
                log.update(error_type=refusal.error_type, outcome=refusal.outcome)
            duration = time.monotonic() - started_at
            route = getattr(scope.get("route"), "path_format", "unmatched")
            book(scope["method"], route, status, duration, request_id, log)
            _seconds(route).observe(duration)


def request_id_of(headers: Mapping[bytes, bytes]) -> bytes:
    """The client's `X-Request-ID` where it is a plain one, else a new id."""
    given = headers.get(b"x-request-id")
    return given if given and _REQUEST_ID.fullmatch(given) else os.urandom(16).hex().encode()


def book(
    method: str, route: str, status: int, seconds: float, request_id: bytes, log: Mapping[str, object]
) -> None:
    """Count one answer and write its access line; *log* is what else the line should say."""
    _requests(method if method in _METHODS else "other", route, status).inc()
    _log.info(
        "request",
        request_id=request_id.decode(),
        method=method,
        route=route,
        status=status,
        duration_ms=round(seconds * 1000, 3),
        **log,
    )


def is_cancelled() -> bool:
    """Whether a `CancelledError` is meant for this task; if not, something that it waited for was cancelled."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


# Children are looked up once: labels() costs three times what inc() does.


@functools.cache
def _requests(method: str, route: str, status: int) -> Counter:
    return HTTP_REQUESTS.labels(method, route, str(status))


@functools.cache
def _seconds(route: str) -> Histogram:
    return HTTP_REQUEST_SECONDS.labels(route)
