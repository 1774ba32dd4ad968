"""The service with one fault, to be started in its place: `python -m tests.support.faulty_services FAULT`.

Each is `python -m app` around whose application something is wrapped; the product has no switch for any of it.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import psycopg2
from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

import app.__main__ as service
from app.main import create_app

_HELD_CONNECTIONS = 40  # of 50: four fifths of the pool
_CREATED = 201
_BALLAST_BYTES = 1_700 * 2**20  # of 2 GiB: more than four fifths


@dataclasses.dataclass
class Answer:
    """A whole answer, to be looked at and changed before it is sent."""

    status: int = 0
    headers: list[tuple[bytes, bytes]] = dataclasses.field(default_factory=list)
    body: bytes = b""

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = orjson.loads(self.body)
        return found

    def of(self, order: dict[str, Any]) -> "Answer":
        """The same of another *order*, its Location too."""
        headers = [
            (name, f"/orders/{order['id']}".encode() if name == b"location" else value)
            for name, value in self.headers
        ]
        return Answer(self.status, headers, orjson.dumps(order))

    async def note(self, message: Message) -> None:
        """Take a message of the service's."""
        self.status = message.get("status", self.status)
        self.headers += [tuple(pair) for pair in message.get("headers", ())]
        self.body += message.get("body", b"")

    async def send(self, send: Send) -> None:
        """Send it, with the length that it has now."""
        headers = [pair for pair in self.headers if pair[0] != b"content-length"]
        headers.append((b"content-length", b"%d" % len(self.body)))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


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

    async def ask(self, scope: Scope, body: bytes) -> Answer:
        """The service's own answer to a request of *body*."""
        headers = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
        headers.append((b"content-length", b"%d" % len(body)))
        answer = Answer()
        await self.inner(_with_headers(scope, headers), _replay(body), answer.note)
        return answer


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
    """Acknowledges every tenth order, as the order that it would be, and does not keep it."""

    async def order(self, scope: Scope, receive: Receive, send: Send) -> None:
        if next(self.numbers) % 10:
            await self.inner(scope, receive, send)
            return
        answer = await self.ask(scope, await _read(receive))
        await asyncio.to_thread(_delete, answer.document["id"])
        await answer.send(send)


class StoringTwice(FaultyService):
    """Stores every tenth order once more."""

    async def order(self, scope: Scope, receive: Receive, send: Send) -> None:
        if next(self.numbers) % 10:
            await self.inner(scope, receive, send)
            return
        body = await _read(receive)
        await self.inner(scope, _replay(body), send)
        again = _with_headers(scope, [pair for pair in scope["headers"] if pair[0] != b"idempotency-key"])
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
        await asyncio.to_thread(_delete, orjson.loads(bytes(answer))["id"])


class Maintained(FaultyService):
    """A page in place of every second answer, with a status that is no error."""

    status = 200

    async def order(self, scope: Scope, receive: Receive, send: Send) -> None:
        if next(self.numbers) % 2:
            await self.inner(scope, receive, send)
            return
        await _read(receive)
        page = b"<html>We are back soon.</html>"
        await Answer(self.status, [(b"content-type", b"text/html"), (b"location", b"/soon")], page).send(send)


class Redirecting(Maintained):
    """Every second order is sent elsewhere."""

    status = 302


class Changing(FaultyService):
    """The answer to every `every`-th order is changed; a subclass says how."""

    every = 10

    async def order(self, scope: Scope, receive: Receive, send: Send) -> None:
        if next(self.numbers) % self.every:
            await self.inner(scope, receive, send)
            return
        answer = await self.ask(scope, await _read(receive))
        if answer.status == _CREATED:
            answer = answer.of(self.changed(answer.document))
        await answer.send(send)

    def changed(self, order: dict[str, Any]) -> dict[str, Any]:
        return order


class Swapping(Changing):
    """Each client gets the id of the order before its own."""

    every = 1
    _before = ""

    def changed(self, order: dict[str, Any]) -> dict[str, Any]:
        own, before = order["id"], self._before
        self._before = own
        return {**order, "id": before or own}


class TellingTwice(Swapping):
    """Every tenth client gets the id that another was told before."""

    every = 10

    def changed(self, order: dict[str, Any]) -> dict[str, Any]:
        self._before = self._before or order["id"]
        return {**order, "id": self._before}


class Overcharging(Changing):
    """A cent more than the lines come to."""

    def changed(self, order: dict[str, Any]) -> dict[str, Any]:
        return {**order, "total_cents": order["total_cents"] + 1}


class Altering(FaultyService):
    """Every tenth order is stored with a piece more, and answered as it was sent."""

    async def order(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        if next(self.numbers) % 10:
            await self.inner(scope, _replay(body), send)
            return
        sent = orjson.loads(body)
        sent["items"][0]["quantity"] += 1
        answer = await self.ask(scope, orjson.dumps(sent))
        order = answer.document
        order["items"][0]["quantity"] -= 1
        order["total_cents"] -= order["items"][0]["unit_price_cents"]
        await answer.of(order).send(send)


class Forgetting(FaultyService):
    """A key that was seen before is a new one."""

    def __init__(self, inner: FastAPI) -> None:
        super().__init__(inner)
        self._seen: set[bytes] = set()

    async def order(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = dict(scope["headers"]).get(b"idempotency-key", b"")
        if key in self._seen:
            others = [(name, value) for name, value in scope["headers"] if name != b"idempotency-key"]
            scope = _with_headers(scope, others)
        self._seen.add(key)
        await self.inner(scope, receive, send)


class StandingStill(FaultyService):
    """All of it stands still for some seconds, once."""

    at_order = 700
    seconds = 3.6

    async def order(self, scope: Scope, receive: Receive, send: Send) -> None:
        if next(self.numbers) == self.at_order:
            time.sleep(self.seconds)  # the event loop, too  # noqa: ASYNC251
        await self.inner(scope, receive, send)


class FailingForAMoment(Failing):
    """Fewer than 1 % of all orders fail, all of them close together."""

    problem = (503, "overloaded")

    async def order(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not 1000 <= next(self.numbers) < 1015:
            await self.inner(scope, receive, send)
            return
        await _read(receive)
        await _answer(send, 503, {"error_type": "overloaded", "outcome": "not_executed"})


class LateAndFailing(FaultyService):
    """Seven of a thousand orders fail, and seven others are late: each allowance for itself is kept."""

    async def order(self, scope: Scope, receive: Receive, send: Send) -> None:
        place = next(self.numbers) % 140
        if place == 0:
            await _read(receive)
            await _answer(send, 503, {"error_type": "overloaded", "outcome": "not_executed"})
            return
        if place == 1:
            await asyncio.sleep(1.5)
        await self.inner(scope, receive, send)


class BadGateway(FaultyService):
    """A gateway's page for one order in three hundred."""

    async def order(self, scope: Scope, receive: Receive, send: Send) -> None:
        if next(self.numbers) % 300:
            await self.inner(scope, receive, send)
            return
        await _read(receive)
        await Answer(502, [(b"content-type", b"text/html")], b"<html>Bad Gateway</html>").send(send)


class FalselySoldOut(Failing):
    """One order in ten is refused as sold out, and nothing is."""

    every = 10
    problem = (409, "out_of_stock")


class OtherRequests(FaultyService):
    """Orders are taken as they should be; a subclass spoils other requests."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/metrics":
            await self.inner(scope, receive, send)
        else:
            await self.other(scope, receive, send)

    async def other(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is no order."""
        await self.inner(scope, receive, send)


class FailingReads(OtherRequests):
    """No order can be looked at."""

    async def other(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "GET" and scope["path"].startswith("/orders/"):
            await _answer(send, 503, {"error_type": "database", "outcome": "not_executed"})
        else:
            await self.inner(scope, receive, send)


class SlowReads(OtherRequests):
    """Each read of a product takes a second and more."""

    async def other(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith("/products/"):
            await asyncio.sleep(1.2)
        await self.inner(scope, receive, send)


class MixingUpReads(OtherRequests):
    """Every product's page is that of one product."""

    async def other(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith("/products/"):
            scope = {**scope, "path": "/products/SKU-0001", "raw_path": b"/products/SKU-0001"}
        await self.inner(scope, receive, send)


class ForgettingCancellations(OtherRequests):
    """A cancellation is acknowledged, and nothing is cancelled."""

    async def other(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].endswith("/cancel"):
            await self.inner(scope, receive, send)
            return
        path = scope["path"].removesuffix("/cancel")
        answer = await self.ask({**scope, "method": "GET", "path": path, "raw_path": path.encode()}, b"")
        await answer.of({**answer.document, "status": "cancelled"}).send(send)


class RefusingCancellations(OtherRequests):
    """No order may be cancelled, though each is confirmed."""

    async def other(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].endswith("/cancel"):
            await _answer(send, 409, {"error_type": "invalid_state", "outcome": "not_executed"})
        else:
            await self.inner(scope, receive, send)


def _delete(order_id: str) -> None:
    with (
        contextlib.closing(psycopg2.connect(os.environ["DATABASE_URL"])) as connection,
        connection,
        connection.cursor() as cursor,
    ):
        cursor.execute("DELETE FROM orders WHERE id = %s", (order_id,))


def _with_headers(scope: Scope, headers: list[tuple[bytes, bytes]]) -> Scope:
    """The same request with *headers*, which our server has also by their names."""
    return {**scope, "headers": headers, "headers_by_name": None}


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
    await Answer(status, [(b"content-type", b"application/json")], orjson.dumps(document)).send(send)


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
    "maintained": Maintained,
    "redirects": Redirecting,
    "swaps": Swapping,
    "tells_twice": TellingTwice,
    "overcharges": Overcharging,
    "alters": Altering,
    "forgets_keys": Forgetting,
    "stands_still": StandingStill,
    "fails_for_a_moment": FailingForAMoment,
    "late_and_failing": LateAndFailing,
    "bad_gateway": BadGateway,
    "falsely_sold_out": FalselySoldOut,
    "failing_reads": FailingReads,
    "slow_reads": SlowReads,
    "mixes_up_reads": MixingUpReads,
    "forgets_cancellations": ForgettingCancellations,
    "refuses_cancellations": RefusingCancellations,
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
