"""Requests that are sent ahead: a handful of each connection is kept, and nothing of them is lost or mixed up."""

import asyncio
import random
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.http_server import Client, serving
from tests.support.service_process import ServiceProcess

_MIB = 1024 * 1024
HELD = b"POST /held HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"


def _post(body: bytes, *, chunked: bool) -> bytes:
    if not chunked:
        return b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    parts = [body[at : at + 7] for at in range(0, len(body), 7)]
    return (
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
        + b"0\r\n\r\n"
    )


@pytest.mark.parametrize("seed", range(4))
async def test_every_request_sent_ahead_gets_its_own_answer(seed: int) -> None:
    """In order, byte for byte, however they are cut, and whatever looks like a head's end in a body."""
    choose = random.Random(seed)  # noqa: S311
    bodies = [
        b"".join(
            choose.choices(
                [b"\r\n\r\n", b"GET / HTTP/1.1\r\n", b"x", b"\r\n", b""], k=choose.choice([0, 3, 40])
            )
        )
        for _ in range(300)
    ]
    sent = HELD + b"".join(_post(body, chunked=choose.random() < 0.5) for body in bodies)
    async with serving() as service:
        client = await service.connect()

        async def send() -> None:
            at = 0
            while at < len(sent):
                size = choose.choice([1, 3, 100, 5_000, 50_000])
                client.writer.write(sent[at : at + size])
                await client.writer.drain()
                await asyncio.sleep(0)
                at += size

        sending = asyncio.create_task(send())
        await service.echo.held.wait()
        service.echo.release.set()
        for body in (b"", *bodies):
            assert (await client.answer())[2] == body
        await sending
        assert service.echo.bodies == [b"", *bodies]


@pytest.mark.parametrize(
    "ahead",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        _post(b"x", chunked=False),
        _post(b"x", chunked=True),
    ],
    ids=["GET", "HTTP/1.0", "offers", "length", "chunked"],
)
async def test_a_handful_of_a_connections_requests_is_kept(ahead: bytes) -> None:
    """While one is served, whatever the others are, and however many arrive in one piece."""
    async with serving() as service:
        client = await service.connect(HELD + ahead * 20_000)
        await service.echo.held.wait()
        (connection,) = service.server.open
        await service.sweeps(3)
        assert len(connection.pipeline) <= 8
        assert len(connection._received) <= 512 * 1024
        service.echo.release.set()
        for _ in range(2 if b"1.0" in ahead else 300):
            assert (await client.answer())[0] == 200
            assert len(connection.pipeline) <= 8


async def test_what_was_sent_ahead_of_a_malformed_request_is_answered() -> None:
    """All 50 of them, and then it is refused."""
    async with serving() as service:
        client = await service.connect(HELD + _post(b"x", chunked=False) * 50 + b"GARBAGE\r\n\r\n" * 10)
        await service.echo.held.wait()
        service.echo.release.set()
        for _ in range(51):
            assert (await client.answer())[0] == 200
        assert (await client.answer())[0] == 400
        assert await client.reader.read() == b""


async def test_a_hundred_connections_that_send_ahead_take_no_memory(
    start_service: Callable[..., ServiceProcess],
) -> None:
    """100 times 256 KiB of small GETs, and more behind them: memory stays flat, and /livez is answered meanwhile."""
    service = await asyncio.to_thread(start_service, LOG_LEVEL="warning", CONNECTION_MAX_AGE_SECONDS=600)
    address = urlsplit(service.url)
    before = service.metric("process_resident_memory_bytes")
    request = b"GET /livez HTTP/1.1\r\nHost:\r\n\r\n"

    async def flood() -> None:
        client = Client(*await asyncio.open_connection(address.hostname, address.port))
        try:
            client.writer.write(request * (_MIB // len(request)))
            await asyncio.gather(client.writer.drain(), drink(client.reader))
        finally:
            client.writer.transport.abort()

    async def drink(reader: asyncio.StreamReader) -> None:
        while await reader.read(65536):
            pass

    floods = [asyncio.create_task(flood()) for _ in range(100)]
    took: list[float] = []
    try:
        async with httpx.AsyncClient(base_url=service.url, timeout=30) as client:
            end = time.monotonic() + 6
            while time.monotonic() < end:
                started_at = time.monotonic()
                assert (await client.get("/livez")).status_code == 200
                took.append(time.monotonic() - started_at)
    finally:
        for each in floods:
            each.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
    grown = await asyncio.to_thread(service.metric, "process_resident_memory_bytes") - before
    assert grown < 160 * _MIB, f"{grown / _MIB:.0f} MiB more"
    # One that waited for all that was sent ahead would be the only one.
    assert len(took) >= 5, took
