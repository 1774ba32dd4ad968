"""`/faults`: faults are begun, listed and ended here, by whoever has the token; only with FAULTS_TOKEN."""

import hmac
from typing import Annotated

from fastapi import APIRouter, Body, Path, Security
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from app.checked_route import CheckedRoute
from app.errors import Unauthorized
from app.faults import Faults, NewFault
from app.headers import headers_of
from app.problems import problems

# Documented; `TokenRoute` looks at it, before the body is read.
_scheme = HTTPBearer(scheme_name="FaultsToken", description="FAULTS_TOKEN.", auto_error=False)


class OngoingFault(BaseModel):
    """A fault that is on, with what was asked of it."""

    id: str
    fault: NewFault
    started_at: str
    ends_at: str
    hits: int


class OngoingFaults(BaseModel):
    """Every fault that is on, oldest first."""

    items: list[OngoingFault]


def fault_routes(faults: Faults, token: str) -> APIRouter:
    """The routes, for who sends *token*."""

    class TokenRoute(CheckedRoute):
        """A route for who has the token, which is looked at before anything else."""

        async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
            scheme, _, given = headers_of(scope).get(b"authorization", b"").partition(b" ")
            is_known = hmac.compare_digest(given.strip(b" \t"), token.encode())
            if scheme.lower() != b"bearer" or not is_known:
                raise Unauthorized
            await super().handle(scope, receive, send)

    router = APIRouter(route_class=TokenRoute, tags=["faults"], dependencies=[Security(_scheme)])

    @router.post(
        "/faults",
        status_code=201,
        response_model=OngoingFault,
        responses=problems(401, 409),
    )
    async def begin_fault(asked: Annotated[NewFault, Body()]) -> JSONResponse:
        """Begin a fault; it ends by itself after `ttl_seconds`."""
        return JSONResponse(faults.begin(asked).document(), 201)

    @router.get("/faults", response_model=OngoingFaults, responses=problems(401))
    async def list_faults() -> JSONResponse:
        """List the faults that are on."""
        return JSONResponse({"items": faults.documents()})

    @router.delete(
        "/faults/{fault_id}",
        response_model=OngoingFault,
        responses=problems(401, 404),
    )
    async def end_fault(fault_id: Annotated[str, Path()]) -> JSONResponse:
        """End a fault now; the answer is the fault as it was."""
        return JSONResponse(faults.end(fault_id, why="deleted").document())

    return router
