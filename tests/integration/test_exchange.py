"""ASGI messages of an application on the wire, and requests from the wire in ASGI, over real sockets."""

import asyncio
import contextlib
import gc
import json
import socket
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, MutableMapping
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from app.server.protocol import Limits
from app.server.serve import _Server

Exchanged = Callable[[bytes], Coroutine[Any, Any, bytes]]


@contextlib.asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[Exchanged]:
    """Serve *app*; the value sends bytes on a connection of its own and returns all that comes back."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with _Server(app, [listener], Limits(), {"shared": 1}):

            async def exchange(request: bytes) -> bytes:
                reader, writer = await asyncio.open_connection(*listener.getsockname())
                try:
                    writer.write(request)
                    async with asyncio.timeout(10):
                        return await reader.read()
                finally:
                    writer.close()

            yield exchange


def answering(status: int, headers: list[tuple[bytes, bytes]], *parts: bytes) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for part in parts[:-1]:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": parts[-1]})

    return app


def request(method: bytes = b"GET", target: bytes = b"/", body: bytes = b"") -> bytes:
    length = b"Content-Length: %d\r\n" % len(body) if body else b""
    return b"%b %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%b\r\n%b" % (method, target, length, body)


def split(answer: bytes) -> tuple[bytes, set[bytes], bytes]:
    """Status line, header lines without the date, body."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    dates = [line for line in lines if line.startswith(b"date: ")]
    assert len(dates) == 1
    return status, {*lines} - {*dates}, body


LENGTH = [(b"content-length", b"5")]


@pytest.mark.parametrize(
    ("app", "method", "expected"),
    [
        pytest.param(
            answering(200, LENGTH, b"hello"),
            b"GET",
            (b"HTTP/1.1 200 OK", {b"content-length: 5", b"connection: close"}, b"hello"),
            id="length",
        ),
        pytest.param(
            answering(200, LENGTH, b"he", b"", b"llo"),
            b"GET",
            (b"HTTP/1.1 200 OK", {b"content-length: 5", b"connection: close"}, b"hello"),
            id="length, in parts",
        ),
        pytest.param(
            answering(200, [(b"connection", b"Close"), *LENGTH], b"hello"),
            b"GET",
            (b"HTTP/1.1 200 OK", {b"content-length: 5", b"connection: close"}, b"hello"),
            id="closed by the application, said once",
        ),
        pytest.param(
            answering(200, [], b"he", b"", b"llo"),
            b"GET",
            (
                b"HTTP/1.1 200 OK",
                {b"transfer-encoding: chunked", b"connection: close"},
                b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
            ),
            id="no length",
        ),
        pytest.param(
            answering(200, LENGTH, b"hello"),
            b"HEAD",
            (b"HTTP/1.1 200 OK", {b"content-length: 5", b"connection: close"}, b""),
            id="HEAD",
        ),
        pytest.param(
            answering(200, [], b"he", b"llo"),
            b"HEAD",
            (b"HTTP/1.1 200 OK", {b"connection: close"}, b""),
            id="HEAD, no length",
        ),
        pytest.param(
            answering(204, [], b""),
            b"GET",
            (b"HTTP/1.1 204 No Content", {b"connection: close"}, b""),
            id="204",
        ),
        pytest.param(
            answering(304, [(b"etag", b"x")], b""),
            b"GET",
            (b"HTTP/1.1 304 Not Modified", {b"etag: x", b"connection: close"}, b""),
            id="304",
        ),
    ],
)
async def test_an_answer_on_the_wire(
    app: ASGIApp, method: bytes, expected: tuple[bytes, set[bytes], bytes]
) -> None:
    async with serving(app) as exchange:
        assert split(await exchange(request(method))) == expected


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()


async def failing(scope: Scope, receive: Receive, send: Send) -> None:
    raise ValueError("a defect")


async def cancelled(scope: Scope, receive: Receive, send: Send) -> None:
    waited_for = asyncio.get_running_loop().create_future()
    waited_for.cancel()
    await waited_for


@pytest.mark.parametrize(
    "app",
    [
        pytest.param(silent, id="no answer"),
        pytest.param(failing, id="an exception"),
        pytest.param(cancelled, id="a cancellation that is not its own"),
        pytest.param(answering(200, [(b"x", b"a\r\nset-cookie: b"), *LENGTH], b"hello"), id="CRLF"),
        pytest.param(answering(200, [(b"x", b"a\nset-cookie: b"), *LENGTH], b"hello"), id="LF"),
        pytest.param(answering(200, [(b"x", b"a\rset-cookie: b"), *LENGTH], b"hello"), id="CR"),
        pytest.param(answering(200, [(b"x\r\ny", b"a"), *LENGTH], b"hello"), id="in a name"),
    ],
)
async def test_a_broken_application_is_answered_for(app: ASGIApp, caplog: pytest.LogCaptureFixture) -> None:
    """With a problem that says that nobody knows what became of the request; no injected header gets out."""
    async with serving(app) as exchange:
        status, headers, body = split(await exchange(request()))
    assert status == b"HTTP/1.1 500 Internal Server Error"
    assert b"content-type: application/problem+json" in headers
    assert {line.partition(b":")[0] for line in headers} == {
        b"content-type",
        b"content-length",
        b"x-request-id",
        b"connection",
    }
    problem = json.loads(body)
    assert (problem["error_type"], problem["outcome"]) == ("internal", "unknown")


@pytest.mark.parametrize("parts", [(b"too long",), (b"toolo", b"ng"), (b"shor",), (b"", b"")])
async def test_an_answer_of_the_wrong_length_is_cut_off(parts: tuple[bytes, ...]) -> None:
    """The client sees that it is not complete, whatever was sent of it."""
    async with serving(answering(200, LENGTH, *parts)) as exchange:
        answer = await exchange(request())
    assert not answer.startswith(b"HTTP/1.1 200") or len(split(answer)[2]) < 5 or split(answer)[2] == b"toolo"


@pytest.mark.parametrize(
    ("target", "path", "raw_path", "query"),
    [
        (b"/", "/", b"/", b""),
        (b"/a/b?x=1&y=%20", "/a/b", b"/a/b", b"x=1&y=%20"),
        (b"/a%20b%2Fc?", "/a b/c", b"/a%20b%2Fc", b""),
        (b"/a?b?c", "/a", b"/a", b"b?c"),
        (b"//a", "//a", b"//a", b""),
        (b"http://x/a?b=c", "/a", b"/a", b"b=c"),
        (b"http://x?b=c", "/", b"/", b"b=c"),
        (b"*", "*", b"*", b""),
        (b"/%ff%C3%A9%", "/\ufffdé%", b"/%ff%C3%A9%", b""),
        (b"/%2561", "/%61", b"/%2561", b""),
        (b"/a#b", "/a", b"/a", b""),
    ],
)
async def test_a_request_in_asgi(target: bytes, path: str, raw_path: bytes, query: bytes) -> None:
    seen: list[MutableMapping[str, Any]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend((scope, await receive()))
        await answering(204, [], b"")(scope, receive, send)

    async with serving(app) as exchange:
        await exchange(request(b"POST", target, b"body"))
    scope, message = seen
    assert (scope["path"], scope["raw_path"], scope["query_string"]) == (path, raw_path, query)
    assert (scope["type"], scope["method"], scope["http_version"]) == ("http", "POST", "1.1")
    assert (b"host", b"x") in scope["headers"]
    assert scope["state"] == {"shared": 1}
    assert message == {"type": "http.request", "body": b"body", "more_body": False}


async def test_state_is_each_requests_own() -> None:
    """A change that one request makes to its state no other sees (ASGI's lifespan state)."""
    seen: list[dict[str, Any]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(dict(scope["state"]))
        scope["state"]["mine"] = True
        await answering(204, [], b"")(scope, receive, send)

    async with serving(app) as exchange:
        await exchange(request())
        await exchange(request())
    assert seen == [{"shared": 1}] * 2


async def test_the_end_of_the_client_reaches_the_application() -> None:
    """After the body, `receive` waits, and says that the client is gone."""
    ended = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        ended.set()

    async with serving(app) as exchange:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await exchange(request(b"POST", b"/", b"body"))
        async with asyncio.timeout(10):
            await ended.wait()


class Mark:
    """Something that can be seen to die."""


async def test_an_exchange_dies_with_its_connection() -> None:
    """An exchange needs no collector of cycles, which seldom runs: bodies would pile up."""
    made: list[weakref.ref[Any]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["mark"] = mark = Mark()
        made.extend((weakref.ref(mark), weakref.ref(receive.__self__._connection)))  # type: ignore[attr-defined]
        await answering(204, [], b"")(scope, receive, send)

    gc.disable()
    try:
        async with serving(app) as exchange:
            await exchange(request(b"POST", b"/", b"body"))
            await exchange(request(b"POST", b"/", b"body") + request())
            async with asyncio.timeout(10):
                while any(reference() for reference in made):  # noqa: ASYNC110  # nothing tells
                    await asyncio.sleep(0.01)
    finally:
        gc.enable()
    assert len(made) >= 4


async def test_a_large_body_waits_for_the_application() -> None:
    """Little more than what it has taken is read; when it goes on it gets the rest, and in order."""
    body = bytes(range(256)) * 40_000
    go_on = asyncio.Event()
    connections: list[Any] = []
    received = bytearray()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        connections.append(receive.__self__)  # type: ignore[attr-defined]
        await go_on.wait()
        more = True
        while more:
            message = await receive()
            assert len(message["body"]) < 1_000_000
            received.extend(message["body"])
            more = message["more_body"]
        await answering(204, [], b"")(scope, receive, send)

    async with serving(app) as exchange:
        asking = asyncio.create_task(exchange(request(b"POST", b"/", body)))
        async with asyncio.timeout(10):
            while not connections or not connections[0]._connection.flow.read_paused:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for _ in range(100):  # turns of the loop that would read on
            await asyncio.sleep(0)
        assert len(connections[0].body) < 1_000_000
        go_on.set()
        assert (await asking).startswith(b"HTTP/1.1 204")
    assert received == body


async def test_a_body_in_very_many_chunks() -> None:
    """Every chunk of one byte arrives, once and in order."""
    received = bytearray()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        more = True
        while more:
            message = await receive()
            received.extend(message["body"])
            more = message["more_body"]
        await answering(204, [], b"")(scope, receive, send)

    body = bytes(number % 251 for number in range(50_000))
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    async with serving(app) as exchange:
        answer = await exchange(
            b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
            + chunks
            + b"0\r\n\r\n"
        )
    assert answer.startswith(b"HTTP/1.1 204")
    assert received == body
