"""Errors as `application/problem+json` (RFC 9457), whoever raised them: documented, rendered, sent."""

import math
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Send

from app.errors import (
    InternalError,
    MethodNotAllowed,
    NotFound,
    ServiceError,
    TooLarge,
    Unauthorized,
    Validation,
)

_CONTENT_TYPE = (b"content-type", b"application/problem+json")


PROBLEM = {"content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}

_DESCRIPTIONS = {
    400: "The request is not HTTP/1.1, or its body is not JSON.",
    401: "A valid API key is needed.",
    404: "There is no such resource.",
    408: "The request did not arrive in time.",
    409: "The order, or its stock, does not allow it.",
    413: "The body is over its limit.",
    415: "The body has another type or coding than JSON.",
    422: "The request is not of the contract's form, or names what does not exist.",
    431: "The headers are over their limit.",
    500: "A defect of the service.",
    501: "The body has a transfer coding other than chunked.",
    503: "The service cannot do this now; Retry-After says when to try again.",
    504: "No answer in time.",
}

_HEADERS = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}, "required": True}},
    503: {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "required": True}},
}


# What any request can be answered, whatever its route.
_ANY_ROUTES = (400, 408, 415, 422, 431, 500, 501)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of the refusals a route can give: *statuses*, and those that any route can."""
    return {
        status: {**PROBLEM, "description": _DESCRIPTIONS[status], "headers": _HEADERS.get(status, {})}
        for status in sorted({*statuses, *_ANY_ROUTES})
    }


def problem_answer(refusal: ServiceError) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """The headers and the body of a refusal.

    The headers are its type and length, when to come back, how to authenticate, and whether the connection ends.
    """
    body = orjson.dumps(refusal.problem())
    headers = [_CONTENT_TYPE, (b"content-length", b"%d" % len(body))]
    if refusal.http_status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(refusal.retry_after_seconds or 1))))
    elif isinstance(refusal, Unauthorized):
        headers.append((b"www-authenticate", b'Bearer realm="orders"'))
    elif isinstance(refusal, TooLarge):
        # The rest of the body is not read.
        headers.append((b"connection", b"close"))
    return headers, body


async def send_problem(refusal: ServiceError, send: Send) -> None:
    """Answer a request with *refusal*, where no framework does it."""
    headers, body = problem_answer(refusal)
    await send({"type": "http.response.start", "status": refusal.http_status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def problem_response(refusal: ServiceError) -> Response:
    """The answer to a refused request, where the framework sends it."""
    headers, body = problem_answer(refusal)
    response = Response(body, status_code=refusal.http_status)
    response.raw_headers = headers
    return response


def add_problem_handlers(app: FastAPI) -> None:
    """Answer our refusals, the framework's own validation errors, its 404 and 405, and defects as problems."""

    @app.exception_handler(Exception)
    async def failed(request: Request, _: Exception) -> Response:  # it is raised again, and logged outside
        return await refused(request, InternalError(outcome="unknown"))

    @app.exception_handler(ServiceError)
    async def refused(request: Request, exc: ServiceError) -> Response:
        request.scope["log"]["error_type"] = exc.error_type
        return problem_response(exc)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, exc: RequestValidationError) -> Response:
        errors = [{key: error[key] for key in ("loc", "msg", "type")} for error in exc.errors()]
        detail = "; ".join(f"{'.'.join(map(str, error['loc'][1:]))}: {error['msg']}" for error in errors[:3])
        return await refused(request, Validation(detail, errors=errors))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, exc: HTTPException) -> Response:
        if exc.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            response = await refused(request, MethodNotAllowed())
            allowed = ", ".join(_allowed_methods(app, request.scope["path"]))
            response.headers["allow"] = allowed or (exc.headers or {})["Allow"]  # a mounted application's own
            return response
        if exc.status_code == HTTPStatus.NOT_FOUND:
            return await refused(request, NotFound(f"there is nothing at {request.scope['path'][:200]}"))
        return await refused(request, Validation(str(exc.detail), status=exc.status_code))


def _allowed_methods(app: FastAPI, path: str) -> list[str]:
    """Every method that some route answers at *path*."""
    scope = {"type": "http", "path": path, "method": "", "headers": []}
    found: set[str] = set()
    for route in app.routes:
        matched, _ = route.matches(dict(scope))
        if matched.value:
            found |= getattr(route, "methods", None) or set()
    if "GET" in found:
        found.add("HEAD")
    return sorted(found)
