"""A small application behind the service's own HTTP server, and its clients, over real sockets."""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from app.server.protocol import Limits
from app.server.serve import _Server

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
QUICK = 0.02  # seconds between sweeps


class Echo:
    """Answers with the request's body.

    /held waits until released, /early answers 413 before it reads; /late reads first when released, and /wait never
    answers: both end when their client has.
    """

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[tuple[bytes, bytes]] = []
        self.held = asyncio.Event()
        self.release = asyncio.Event()
        self.ended = asyncio.Event()
        self.answer: bytes | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/early":
            await self._send(send, 413, b"too large", [(b"connection", b"close")])
            return
        if scope["path"] == "/late":
            await self.release.wait()
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.ended.set()
                return
            body += message["body"]
            if scope["path"] == "/wait":
                self.held.set()
            elif not message["more_body"]:
                break
        self.bodies.append(body)
        self.headers = scope["headers"]
        if scope["path"] == "/held":
            self.held.set()
            await self.release.wait()
        await self._send(send, 200, body if self.answer is None else self.answer, [])

    async def _send(self, send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        length = (b"content-length", b"%d" % len(body))
        await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
        await send({"type": "http.response.body", "body": body})


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110  # the server has no events for what tests ask
        await asyncio.sleep(QUICK)


@dataclass
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def answer(self) -> tuple[int, bytes, bytes]:
        """Status, head and body of the next answer."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length
        return int(head.split()[1]), head, await self.reader.readexactly(int(length[1]))

    async def trickle(self, data: bytes = b"a") -> None:
        """Send *data* again and again until the server has enough."""
        with contextlib.suppress(ConnectionError):
            while not self.reader.at_eof() and not self.writer.is_closing():
                self.writer.write(data)
                await self.writer.drain()
                await asyncio.sleep(QUICK)


class Service:
    def __init__(self, server: _Server, echo: Echo, port: int) -> None:
        self.server, self.echo, self.port = server, echo, port
        self.clients: list[Client] = []

    async def connect(self, first: bytes = b"") -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        client.writer.write(first)
        self.clients.append(client)
        return client

    async def sweeps(self, number: int) -> None:
        """Wait until the server has looked at its clock so many times more."""
        end = self.server.connections.sweeps + number
        await until(lambda: self.server.connections.sweeps >= end)

    async def until_all_are_closed(self) -> None:
        await until(lambda: not self.server.open)


@contextlib.asynccontextmanager
async def serving(**limits: Any) -> AsyncIterator[Service]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        echo = Echo()
        server = _Server(echo, [listener], Limits(**{"sweep_seconds": QUICK, **limits}), {})
        async with server:
            service = Service(server, echo, listener.getsockname()[1])
            try:
                async with asyncio.timeout(30):
                    yield service
            finally:
                echo.release.set()
                for client in service.clients:
                    client.writer.close()
                async with asyncio.timeout(10):
                    await service.until_all_are_closed()


def assert_refused(answer: tuple[int, bytes, bytes], status: int, error_type: str) -> None:
    got, head, body = answer
    assert got == status
    assert b"content-type: application/problem+json\r\n" in head
    assert b"connection: close\r\n" in head
    assert re.search(rb"\r\nx-request-id: \S+\r\n", head)
    problem = json.loads(body)
    assert problem.keys() == {"type", "title", "status", "detail", "error_type", "outcome"}
    assert problem["status"] == status
    assert (problem["error_type"], problem["outcome"]) == (error_type, "not_executed")
