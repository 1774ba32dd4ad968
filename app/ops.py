"""Routes for the platform: probes, metrics, documentation. No key is needed, and no dependency is waited for."""

from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from prometheus_client import REGISTRY
from prometheus_client.exposition import choose_encoder
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from app.errors import Draining
from app.problems import problems
from app.state import state_of

ops = APIRouter(tags=["operations"])

_ASSETS = "/docs/assets"
_PLAIN: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@ops.get("/livez")
async def livez() -> dict[str, str]:
    """The process runs. It never asks a dependency: restarting the service heals no database."""
    return {"status": "ok"}


@ops.get("/readyz", responses=problems(503))
async def readyz(request: Request) -> dict[str, str]:
    """Whether to send requests here: 503 only while the service ends.

    A database that is away makes it `degraded`, not unready: all replicas share the database, and without any of
    them nobody would even get a `Retry-After`.
    """
    state = state_of(request)
    if state["lifecycle"].draining:
        raise Draining
    return {"status": "ok" if state["breaker"].state == "closed" else "degraded"}


@ops.get("/metrics", response_class=Response, responses=_PLAIN)
async def metrics(request: Request) -> Response:
    """The metrics, in Prometheus's text format or OpenMetrics."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(REGISTRY), headers={"content-type": content_type})


def add_documentation(app: FastAPI) -> None:
    """Serve `/docs` from the Swagger UI files of a package: it works without the internet."""
    folder = resources.files("fastapi_swagger") / "resources"
    app.mount(_ASSETS, StaticFiles(directory=str(folder)), name="docs-assets")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="Order service",
            swagger_js_url=f"{_ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{_ASSETS}/swagger-ui.css",
            swagger_favicon_url="data:,",
        )

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("/docs")
