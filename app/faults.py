"""Faults on demand, for who tests what watches the service: each is asked for, bounded, repeatable, and ends by itself.

Without FAULTS_TOKEN none of this is built. `fault_routes.py` is how they are asked for, `fault_work.py` what those do
that hit the process and not a request.
"""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, Literal, get_args

import orjson
import structlog
from pydantic import BaseModel, ConfigDict, Field
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from app.db import Database
from app.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidState,
    NotFound,
    ServiceError,
    Unavailable,
    Validation,
)
from app.fault_work import WORK
from app.metrics import FAULT_INJECTION_ACTIVE, FAULT_INJECTION_HITS
from app.problems import send_problem
from app.settings import SettingsError
from app.targets import read_target
from app.timestamp import timestamp

_MOST_AT_ONCE = 20
_log = structlog.get_logger("app.faults")


class _NewFault(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    ttl_seconds: Annotated[float, Field(ge=0.1, le=600, description="After which it ends by itself.")] = 30
    seed: Annotated[
        int, Field(ge=0, le=2**32, description="The same seed hits the same of the requests.")
    ] = 0


class _OfRequests(_NewFault):
    route: Annotated[
        str | None, Field(max_length=100, description="A route's template; none: every route of the API.")
    ] = None
    share: Annotated[float, Field(gt=0, le=1, description="Of those requests that are hit.")] = 1


class Latency(_OfRequests):
    """Requests wait before they are served."""

    kind: Literal["latency"]
    latency_ms: Annotated[float, Field(ge=1, le=30_000)] = 200


class Error(_OfRequests):
    """Requests are refused in place of being served."""

    kind: Literal["error"]
    status: Literal[500, 503, 504] = 503


class Abort(_OfRequests):
    """Connections are cut in place of their requests being served."""

    kind: Literal["abort"]


class HoldConnections(_NewFault):
    """Connections of the pool are kept from everybody."""

    kind: Literal["hold_connections"]
    connections: Annotated[int, Field(ge=1, le=10_000, description="At most as many as there are.")] = 10


class BlockLoop(_NewFault):
    """The event loop stands still, again and again."""

    kind: Literal["block_loop"]
    block_ms: Annotated[float, Field(ge=1, le=5_000)] = 200
    pause_ms: Annotated[float, Field(ge=10, le=60_000, description="From one to the next.")] = 800


class BurnCpu(_NewFault):
    """A thread computes."""

    kind: Literal["burn_cpu"]
    cpu_share: Annotated[
        float, Field(gt=0, le=1, description="Of one CPU; the service's own work takes turns.")
    ] = 0.5


class EatMemory(_NewFault):
    """Memory is filled, and kept."""

    kind: Literal["eat_memory"]
    megabytes: Annotated[int, Field(ge=1, le=1024)] = 256


class SlowPayments(_NewFault):
    """Attempts at payments take longer."""

    kind: Literal["slow_payments"]
    latency_ms: Annotated[float, Field(ge=1, le=30_000)] = 1000
    share: Annotated[float, Field(gt=0, le=1, description="Of the attempts that are hit.")] = 1


NewFault = Annotated[
    Latency | Error | Abort | HoldConnections | BlockLoop | BurnCpu | EatMemory | SlowPayments,
    Field(discriminator="kind"),
]
_OF_REQUESTS = frozenset({"latency", "error", "abort"})
KINDS: tuple[str, ...] = tuple(
    get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(get_args(NewFault)[0])
)


@dataclass(eq=False)
class Fault:
    """A fault that is on."""

    id: str
    asked: Any  # one of the kinds above
    started_at: float  # Unix time
    chance: random.Random
    hits: int = 0
    end: asyncio.TimerHandle | None = None
    work: asyncio.Task[None] | None = field(default=None)

    def strikes(self, share: float) -> bool:
        """Whether it hits the next one; which ones are hit follows from the seed."""
        return self.chance.random() < share

    def document(self) -> dict[str, Any]:
        """The fault as `GET /faults` shows it."""
        return {
            "id": self.id,
            "fault": self.asked.model_dump(),
            "started_at": timestamp(round(self.started_at * 1e9)),
            "ends_at": timestamp(round((self.started_at + self.asked.ttl_seconds) * 1e9)),
            "hits": self.hits,
        }


class Faults:
    """The faults that are on, and the timeline of what they did: the ground truth to score a detector against."""

    def __init__(self, timeline: Path | None, routes: Collection[BaseRoute]) -> None:
        """Begin without any.

        Args:
            timeline: a file to which each beginning, hit and end is appended as a line of JSON.
            routes: those whose requests may be hit.
        """
        self.routes = routes
        self._templates = {str(getattr(route, "path_format", "")) for route in routes}
        self._path = timeline
        self._file: IO[bytes] | None = None
        self._db: Database | None = None
        self._on: dict[str, Fault] = {}
        self._of_requests: list[Fault] = []
        self._ids = itertools.count(1)
        for kind in KINDS:
            FAULT_INJECTION_ACTIVE.labels(kind).set(0)
            FAULT_INJECTION_HITS.labels(kind)

    @asynccontextmanager
    async def possible(self, db: Database) -> AsyncIterator[None]:
        """Let faults be begun; all end with the block."""
        self._db = db
        try:
            self._file = None if self._path is None else self._path.open("ab", buffering=0)
        except OSError as exc:
            raise SettingsError(f"FAULTS_TIMELINE: cannot be written ({exc.strerror})") from exc
        try:
            yield
        finally:
            for fault in tuple(self._on.values()):
                self.end(fault.id, why="shutdown")
            if self._file is not None:
                self._file.close()
            self._file = self._db = None

    def begin(self, asked: Any) -> Fault:
        """Begin a fault.

        Raises:
            Validation: there is no such route, or none that may be hit.
            InvalidState: there are enough, or one of its kind, which hits the whole process.
        """
        if getattr(asked, "route", None) not in {None, *self._templates}:
            raise Validation(f"route: is one of {', '.join(sorted(self._templates))}")
        if len(self._on) >= _MOST_AT_ONCE:
            raise InvalidState(f"there may be {_MOST_AT_ONCE} faults at once")
        if asked.kind not in _OF_REQUESTS and any(
            asked.kind == other.asked.kind for other in self._on.values()
        ):
            raise InvalidState(f"there is a fault {asked.kind} already")
        fault = Fault(f"f-{next(self._ids)}", asked, time.time(), random.Random(asked.seed))  # noqa: S311
        self._on[fault.id] = fault
        if asked.kind in _OF_REQUESTS:
            self._of_requests.append(fault)
        FAULT_INJECTION_ACTIVE.labels(asked.kind).inc()
        self._tell("begun", fault)
        fault.end = asyncio.get_running_loop().call_later(asked.ttl_seconds, self.end, fault.id)
        if (work := WORK.get(asked.kind)) is not None and self._db is not None:
            fault.work = asyncio.create_task(work(asked, self._db, lambda: self._hit(fault)))
        return fault

    def end(self, fault_id: str, *, why: str = "ttl") -> Fault:
        """End a fault now; *why* is for the timeline.

        Raises:
            NotFound: it has ended, or there never was one.
        """
        fault = self._on.pop(fault_id, None)
        if fault is None:
            raise NotFound(f"there is no fault {fault_id[:20]}")
        if fault in self._of_requests:
            self._of_requests.remove(fault)
        if fault.end is not None:
            fault.end.cancel()
        if fault.work is not None:
            fault.work.cancel()
        FAULT_INJECTION_ACTIVE.labels(fault.asked.kind).dec()
        self._tell("ended", fault, why=why)
        return fault

    def documents(self) -> list[dict[str, Any]]:
        """Every fault that is on, oldest first."""
        return [fault.document() for fault in self._on.values()]

    def hit_request(self, template: str, request_id: str) -> list[Any]:
        """What was asked of each fault that hits this request, oldest first."""
        struck = []
        for fault in self._of_requests:
            if fault.asked.route in {None, template} and fault.strikes(fault.asked.share):
                self._hit(fault, request_id=request_id, route=template)
                struck.append(fault.asked)
        return struck

    def payment_seconds(self, order_id: str) -> float:
        """Seconds by which the next attempt at payments is slowed down."""
        seconds = 0.0
        for fault in self._on.values():
            if fault.asked.kind == "slow_payments" and fault.strikes(fault.asked.share):
                self._hit(fault, order_id=order_id)
                seconds += fault.asked.latency_ms / 1000
        return seconds

    def _hit(self, fault: Fault, **whom: str) -> None:
        fault.hits += 1
        FAULT_INJECTION_HITS.labels(fault.asked.kind).inc()
        self._write({"event": "hit", "id": fault.id, "kind": fault.asked.kind, **whom})

    def _tell(self, event: str, fault: Fault, **more: str) -> None:
        told = {**fault.document(), "kind": fault.asked.kind, **more}
        _log.warning(f"fault_{event}", **told)
        self._write({"event": event, **told})

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(orjson.dumps({"at": timestamp(time.time_ns()), **line}) + b"\n")


class FaultyRequests:
    """An application whose requests are hit by the faults that are on; probes, metrics and `/faults` never are."""

    def __init__(self, app: ASGIApp, faults: Faults) -> None:
        self._app = app
        self._faults = faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or let it fail."""
        template = self._template(scope) if scope["type"] == "http" else None
        if template is None:
            await self._app(scope, receive, send)
            return
        struck = self._faults.hit_request(template, scope["request_id"].decode())
        if struck:
            scope["log"]["faults"] = [asked.kind for asked in struck]
        for asked in struck:
            if asked.kind == "latency":
                await asyncio.sleep(asked.latency_ms / 1000)
            elif asked.kind == "error":
                refusal = _REFUSALS[asked.status]("a fault that was asked for")
                scope["log"]["error_type"] = refusal.error_type
                await send_problem(refusal, send)
                return
            else:
                await send({"type": "http.response.abort"})
                return
        await self._app(scope, receive, send)

    def _template(self, scope: Scope) -> str | None:
        """The template of the route that will serve the request; None where it may not be hit."""
        asked = {**scope, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}
        if read_target(asked) is None:
            for route in self._faults.routes:
                if route.matches(asked)[0] is Match.FULL:
                    scope["route"] = route  # for the access line, where nothing else comes to serve it
                    return str(getattr(route, "path_format", ""))
        return None


class _Injected(Unavailable):
    """A fault that was asked for."""

    error_type = "internal"


_REFUSALS: dict[int, type[ServiceError]] = {500: InternalError, 503: _Injected, 504: DeadlineExceeded}
