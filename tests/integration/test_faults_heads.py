"""Heads that two readers could read in two ways, or that are not HTTP/1.1: none reaches the application."""

import asyncio
import socket

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from app.main import create_app
from app.server.protocol import Limits
from app.server.serve import _Server
from app.settings import Settings
from tests.support.http_server import GET, assert_refused, serving

HOST = b"Host: x\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n"

TWICE = [
    (b"Authorization: Bearer a", b"Authorization: Bearer b"),
    (b"Authorization: Bearer a", b"AUTHORIZATION: Bearer a"),
    (b"Host: x", b"Host: x"),
    (b"Content-Type: application/json", b"Content-Type: application/json"),
    (b"Idempotency-Key: a", b"Idempotency-Key: a"),
    (b"User-Agent: a", b"User-Agent: b"),
    (b"Origin: a", b"Origin: a"),
    (b"Content-Length: 0", b"Content-Length: 0"),
]


@pytest.mark.parametrize("method", [b"GET", b"POST", b"DELETE"])
@pytest.mark.parametrize("lines", TWICE, ids=lambda lines: lines[0].partition(b":")[0].decode())
async def test_a_header_that_may_stand_once_is_refused_when_it_stands_twice(
    lines: tuple[bytes, bytes], method: bytes
) -> None:
    """400, on every method; side by side or apart."""
    host = b"" if lines[0].startswith(b"Host") else HOST
    for between in (b"", b"X-Other: y\r\n"):
        async with serving() as service:
            first, second = (line + b"\r\n" for line in lines)
            client = await service.connect(
                b"%b / HTTP/1.1\r\n%b%b%b%b\r\n" % (method, host, first, between, second)
            )
            assert_refused(await client.answer(), 400, "validation")
            assert await client.reader.read() == b""
            assert service.echo.bodies == []


async def test_a_header_that_is_a_list_may_stand_twice() -> None:
    """Both lines reach the application."""
    async with serving() as service:
        client = await service.connect(
            b"GET / HTTP/1.1\r\nHost: x\r\nAccept: a\r\nVia: 1.1 a\r\nAccept: b\r\nVia: 1.1 b\r\n\r\n"
        )
        assert (await client.answer())[0] == 200
        assert [value for name, value in service.echo.headers if name == b"accept"] == [b"a", b"b"]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a,b\x80\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: user@x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x/y\r\n\r\n", 400),
        (b"GET http://x/ HTTP/1.1\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/0.9\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            501,
        ),
        # The length of such a body cannot be known (RFC 9112, 6.3).
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, gzip\r\n\r\n", 400),
    ],
)
async def test_what_is_no_request_of_http_1_1_is_refused(request_: bytes, status: int) -> None:
    """Alone, and in its turn behind another request; nothing of it, or after it, is served."""
    for before in (b"", GET):
        async with serving() as service:
            client = await service.connect(before + request_ + GET)
            if before:
                assert (await client.answer())[0] == 200
            assert_refused(await client.answer(), status, "validation")
            assert await client.reader.read() == b""
            assert service.echo.bodies == ([b""] if before else [])


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nHost:\r\n\r\n",  # RFC 9110, 7.2: a target without an authority
        b"GET / HTTP/1.1\r\nHost: [::1]:8000\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: shop.example_1:80\r\n\r\n",
        b"GET http://other/ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.0\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_what_is_http_1_1_is_served(request_: bytes) -> None:
    async with serving() as service:
        client = await service.connect(request_)
        assert (await client.answer())[0] == 200


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX-Request-ID: mine\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nX-Request-ID: mine\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nX-Request-ID: mine\r\nX: " + b"a" * 40_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nX-Request-ID: mine\r\nX: ", 408),
        (POST + b"X-Request-ID: mine\r\n\r\n", 408),
        (
            b"POST / HTTP/1.1\r\nHost: x\r\nX-Request-ID: mine\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            400,
        ),
    ],
    ids=["no head", "no Host", "coding", "too large", "late head", "late body", "broken chunk"],
)
async def test_the_protocols_own_refusals_keep_every_promise(request_: bytes, status: int) -> None:
    """A problem with `X-Request-ID`, the client's where it sent one; one access line with it, and one count."""
    labels = {"method": "other", "route": "unmatched", "status": str(status)}
    before = REGISTRY.get_sample_value("http_requests_total", labels) or 0
    with capture_logs() as lines:
        async with serving(head_seconds=0.2, body_seconds=0.2) as service:
            client = await service.connect(request_)
            answer = await client.answer()
    assert_refused(answer, status, "timeout" if status == 408 else "validation")
    assert (b"\r\nx-request-id: mine\r\n" in answer[1]) == (b"mine" in request_)
    assert REGISTRY.get_sample_value("http_requests_total", labels) == before + 1
    access = [line for line in lines if line["event"] == "request"]
    assert [(line["status"], line["route"]) for line in access] == [(status, "unmatched")]
    assert b"\r\nx-request-id: %b\r\n" % access[0]["request_id"].encode() in answer[1]


async def test_a_request_that_breaks_off_at_once_is_booked_once() -> None:
    """Where the protocol has refused it before the application began with it: it does not begin at all."""
    app = create_app(Settings.load(database_url="postgresql:///unused"))
    with socket.create_server(("127.0.0.1", 0)) as listener, capture_logs() as lines:
        async with _Server(app, [listener], Limits(), {}):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(b"POST /orders HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
            writer.close()
    assert [(line["event"], line["status"]) for line in lines] == [("request", 400)]


async def test_a_connection_that_never_sent_a_byte_is_closed_silently() -> None:
    """Without a 408, which a client would take for the answer to its first request."""
    with capture_logs() as lines:
        async with serving(head_seconds=0.2) as service:
            client = await service.connect()
            assert await client.reader.read() == b""
    assert lines == []
