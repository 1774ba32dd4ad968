"""A cheap asyncio client of the order API that writes down what it was told.

It never repeats a request by itself: every attempt stands in the history, with what its answer promised.
"""

import asyncio
import itertools
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import urlsplit

# What a client knows after an attempt; `stored` is an acknowledgement.
Outcome = Literal["stored", "not_executed", "unknown"]

_SERIAL = itertools.count(1)
_RUN = uuid.uuid4().hex[:8]


def _unique(prefix: str) -> str:
    return f"{prefix}-{_RUN}-{next(_SERIAL)}"


@dataclass(frozen=True, slots=True)
class OrderRequest:
    """One order a customer wants once, however often it is sent; its `customer_id` is unique, and so names it."""

    items: tuple[tuple[str, int], ...]  # (product_id, quantity)
    key: str | None = None
    customer_id: str = field(default_factory=lambda: _unique("c"))

    @classmethod
    def keyed(cls, *items: tuple[str, int]) -> Self:
        """An order with an idempotency key of its own."""
        return cls(items, _unique("k"))

    def document(self) -> dict[str, Any]:
        """The JSON of `POST /orders`."""
        return {
            "customer_id": self.customer_id,
            "items": [
                {"product_id": product_id, "quantity": quantity} for product_id, quantity in self.items
            ],
        }


@dataclass(frozen=True, slots=True)
class Attempt:
    """A request that was sent, and what came back.

    `status` is 0, `document` and `body` are empty, where no answer came; `error_type` then is `unreachable` (no
    connection, so nothing was sent), `no_answer` (it broke, or took too long) or `left` (we went away).
    """

    request: OrderRequest
    outcome: Outcome
    status: int
    error_type: str  # "" where it was acknowledged
    document: dict[str, Any]  # the order, or the problem
    body: bytes  # as it came; of a batch, nothing
    replayed: bool
    started_at: float  # monotonic seconds
    ended_at: float

    @property
    def acknowledged(self) -> bool:
        """Whether the service said that the order is stored."""
        return self.outcome == "stored"

    @property
    def order_id(self) -> str:
        """The id of the acknowledged order."""
        return str(self.document["id"])

    @property
    def seconds(self) -> float:
        """How long the answer took."""
        return self.ended_at - self.started_at


class Answer(NamedTuple):
    """An HTTP answer; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


class Unreachable(ConnectionError):
    """No connection could be opened: nothing was sent."""


class OrderClient:
    """Sends orders over kept connections, as many as there are requests at once.

    `history` holds every attempt in the order they ended; several clients may write into one.
    """

    def __init__(
        self,
        url: str,
        *,
        history: list[Attempt] | None = None,
        timeout_seconds: float = 60,
        headers: dict[str, str] | None = None,
    ) -> None:
        """*url* is the service's; *headers* go with every request."""
        address = urlsplit(url)
        self._host, self._port = address.hostname or "", address.port or 80
        self._timeout_seconds = timeout_seconds
        self._headers = {"Host": address.netloc, **(headers or {})}
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._open: set[asyncio.StreamWriter] = set()
        self.history: list[Attempt] = [] if history is None else history

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        writers = [writer for _, writer in self._idle]
        self._idle.clear()
        for writer in writers:
            writer.transport.abort()
        # The event loop may end right after this: a transport must not.
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)

    async def place(self, request: OrderRequest) -> Attempt:
        """Send one order to `POST /orders`.

        Cancelling it closes the connection, as a customer does who goes away; the attempt is noted as `left`.
        """
        key = {} if request.key is None else {"Idempotency-Key": request.key}
        started_at = time.monotonic()
        try:
            answer = await self.send("POST", "/orders", request.document(), headers=key)
        except Unreachable:
            return self._note(request, started_at, "unreachable", "not_executed")
        except (OSError, EOFError):  # a TimeoutError is an OSError
            return self._note(request, started_at, "no_answer")
        except asyncio.CancelledError:
            self._note(request, started_at, "left")
            raise
        document = answer.json() if "json" in answer.headers.get("content-type", "") else {}
        replayed = answer.headers.get("idempotency-replayed") == "true"
        return self._read(request, started_at, answer.status, document, answer.body, replayed=replayed)

    async def place_batch(self, requests: Sequence[OrderRequest]) -> list[Attempt]:
        """Send orders to `POST /orders/batch`: one attempt each."""
        orders = [
            request.document() | ({} if request.key is None else {"idempotency_key": request.key})
            for request in requests
        ]
        started_at = time.monotonic()
        try:
            answer = await self.send("POST", "/orders/batch", {"orders": orders})
        except Unreachable:
            return [self._note(request, started_at, "unreachable", "not_executed") for request in requests]
        except (OSError, EOFError):
            return [self._note(request, started_at, "no_answer") for request in requests]
        if answer.status != 200:
            return [
                self._read(request, started_at, answer.status, answer.json(), b"", replayed=False)
                for request in requests
            ]
        return [
            self._read(
                request,
                started_at,
                result["status"],
                result.get("order") or result["error"],
                b"",
                replayed=result.get("replayed", False),
            )
            for request, result in zip(requests, answer.json()["results"], strict=True)
        ]

    async def cancel(self, order_id: str) -> Answer:
        """Cancel an order; raises OSError or EOFError where no answer comes."""
        return await self.send("POST", f"/orders/{order_id}/cancel")

    async def send(
        self, method: str, path: str, document: object = None, *, headers: dict[str, str] | None = None
    ) -> Answer:
        """Send any request once, and read its answer.

        Raises:
            Unreachable: nothing was sent.
            OSError, EOFError: no answer.
        """
        body = b"" if document is None else json.dumps(document).encode()
        fields = {**self._headers, **(headers or {}), "Content-Length": str(len(body))}
        if body:
            fields["Content-Type"] = "application/json"
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        async with asyncio.timeout(self._timeout_seconds):
            reader, writer = await self._connection()
            try:
                writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body)
                answer = await _read_answer(reader)
            except BaseException:
                self._drop(writer)
                raise
        if answer.headers.get("connection", "").lower() == "close":
            self._drop(writer)
        else:
            self._idle.append((reader, writer))
        return answer

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """An idle connection that the server has not closed, or a new one."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
            self._drop(writer)
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port)
        except OSError as exc:
            raise Unreachable(str(exc)) from exc
        self._open.add(writer)
        return reader, writer

    def _drop(self, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()
        self._open.discard(writer)

    def _read(
        self,
        request: OrderRequest,
        started_at: float,
        status: int,
        document: dict[str, Any],
        body: bytes,
        *,
        replayed: bool,
    ) -> Attempt:
        """Note an attempt that was answered; what is neither an order nor a problem says nothing."""
        outcome: Outcome = "stored" if status == 201 else document.get("outcome", "unknown")
        error_type = "" if status == 201 else document.get("error_type", "")
        return self._append(
            Attempt(
                request,
                outcome,
                status,
                error_type,
                document,
                body,
                replayed,
                started_at,
                time.monotonic(),
            )
        )

    def _note(
        self, request: OrderRequest, started_at: float, error_type: str, outcome: Outcome = "unknown"
    ) -> Attempt:
        """Note an attempt that was not answered."""
        return self._append(
            Attempt(request, outcome, 0, error_type, {}, b"", False, started_at, time.monotonic())  # noqa: FBT003
        )

    def _append(self, attempt: Attempt) -> Attempt:
        self.history.append(attempt)
        return attempt


async def _read_answer(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    status = int(head[0].split(" ", 2)[1])
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])
    }
    return Answer(status, headers, await reader.readexactly(int(headers.get("content-length", 0))))
