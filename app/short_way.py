"""The short way: how the two busiest routes are reached without FastAPI's layers.

A route declares it beside its documentation, and so names the code that answers it:

    @short.post("/orders", ...)
    @answered_by(OrderIntake.create_order)
    def create_order(order: schemas.NewOrder, ...) -> None: ...

- What it skips: error pages, telemetry, body limit, exit stack, a regular expression per route, and the generic way
  from body to model and back. They cost an order a quarter of its CPU and do nothing for it.
- What it costs: FastAPI's dependencies, exception handlers and middleware do not apply. `intake.py` reads, bounds,
  parses and answers by itself, and a test holds it to the route's documented signature.
- When it is not taken: where a trace needs FastAPI's layers (FASTAPI_OTEL_AUTO_CONFIGURE=true), every request goes
  through them, and they end at the same code.

The ordinary FastAPI reading of the same contract, one transaction per order, is loadtests/bench/peers/per_request.py.
"""

import os
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from app.intake import OrderIntake
from app.middleware import Observed
from app.problems import send_problem
from app.targets import read_target

Answer = Callable[[OrderIntake, Scope, Receive, Send], Awaitable[None]]
_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])


def answered_by(answer: Answer) -> Callable[[_Endpoint], _Endpoint]:
    """Let *answer* serve the route whose signature and docstring the function below is."""

    def declare(endpoint: _Endpoint) -> _Endpoint:
        vars(endpoint)["answer"] = answer
        return endpoint

    return declare


class ShortRoute(APIRoute):
    """A route that FastAPI documents from its signature, and the method in `answered_by` answers."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse another method as FastAPI does."""
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        answer: Answer = vars(self.endpoint)["answer"]
        await answer(scope["state"]["intake"], scope, receive, send)


class Application(FastAPI):
    """FastAPI inside our one middleware, with the short way beside it."""

    def __init__(self, **options: Any) -> None:
        self._traced = os.environ.get("FASTAPI_OTEL_AUTO_CONFIGURE", "").lower() == "true"
        if not self._traced:
            # FastAPI's look for a tracer takes 13 us of every request.
            options["telemetry"] = {"tracing": False, "metrics": False, "logs": False}
        super().__init__(**options)
        self._short_routes: dict[tuple[str, str], ShortRoute] = {}
        self._observed = Observed(self._dispatch)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan."""
        await self._observed(scope, receive, send)

    def wrap(self, middleware: Callable[[ASGIApp], ASGIApp]) -> None:
        """Put *middleware* between the one that observes and what answers."""
        self._observed = Observed(middleware(self._dispatch))

    def add_routes(self, routes: list[Any]) -> None:
        """Add *routes* directly, in order: an included router would hide its prefix from the route label."""
        self.router.routes.extend(routes)
        for route in routes:
            if isinstance(route, ShortRoute):
                self._short_routes.update({(method, route.path): route for method in route.methods or ()})

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := read_target(scope)) is not None:
            scope["log"]["error_type"] = refusal.error_type
            await send_problem(refusal, send)
            return
        if scope["type"] == "http" and not self._traced:
            route = self._short_routes.get((scope["method"], scope["path"]))
            if route is not None:
                scope["route"] = route
                await route.handle(scope, receive, send)
                return
        if scope["type"] == "http" and scope["method"] == "HEAD":
            # As GET; the server leaves the body out. A copy: the server, and the access line, go by what was asked.
            asked = {**scope, "method": "GET"}
            try:
                await super().__call__(asked, receive, send)
            finally:
                scope["route"] = asked.get("route")
            return
        await super().__call__(scope, receive, send)
