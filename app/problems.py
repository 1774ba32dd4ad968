"""Errors as `application/problem+json` (RFC 9457), whoever raised them."""

import math
from http import HTTPStatus

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app.errors import MethodNotAllowed, NotFound, ServiceError, TooLarge, Unauthorized, Validation

_CONTENT_TYPE = (b"content-type", b"application/problem+json")


def problem_headers(refusal: ServiceError) -> list[tuple[bytes, bytes]]:
    """The headers of a refusal: its type, when to come back, how to authenticate, whether the connection ends."""
    headers = [_CONTENT_TYPE]
    if refusal.http_status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(refusal.retry_after_seconds or 1))))
    elif isinstance(refusal, Unauthorized):
        headers.append((b"www-authenticate", b'Bearer realm="orders"'))
    elif isinstance(refusal, TooLarge):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    return headers


def problem_response(refusal: ServiceError) -> Response:
    """The answer to a refused request."""
    response = Response(orjson.dumps(refusal.problem()), status_code=refusal.http_status)
    response.raw_headers.extend(problem_headers(refusal))
    return response


def add_problem_handlers(app: FastAPI) -> None:
    """Answer our refusals, the framework's own validation errors and its 404 and 405 as problems."""

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
    return sorted(found)
