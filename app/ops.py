"""Routes for the platform: probes, metrics, documentation. No key is needed, and no dependency is waited for."""

import re
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from prometheus_client import REGISTRY
from prometheus_client.exposition import choose_encoder
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from app.checked_route import CheckedRoute
from app.errors import Draining
from app.problems import problems
from app.state import state_of

ops = APIRouter(tags=["operations"], route_class=CheckedRoute)

_ASSETS = "/docs/assets"
_PLAIN: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
# What /metrics can be served in, the version that is meant where none is named first.
_FORMATS = {
    "application/openmetrics-text": ("1.0.0",),
    "text/plain": ("0.0.4", "1.0.0"),
    "text/*": ("0.0.4",),
    "*/*": ("0.0.4",),
}
_ESCAPINGS = frozenset({"allow-utf-8", "underscores", "dots", "values"})
_WEIGHT = re.compile(r"[01](\.[0-9]{0,3})?")


@ops.get("/livez", responses=problems())
async def livez() -> dict[str, str]:
    """The process runs. It never asks a dependency: restarting the service heals no database."""
    return {"status": "ok"}


@ops.get("/readyz", responses=problems(503))
async def readyz(request: Request) -> dict[str, str]:
    """Whether to send requests here: 503 only while the service ends.

    A database that is away, or cannot be written to, makes it `degraded`, not unready: all replicas share the
    database, and without any of them nobody would even get a `Retry-After`.
    """
    state = state_of(request)
    if state["lifecycle"].draining:
        raise Draining
    closed = all(breaker.state == "closed" for breaker in state["breakers"])
    return {"status": "ok" if closed else "degraded"}


@ops.get("/metrics", response_class=Response, responses={**_PLAIN, **problems()})
async def metrics(request: Request) -> Response:
    """The metrics, in Prometheus's text format or OpenMetrics."""
    encode, content_type = choose_encoder(_format(",".join(request.headers.getlist("accept"))))
    return Response(encode(REGISTRY), headers={"content-type": content_type, "vary": "Accept"})


def _format(accept: str) -> str:
    """The one entry of *accept* that is wanted most and can be served, as the library reads it; else nothing.

    The library fails on a version that is none, promises any version that it is asked for, and knows no weights.
    """
    wanted: list[tuple[float, str]] = []
    for entry in accept.lower().split(","):
        media_type, *rest = (part.strip() for part in entry.split(";"))
        parameters = {
            name.strip(): value.strip().strip('"')
            for name, _, value in (part.partition("=") for part in rest)
        }
        version = parameters.get("version", _FORMATS.get(media_type, ("",))[0])
        if version in _FORMATS.get(media_type, ()):
            escaping = parameters.get("escaping", "")
            escaped = f";escaping={escaping}" if escaping in _ESCAPINGS else ""
            wanted.append((_weight(parameters.get("q", "1")), f"{media_type};version={version}{escaped}"))
    weight, best = max(wanted, key=lambda each: each[0], default=(0.0, ""))
    return best if weight > 0 else ""


def _weight(text: str) -> float:
    return float(text) if _WEIGHT.fullmatch(text) else 0.0


def add_documentation(app: FastAPI) -> None:
    """Serve `/docs` from the Swagger UI files of a package: it works without the internet."""
    folder = resources.files("fastapi_swagger") / "resources"
    app.mount(_ASSETS, StaticFiles(directory=str(folder)), name="docs-assets")

    pages = APIRouter(route_class=CheckedRoute, include_in_schema=False)

    @pages.get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(app.openapi())

    @pages.get("/docs")
    async def docs() -> Response:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="Order service",
            swagger_js_url=f"{_ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{_ASSETS}/swagger-ui.css",
            swagger_favicon_url="data:,",
        )

    @pages.get("/")
    async def root() -> Response:
        return RedirectResponse("/docs")

    app.router.routes.extend(pages.routes)
