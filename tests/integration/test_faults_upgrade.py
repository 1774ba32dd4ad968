"""A request inside a request: a body belongs to its request, whatever upgrade is offered with it."""

import asyncio
import contextlib

import pytest

from tests.support.http_server import GET, serving

OFFERS = {
    "none": b"",
    "h2c, as a JDK sends it": b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAA\r\nUpgrade: h2c\r\n",
    "websocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
    "several": b"Upgrade: h2c, websocket\r\nConnection: keep-alive, upgrade\r\nUpgrade: TLS/1.3\r\n",
    "in two lines": b"Connection: keep-alive\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n",
}
OFFER = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
SMUGGLED = b"POST /smuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
FRAMINGS = {
    "length": (b"Content-Length: %d\r\n" % len(SMUGGLED), SMUGGLED),
    "chunked": (b"Transfer-Encoding: chunked\r\n", b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)),
    "many chunks": (
        b"Transfer-Encoding: Chunked\r\n",
        b"".join(b"1;a=b\r\n%c\r\n" % byte for byte in SMUGGLED) + b"0\r\nX-Trailer: y\r\n\r\n",
    ),
    "empty length": (b"Content-Length: 0\r\n", b""),
    "empty chunked": (b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
}
IN_PIECES = {"at once": 10**6, "byte by byte": 1, "in pieces of 7": 7}


@pytest.mark.parametrize("size", IN_PIECES.values(), ids=IN_PIECES)
@pytest.mark.parametrize("framing", FRAMINGS.values(), ids=FRAMINGS)
@pytest.mark.parametrize("method", [b"POST", b"GET", b"DELETE"])
@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
async def test_a_body_belongs_to_its_request(
    offer: bytes, method: bytes, framing: tuple[bytes, bytes], size: int
) -> None:
    """Twice on one connection, and the request after it is served; the application sees two bodies and no third."""
    length, body = framing
    sent = (b"%b / HTTP/1.1\r\nHost: x\r\n%b%b\r\n%b" % (method, offer, length, body)) * 2 + GET
    async with serving() as service:
        client = await service.connect()
        for start in range(0, len(sent), size):
            client.writer.write(sent[start : start + size])
            if size == 7:
                await asyncio.sleep(0)
        expected = SMUGGLED if len(body) > 5 else b""
        for answer in (expected, expected, b""):
            status, head, got = await client.answer()
            assert (status, got) == (200, answer)
            assert b"connection: close" not in head
        assert service.echo.bodies == [expected, expected, b""]


async def test_an_offer_with_a_body_is_told_to_go_on() -> None:
    """`Expect: 100-continue` together with an offer: 100 first, then the body is read as the body."""
    async with serving() as service:
        client = await service.connect(
            b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
            b"Content-Length: %d\r\n\r\n" % len(SMUGGLED)
        )
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.writer.write(SMUGGLED + GET)
        assert (await client.answer())[2] == SMUGGLED
        assert (await client.answer())[2] == b""
        assert service.echo.bodies == [SMUGGLED, b""]


@pytest.mark.parametrize(
    "head",
    [
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED),
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close, Upgrade\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n"
        % len(SMUGGLED),
        b"POST / HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n"
        % len(SMUGGLED),
        OFFER + b"Transfer-Encoding: gzip\r\n\r\n",
        OFFER + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
        OFFER + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        OFFER + b"Transfer-Encoding: chunked\r\n\r\nnot hex\r\n",
    ],
    ids=[
        "CONNECT with a length",
        "CONNECT that offers",
        "close",
        "close after a body",
        "HTTP/1.0",
        "gzip",
        "both framings",
        "two lengths",
        "a broken chunk",
    ],
)
async def test_nothing_after_the_last_message_is_a_request(head: bytes) -> None:
    """Where the connection ends with a message, what follows it is never served."""
    async with serving() as service:
        client = await service.connect(head + SMUGGLED * 2)
        with contextlib.suppress(ConnectionError):
            await client.reader.read()
        assert service.echo.bodies in ([], [b""], [SMUGGLED])
        assert b"x" not in service.echo.bodies


async def test_a_body_under_an_offer_must_arrive_in_time() -> None:
    """It is a body: late, it is answered 408, and reaches no handler."""
    async with serving(body_seconds=0.3) as service:
        client = await service.connect(OFFER + b"Content-Length: 9\r\n\r\nGET")
        assert (await client.answer())[0] == 408
        assert service.echo.bodies == []
