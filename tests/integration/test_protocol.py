"""The HTTP protocol's own rules, over real sockets."""

import asyncio
import re
import socket

import pytest
from prometheus_client import REGISTRY

from tests.support.http_server import GET, QUICK, assert_refused, serving, until


async def test_an_ordinary_request_is_served() -> None:
    """A request that comes in small pieces is answered, and the connection is kept."""
    async with serving() as service:
        client = await service.connect()
        for byte in b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc":
            client.writer.write(bytes([byte]))
            await asyncio.sleep(0)
        status, head, body = await client.answer()
        assert (status, body) == (200, b"abc")
        assert b"connection" not in head
        assert b"date: " in head
        client.writer.write(GET)
        assert (await client.answer())[0] == 200


async def test_an_answer_without_a_body_is_complete() -> None:
    """The head alone answers HEAD, at once, and the next answer is its own."""
    async with serving() as service:
        service.echo.answer = b"abc"
        client = await service.connect(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"content-length: 3\r\n" in await client.reader.readuntil(b"\r\n\r\n")
        client.writer.write(GET)
        assert (await client.answer())[2] == b"abc"


async def test_a_client_that_asks_first_is_told_to_go_on() -> None:
    """`Expect: 100-continue` is answered before the body is sent, then the request."""
    async with serving() as service:
        client = await service.connect(
            b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"
        )
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.writer.write(b"abc")
        status, head, body = await client.answer()
        assert (status, body) == (200, b"abc")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_a_client_of_http_1_0_gets_nothing_but_the_answer() -> None:
    """A client of HTTP/1.0 knows no 100, and would take it for the answer; the connection ends with the answer."""
    async with serving() as service:
        client = await service.connect(
            b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"
        )
        await until(lambda: any(connection.cycle for connection in service.server.open))
        await asyncio.sleep(2 * QUICK)
        client.writer.write(b"abc")
        status, head, body = await client.answer()
        assert (status, body) == (200, b"abc")
        assert b"connection: close\r\n" in head
        assert await client.reader.read() == b""


async def test_nobody_is_told_to_go_on_after_a_refusal() -> None:
    """An application that asks for a body after it was refused as late is told that the client is gone, no more."""
    async with serving(body_seconds=0.1) as service:
        client = await service.connect(
            b"POST /late HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"
        )
        assert_refused(await client.answer(), 408, "timeout")
        service.echo.release.set()
        await service.echo.ended.wait()
        assert await client.reader.read() == b""


async def test_requests_that_wait_stop_the_reading() -> None:
    """However much a client sends ahead, and however often it is answered, a handful is kept."""
    async with serving() as service:
        ahead = b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n" * 60_000
        client = await service.connect(ahead)
        await service.echo.held.wait()
        (connection,) = service.server.open
        waiting = len(connection.pipeline)
        service.echo.release.set()
        lengths = []
        for _ in range(200):
            assert (await client.answer())[0] == 200
            lengths.append(len(connection.pipeline))
        assert 1 <= waiting <= 8
        assert 1 <= max(lengths) <= 8


async def test_the_end_of_the_client_reaches_a_request_that_others_wait_behind() -> None:
    """The application is told, and nothing of it stays."""
    async with serving() as service:
        client = await service.connect(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        await service.echo.held.wait()
        (connection,) = service.server.open
        assert len(connection.pipeline) == 2
        connection.transport.abort()
        await service.echo.ended.wait()
        assert await client.reader.read() == b""
        await until(lambda: not service.server._state.tasks)


async def test_the_date_moves_on() -> None:
    """Every answer says when it was made, on a kept connection too."""
    async with serving() as service:
        client = await service.connect(GET)
        first = re.search(rb"date: .+ GMT", (await client.answer())[1])
        assert first
        head = first[0]
        while first[0] in head:
            await asyncio.sleep(QUICK)
            client.writer.write(GET)
            head = (await client.answer())[1]


# Receive deadline


async def test_a_head_must_arrive_in_time() -> None:
    """Ten seconds after the connection's opening an unfinished head is answered 408, whatever still trickles in."""
    async with serving(head_seconds=0.3) as service:
        client = await service.connect(b"GET / HTTP/1.1\r\nX: ")
        trickling = asyncio.create_task(client.trickle())
        assert_refused(await client.answer(), 408, "timeout")
        assert await client.reader.read() == b""
        await trickling
        assert service.echo.bodies == []


async def test_the_first_head_has_the_time_since_the_opening() -> None:
    """A client that was silent for most of it gains nothing by its first byte."""
    async with serving(head_seconds=0.3) as service:
        client = await service.connect()
        await until(lambda: service.server.open)
        connections = service.server.connections
        opened = connections.sweeps
        await service.sweeps(connections.head_sweeps * 2 // 3)
        client.writer.write(b"G")
        assert_refused(await client.answer(), 408, "timeout")
        assert connections.sweeps - opened < connections.head_sweeps * 3 // 2


async def test_a_later_head_has_its_own_deadline() -> None:
    """On a kept connection the head's time begins with its first byte: idle time is the keep-alive's."""
    async with serving(head_seconds=0.3, keep_alive_seconds=60) as service:
        client = await service.connect(GET)
        assert (await client.answer())[0] == 200
        await service.sweeps(3 * service.server.connections.head_sweeps)
        client.writer.write(GET[:10])
        await asyncio.sleep(2 * QUICK)
        client.writer.write(GET[10:])
        assert (await client.answer())[0] == 200
        client.writer.write(GET[:10])
        assert_refused(await client.answer(), 408, "timeout")


async def test_a_body_must_arrive_in_time() -> None:
    """Thirty seconds after the head an unfinished body is answered 408 and reaches no handler."""
    async with serving(body_seconds=0.3) as service:
        client = await service.connect(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        trickling = asyncio.create_task(client.trickle())
        assert_refused(await client.answer(), 408, "timeout")
        assert await client.reader.read() == b""
        await trickling
        assert service.echo.bodies == []


async def test_slow_clients_disturb_nobody() -> None:
    """With 500 slow requests open, others are served; then all 500 are answered 408 and gone."""
    async with serving(head_seconds=2.0, keep_alive_seconds=60) as service:
        slow = [await service.connect(b"GET / HTTP/1.1\r\nX: " + b"a" * n) for n in range(500)]
        client = await service.connect()
        for _ in range(200):
            client.writer.write(GET)
            assert (await client.answer())[0] == 200
        assert len(service.server.open) == 501
        for answer in await asyncio.gather(*(one.answer() for one in slow)):
            assert_refused(answer, 408, "timeout")


async def test_the_servers_own_time_is_not_the_clients() -> None:
    """A request whose reading the server has paused is not late."""
    async with serving(head_seconds=0.1, body_seconds=0.1) as service:
        request = b"POST /held HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
        client = await service.connect(request)
        await service.echo.held.wait()
        client.writer.write(request + GET[:10])
        (connection,) = service.server.open
        await until(lambda: connection.flow.read_paused)
        client.writer.write(GET[10:])
        await service.sweeps(20)
        service.echo.release.set()
        assert [(await client.answer())[0] for _ in range(3)] == [200, 200, 200]


# Size


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 65536 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: aaaaaaaaaaaa\r\n" % n for n in range(3000)) + b"\r\n",
        b"GET /" + b"a" * 65536 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["one header", "many headers", "target"],
)
async def test_a_large_head_is_refused(request_: bytes) -> None:
    """A head of 64 KiB is answered 431 and the connection closed."""
    async with serving() as service:
        client = await service.connect(request_)
        assert_refused(await client.answer(), 431, "validation")
        assert await client.reader.read() == b""


async def test_a_head_under_the_limit_is_served() -> None:
    """A head of 31 KiB in pieces is not too large, and its size is its own: a body before it does not count."""
    async with serving() as service:
        body = b"b" * 200_000
        head = b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (31 * 1024)
        client = await service.connect(
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body + head[:1000]
        )
        assert (await client.answer())[2] == body
        for start in range(1000, len(head), 10_000):
            client.writer.write(head[start : start + 10_000])
            await asyncio.sleep(QUICK)
        client.writer.write(b"\r\n\r\n")
        assert (await client.answer())[0] == 200


@pytest.mark.parametrize(
    "start",
    [
        b"GET / HTTP/1.1\r\nX: ",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX: ",
    ],
    ids=["header", "trailer"],
)
async def test_an_endless_head_is_cut_off(start: bytes) -> None:
    """A header or trailer without an end is answered 431 as soon as it is over the limit."""
    async with serving() as service:
        client = await service.connect(start)
        trickling = asyncio.create_task(client.trickle(b"a" * 4096))
        assert_refused(await client.answer(), 431, "validation")
        await trickling
        assert service.echo.bodies == []


async def test_trailers_are_not_headers() -> None:
    """Trailers after a chunked body add nothing to the headers that the application sees."""
    async with serving() as service:
        client = await service.connect(
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"1\r\nx\r\n0\r\nAuthorization: Bearer y\r\n\r\n"
        )
        assert (await client.answer())[2] == b"x"
        assert b"authorization" not in dict(service.echo.headers)


# Malformed requests


@pytest.mark.parametrize(
    "request_",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nNo colon\r\n\r\n",
        b"GET http:// HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnot hex\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=["request line", "version", "header", "target", "CONNECT", "path", "content length", "chunk", "TLS"],
)
async def test_a_malformed_request_is_refused(request_: bytes) -> None:
    """A request that is not HTTP/1.1 is answered 400, counted, and the connection closed."""
    labels = {"method": "other", "route": "unmatched", "status": "400"}
    before = REGISTRY.get_sample_value("http_requests_total", labels) or 0
    async with serving() as service:
        client = await service.connect(request_)
        assert_refused(await client.answer(), 400, "validation")
        assert await client.reader.read() == b""
        assert service.echo.bodies == []
    assert REGISTRY.get_sample_value("http_requests_total", labels) == before + 1


@pytest.mark.parametrize(
    ("garbage", "queued"),
    [(b"GARBAGE\r\n\r\n", 1), (GET + b"GARBAGE\r\n\r\n", 2)],
    ids=["one before it", "two before it"],
)
async def test_a_refusal_waits_for_its_turn(garbage: bytes, queued: int) -> None:
    """The requests before a malformed one get their own answers first, and none is told it was not executed."""
    async with serving() as service:
        client = await service.connect(
            b"POST /held HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx" + garbage
        )
        await service.echo.held.wait()
        service.echo.release.set()
        for _ in range(queued):
            assert (await client.answer())[0] == 200
        assert_refused(await client.answer(), 400, "validation")
        assert await client.reader.read() == b""


async def test_a_queued_request_with_a_broken_body_is_refused_in_its_turn() -> None:
    """The request before it is answered, and it never reaches the application."""
    async with serving() as service:
        client = await service.connect(
            b"POST /held HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnot hex\r\n"
        )
        await service.echo.held.wait()
        service.echo.release.set()
        assert (await client.answer())[2] == b"x"
        assert_refused(await client.answer(), 400, "validation")
        assert service.echo.bodies == [b"x"]


async def test_an_offered_upgrade_is_ignored() -> None:
    """An upgrade to h2c is answered in HTTP/1.1, and so are the requests after it."""
    offer = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    async with serving() as service:
        client = await service.connect(offer + GET)
        assert (await client.answer())[0] == 200
        assert (await client.answer())[0] == 200
        client.writer.write(offer)
        assert (await client.answer())[0] == 200
        client.writer.write(GET)
        assert (await client.answer())[0] == 200


async def test_very_many_upgrades_are_ignored() -> None:
    """Upgrades may be as many as arrive at once: no depth of the interpreter bounds them."""
    async with serving() as service:
        client = await service.connect(
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n" * 2000
        )
        for _ in range(2000):
            assert (await client.answer())[0] == 200


# The connection's end


async def test_an_old_connection_is_told_to_close() -> None:
    """An answer says `Connection: close` once the connection is old, then it closes; no request is lost."""
    async with serving(max_age_seconds=0.1) as service:
        for _ in range(3):
            client = await service.connect()
            head = b""
            while b"connection: close" not in head:
                client.writer.write(GET)
                status, head, _body = await client.answer()
                assert status == 200
            assert await client.reader.read() == b""


async def test_a_connection_that_grows_old_during_a_request_says_so_in_its_answer() -> None:
    """The answer to the request in progress is the one that says `Connection: close`."""
    async with serving(max_age_seconds=0.1) as service:
        client = await service.connect(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n")
        await service.echo.held.wait()
        (connection,) = service.server.open
        await until(lambda: connection._retiring)
        service.echo.release.set()
        status, head, _ = await client.answer()
        assert status == 200
        assert b"connection: close" in head


async def test_while_draining_every_answer_says_close() -> None:
    """The request in progress, an idle connection's next and a new connection's first all say so."""
    async with serving() as service:
        idle = await service.connect(GET)
        assert b"connection" not in (await idle.answer())[1]
        busy = await service.connect(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n")
        await service.echo.held.wait()
        service.server.connections.drain(service.server.open)
        service.echo.release.set()
        idle.writer.write(GET)
        new = await service.connect(GET)
        for client in (busy, idle, new):
            status, head, _ = await client.answer()
            assert status == 200
            assert b"connection: close" in head
            assert await client.reader.read() == b""


async def test_an_idle_connection_is_closed() -> None:
    """After the keep-alive time a connection without a request is closed, without a word."""
    async with serving(keep_alive_seconds=0.1) as service:
        client = await service.connect(GET)
        await client.answer()
        assert await client.reader.read() == b""


async def test_a_slow_answer_is_not_idle() -> None:
    """The keep-alive time does not run while an answer is being made."""
    async with serving(keep_alive_seconds=0.1, head_seconds=0.1, body_seconds=0.1) as service:
        client = await service.connect(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n")
        await service.echo.held.wait()
        await service.sweeps(20)
        service.echo.release.set()
        assert (await client.answer())[0] == 200


async def test_a_client_that_does_not_read_is_cut_off() -> None:
    """An answer that nobody takes is given up after the write time, and its memory with it."""
    async with serving(write_seconds=0.2) as service:
        service.echo.answer = b"x" * 50_000_000
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.sendall(GET)
            await until(lambda: service.server.open)
            await service.until_all_are_closed()


async def test_an_early_answer_survives_the_rest_of_the_body() -> None:
    """A refusal sent while the body is still coming reaches the client instead of a reset."""
    async with serving() as service:
        body = b"b" * 5_000_000
        client = await service.connect(
            b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:1000]
        )
        await until(lambda: any(one.cycle and one.cycle.response_complete for one in service.server.open))
        client.writer.write(body[1000:])
        await client.writer.drain()
        status, _, text = await client.answer()
        assert (status, text) == (413, b"too large")
        assert await client.reader.read() == b""
