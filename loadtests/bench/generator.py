"""A closed-loop HTTP/1.1 generator that costs little: about a tenth of what it drives.

Each connection sends a request, waits for the whole answer, and sends the next. Requests are made up beforehand, so
that while it runs nothing is done but sending, receiving, and noting what came back.
"""

import asyncio
import itertools
import random
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast
from urllib.parse import urlsplit

import orjson

SHIPPED_PRODUCTS = [f"SKU-{number:04d}" for number in range(1, 1001)]  # what the service starts with

_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
_ID = re.compile(rb'"id" *: *"?([^",}]+)')
_PATIENCE_SECONDS = 60.0  # for the answers still due when the time is up


class Requests(Protocol):
    """A source of requests; each connection takes its next one from here."""

    def next(self) -> bytes:
        """The next request, as it goes over the wire."""


class OrderRequests:
    """`POST /orders` of *lines* lines over *product_ids*, each order with a key of its own."""

    def __init__(
        self,
        url: str,
        product_ids: Sequence[str] = SHIPPED_PRODUCTS,
        *,
        lines: int = 2,
        seed: int = 1,
        variants: int = 512,
    ) -> None:
        choose = random.Random(seed)  # noqa: S311 - repeatable, not secret
        run = uuid.uuid4().hex
        self.customer_id = f"bench-{run[:8]}"
        self._keys = itertools.count(1)
        self._variants = []
        for _ in range(variants):
            items = [
                {"product_id": product_id, "quantity": choose.randint(1, 3)}
                for product_id in choose.sample(product_ids, lines)
            ]
            body = orjson.dumps({"customer_id": self.customer_id, "items": items})
            head = (
                f"POST /orders HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nIdempotency-Key: {run}-"
            )
            self._variants.append((head.encode(), b"\r\n\r\n" + body))

    def next(self) -> bytes:
        """The next order."""
        key = next(self._keys)
        head, body = self._variants[key % len(self._variants)]
        return b"%s%d%s" % (head, key, body)


class ReadRequests:
    """`GET` of *paths*, one after the other, over and over."""

    def __init__(self, url: str, paths: Iterable[str]) -> None:
        host = urlsplit(url).netloc
        self._requests = itertools.cycle(
            [f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode() for path in paths]
        )

    def next(self) -> bytes:
        """The next read."""
        return next(self._requests)


@dataclass
class Tally:
    """The answers of a run, as its clients saw them."""

    latencies_seconds: list[float] = field(default_factory=list)  # of the answers with a 2xx status
    answered_at: list[float] = field(default_factory=list)  # when each of them came, by time.perf_counter
    # The first "id" in each of them; "": it has none.
    acknowledged_ids: list[str] = field(default_factory=list)
    refused: int = 0  # answers with any other status
    broken: int = 0  # connections that ended with an answer still due
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of this process, while it ran


async def drive(url: str, requests: Requests, *, connections: int, seconds: float) -> Tally:
    """Keep *connections* connections busy for *seconds*; every answer that is due then is still waited for.

    Raises:
        ConnectionError: nothing listens at *url* (any more).
        TimeoutError: an answer took a minute longer than *seconds*.
    """
    tally = Tally()
    target = urlsplit(url)
    host, port = target.hostname or "127.0.0.1", target.port or 80
    started_at, cpu_at = time.perf_counter(), time.process_time()
    ends_at = started_at + seconds
    loop = asyncio.get_running_loop()

    async def keep_busy() -> None:
        while time.perf_counter() < ends_at:  # a server may close a connection: go on with a new one
            _, connection = await loop.create_connection(
                lambda: _Connection(requests, tally, ends_at), host, port
            )
            await connection.closed

    try:
        async with asyncio.timeout(seconds + _PATIENCE_SECONDS), asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(keep_busy())
    except TimeoutError as exc:
        raise TimeoutError(f"{url}: no answer") from exc
    # Not `except*`: an error raised in one comes out in a group, in some releases of 3.11.
    except ExceptionGroup as errors:
        first = errors.exceptions[0]
        if isinstance(first, OSError):
            raise ConnectionError(f"{url}: {first}") from first
        raise
    tally.seconds = time.perf_counter() - started_at
    tally.cpu_seconds = time.process_time() - cpu_at
    return tally


class _Connection(asyncio.Protocol):
    def __init__(self, requests: Requests, tally: Tally, ends_at: float) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._requests = requests
        self._tally = tally
        self._ends_at = ends_at
        self._received = b""
        self._waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def _send(self) -> None:
        self._received = b""
        self._waiting = True
        self._sent_at = time.perf_counter()
        self._transport.write(self._requests.next())

    def data_received(self, data: bytes) -> None:
        self._received += data
        head_end = self._received.find(b"\r\n\r\n")
        if head_end >= 0 and self._waiting and _is_complete(self._received, head_end):
            self._note_answer(head_end)
            if time.perf_counter() >= self._ends_at or _CLOSE.search(self._received, 0, head_end + 2):
                self._transport.close()
            else:
                self._send()

    def _note_answer(self, head_end: int) -> None:
        self._waiting = False
        if self._received.startswith(b"HTTP/1.1 2"):
            now = time.perf_counter()
            self._tally.answered_at.append(now)
            self._tally.latencies_seconds.append(now - self._sent_at)
            found = _ID.search(self._received, head_end)
            self._tally.acknowledged_ids.append(found[1].decode() if found else "")
        else:
            self._tally.refused += 1

    def connection_lost(self, exc: Exception | None) -> None:
        head_end = self._received.find(b"\r\n\r\n")
        if (
            self._waiting
            and exc is None
            and head_end >= 0
            and _ends_with_connection(self._received, head_end)
        ):
            self._note_answer(head_end)
        if self._waiting:
            self._tally.broken += 1
        if not self.closed.done():
            self.closed.set_result(None)


def _is_complete(received: bytes, head_end: int) -> bool:
    """True where *received* holds a whole answer; one that only the connection's end completes never is."""
    body_at = head_end + 4
    length = _CONTENT_LENGTH.search(received, 0, head_end + 2)
    if length is not None:
        return len(received) >= body_at + int(length[1])
    return _CHUNKED.search(received, 0, head_end + 2) is not None and _has_last_chunk(received, body_at)


def _has_last_chunk(received: bytes, at: int) -> bool:
    while (line_end := received.find(b"\r\n", at)) >= 0:
        size = int(received[at:line_end].partition(b";")[0], 16)
        if size == 0:
            return received.find(b"\r\n\r\n", line_end) >= 0  # behind the trailers, if there are any
        at = line_end + 2 + size + 2
    return False


def _ends_with_connection(received: bytes, head_end: int) -> bool:
    """True where the answer names no length (RFC 9112, 6.3)."""
    head = received[: head_end + 2]
    return _CONTENT_LENGTH.search(head) is None and _CHUNKED.search(head) is None
