"""The service with one fault, to be started in its place: `python -m tests.support.faulty_services FAULT`.

Each is `python -m app` around whose application something is wrapped; the product has no switch for any of it.
"""

import asyncio
import contextlib
import hashlib
import itertools
import os
import sys
import threading
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import psycopg2
from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

import app.__main__ as service
from app.main import create_app

_HELD_CONNECTIONS = 40  # of 50: four fifths of the pool
_BALLAST_BYTES = 1_700 * 2**20  # of 2 GiB: more than four fifths


class FaultyService:
    """An ASGI application around the service; a subclass spoils one thing."""

    def __init__(self, inner: FastAPI) -> None:
        self.inner = inner
        self.numbers = itertools.count(1)  # of the orders

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] == "/orders":
            await self.order(scope, receive, send)
        else:
            await self.inner(scope, receive, send)

    async def order(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer `POST /orders`."""
        await self.inner(scope, receive, send)


class _Delayed(FaultyService):
    """One order in `every` takes `seconds` longer."""

    every = 1
    seconds = 0.0

    async def order(self, scope: Scope, receive: Receive, send: Send) -> None:
        if next(self.numbers) % self.every == 0:
            await asyncio.sleep(self.seconds)
        await self.inner(scope, receive, send)


class Slow(_Delayed):
    """The mean is above 200 ms, and no percentile above its limit."""

    seconds = 0.25


class SlowTwelfth(_Delayed):
    """The 95th percentile is above 500 ms."""

    every = 12
    seconds = 0.7


class SlowFortieth(_Delayed):
    """The 99th percentile is above 1 s."""

    every = 40
    seconds = 1.5


class Failing(FaultyService):
    """One order in twenty is refused with 503."""

    every = 20
    problem = (503, "overloaded")

    async def order(self, scope: Scope, receive: Receive, send: Send) -> None:
        if next(self.numbers) % self.every:
            await self.inner(scope, receive, send)
            return
        await _read(receive)
        status, error_type = self.problem
        await _answer(send, status, {"error_type": error_type, "outcome": "not_executed"})


class Crashing(Failing):
    """One order in two hundred meets a defect: fewer than 1 %."""

    every = 200
    problem = (500, "internal")


class Picky(Failing):
    """One order in twenty is refused as the client's fault."""

    problem = (422, "unknown_product")


class HoldingThePool(FaultyService):
    """Four fifths of the pool are lent all the time."""

    _holders: asyncio.Future[Any] | None = None

    async def order(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._holders is None:
            held = (self._hold(scope["state"]["orders"]._db) for _ in range(_HELD_CONNECTIONS))
            self._holders = asyncio.ensure_future(asyncio.gather(*held))
        await self.inner(scope, receive, send)

    async def _hold(self, db: Any) -> None:
        while True:
            await db.run("SELECT pg_sleep(1)")


class BurningCpu(FaultyService):
    """A thread outside of the interpreter's lock keeps a core busy."""

    def __init__(self, inner: FastAPI) -> None:
        super().__init__(inner)
        threading.Thread(target=self._spin, daemon=True).start()

    def _spin(self) -> None:
        block = bytes(1 << 20)
        while True:
            hashlib.sha256(block)


class Bloated(FaultyService):
    """Its memory is nearly full."""

    def __init__(self, inner: FastAPI) -> None:
        super().__init__(inner)
        self._ballast = bytearray(_BALLAST_BYTES)
        self._ballast[::4096] = b"x" * len(
            self._ballast[::4096]
        )  # a page that was never written is not resident


class StoringNothing(FaultyService):
    """Acknowledges every tenth order and stores nothing."""

    async def order(self, scope: Scope, receive: Receive, send: Send) -> None:
        if next(self.numbers) % 10:
            await self.inner(scope, receive, send)
            return
        await _read(receive)
        await _answer(send, 201, {"id": str(uuid.uuid4())})


class StoringTwice(FaultyService):
    """Stores every tenth order once more."""

    async def order(self, scope: Scope, receive: Receive, send: Send) -> None:
        if next(self.numbers) % 10:
            await self.inner(scope, receive, send)
            return
        body = await _read(receive)
        await self.inner(scope, _replay(body), send)
        again = {
            **scope,
            "headers": [(name, value) for name, value in scope["headers"] if name != b"idempotency-key"],
        }
        await self.inner(again, _replay(body), _discard)


class Dropping(FaultyService):
    """Deletes every tenth order after it was acknowledged."""

    async def order(self, scope: Scope, receive: Receive, send: Send) -> None:
        if next(self.numbers) % 10:
            await self.inner(scope, receive, send)
            return
        answer = bytearray()

        async def note(message: Message) -> None:
            answer.extend(message.get("body", b""))
            await send(message)

        await self.inner(scope, receive, note)
        await asyncio.to_thread(self._delete, orjson.loads(bytes(answer))["id"])

    def _delete(self, order_id: str) -> None:
        with (
            contextlib.closing(psycopg2.connect(os.environ["DATABASE_URL"])) as connection,
            connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("DELETE FROM orders WHERE id = %s", (order_id,))


async def _read(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


def _replay(body: bytes) -> Receive:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _discard(_message: Message) -> None:
    pass


async def _answer(send: Send, status: int, document: dict[str, str]) -> None:
    body = orjson.dumps(document)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


FAULTS: dict[str, Callable[[FastAPI], Callable[..., Awaitable[None]]]] = {
    "none": FaultyService,
    "slow": Slow,
    "slow_twelfth": SlowTwelfth,
    "slow_fortieth": SlowFortieth,
    "failing": Failing,
    "crashing": Crashing,
    "picky": Picky,
    "holds_the_pool": HoldingThePool,
    "burns_cpu": BurningCpu,
    "bloated": Bloated,
    "stores_nothing": StoringNothing,
    "stores_twice": StoringTwice,
    "drops": Dropping,
}


def main() -> int:
    """Serve with the fault that the command line names."""
    fault = FAULTS[sys.argv.pop(1)]

    def create(*arguments: Any) -> Any:
        return fault(create_app(*arguments))

    vars(service)["create_app"] = create
    return service.main([])


if __name__ == "__main__":
    sys.exit(main())
