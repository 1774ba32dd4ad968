import asyncio
import contextlib
import itertools
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from loadtests.bench import generator

_ORDER = b'{"id":"0190-a","customer_id":"c-1","items":[]}'
_PLAIN = b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n%s" % (len(_ORDER), _ORDER)
_CHUNKED = (
    b"HTTP/1.1 201 Created\r\ntransfer-encoding: chunked\r\n\r\n"
    b"10;note=x\r\n%s\r\n%x\r\n%s\r\n0\r\nTrailer: 1\r\n\r\n" % (_ORDER[:16], len(_ORDER) - 16, _ORDER[16:])
)
_CHUNKED_REFUSAL = b"HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nbusy\n\r\n0\r\n\r\n"


class _Recorder(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))

    def close(self) -> None:
        self.closed = True


class _Numbers:
    """Requests that are only numbers."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def next(self) -> bytes:
        return b"%d" % next(self._numbers)


@contextlib.asynccontextmanager
async def _connection(
    ends_at: float = math.inf,
) -> AsyncIterator[tuple[generator._Connection, _Recorder, generator.Tally]]:
    outcome, transport = generator.Tally(), _Recorder()
    connection = generator._Connection(_Numbers(), outcome, ends_at)
    connection.connection_made(transport)
    yield connection, transport, outcome


@pytest.mark.parametrize(
    ("answer", "acknowledged"),
    [
        pytest.param(_PLAIN, ["0190-a"], id="length"),
        pytest.param(_CHUNKED, ["0190-a"], id="chunked"),
        pytest.param(_CHUNKED_REFUSAL, [], id="chunked-refusal"),
        pytest.param(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", [], id="empty-refusal"),
    ],
)
async def test_an_answer_in_pieces_counts_once_and_when_it_is_whole(
    answer: bytes, acknowledged: list[str]
) -> None:
    """Wherever an answer is cut, the next request goes out with its last byte, and not before."""
    for cut in range(1, len(answer)):
        async with _connection() as (connection, transport, outcome):
            connection.data_received(answer[:cut])
            assert transport.written == [b"1"], answer[:cut]
            connection.data_received(answer[cut:])
            assert transport.written == [b"1", b"2"]
            assert outcome.acknowledged_ids == acknowledged
            assert len(outcome.latencies_seconds) + outcome.refused == 1


async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    """An answer that names no length is whole when its connection is closed, and is not a broken one."""
    async with _connection() as (connection, _, outcome):
        connection.data_received(b"HTTP/1.1 201 Created\r\n\r\n" + _ORDER)
        assert not outcome.acknowledged_ids
        connection.connection_lost(None)
        assert outcome.acknowledged_ids == ["0190-a"]
        assert outcome.broken == 0
        assert connection.closed.done()


@pytest.mark.parametrize(
    "received", [b"", _PLAIN[:20], _PLAIN[:-1], _CHUNKED[:-1]], ids=["nothing", "head", "body", "chunks"]
)
async def test_a_connection_that_breaks_off_is_no_acknowledgement(received: bytes) -> None:
    """A connection lost with an answer still due counts as broken, not as acknowledged."""
    async with _connection() as (connection, _, outcome):
        connection.data_received(received)
        connection.connection_lost(None)
        assert (outcome.broken, outcome.acknowledged_ids, outcome.refused) == (1, [], 0)


async def test_nothing_is_sent_when_the_time_is_up() -> None:
    """The answer that was due is counted, and the connection is closed instead of used again."""
    async with _connection(ends_at=0) as (connection, transport, outcome):
        connection.data_received(_PLAIN)
        assert transport.closed
        assert transport.written == [b"1"]
        assert outcome.acknowledged_ids == ["0190-a"]


class _Server:
    """An HTTP server that answers each request with what `answer(n)` says, n counting them from 1."""

    def __init__(self, answer: Callable[[int], bytes]) -> None:
        self._answer = answer
        self.bodies: list[bytes] = []
        self.paths: list[bytes] = []
        self.connections = 0
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")), 0
                )
                self.bodies.append(await reader.readexactly(length))
                self.paths.append(head.split()[1])
                answer = self._answer(len(self.bodies))
                writer.write(answer)
                await writer.drain()
                if b"connection: close" in answer:
                    break
        writer.close()


Serve = Callable[[Callable[[int], bytes]], Awaitable[_Server]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    async with contextlib.AsyncExitStack() as stack:

        async def start(answer: Callable[[int], bytes]) -> _Server:
            server = _Server(answer)
            listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
            stack.callback(listening.close)
            server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
            return server

        yield start


def _order(number: int, extra: bytes = b"") -> bytes:
    body = b'{"status": "confirmed", "id": "order-%d"}' % number
    return b"HTTP/1.1 201 Created\r\n%sContent-Length: %d\r\n\r\n%s" % (extra, len(body), body)


async def test_every_order_that_was_answered_is_accounted_for(serve: Serve) -> None:
    """Each request is one order of the given lines, and each answer is counted once, with its id."""
    server = await serve(_order)
    requests = generator.OrderRequests(server.url, ["A", "B", "C"], lines=3)
    outcome = await generator.drive(server.url, requests, connections=4, seconds=0.1)
    assert sorted(outcome.acknowledged_ids) == sorted(f"order-{n}" for n in range(1, len(server.bodies) + 1))
    assert len(outcome.latencies_seconds) == len(server.bodies) >= 4
    assert (outcome.refused, outcome.broken, server.connections) == (0, 0, 4)
    assert {len(json.loads(body)["items"]) for body in server.bodies} == {3}
    assert outcome.cpu_seconds > 0


async def test_a_server_that_closes_after_each_answer_is_kept_busy(serve: Serve) -> None:
    """`Connection: close` is followed, and the load goes on over a new connection."""
    server = await serve(lambda number: _order(number, b"connection: close\r\n"))
    requests = generator.OrderRequests(server.url, ["A"], lines=1)
    outcome = await generator.drive(server.url, requests, connections=2, seconds=0.1)
    assert server.connections == len(outcome.acknowledged_ids) > 2
    assert outcome.broken == 0


async def test_refusals_are_counted_apart(serve: Serve) -> None:
    """Only an answer with a 2xx status acknowledges; any other is a refusal, and the connection goes on."""
    server = await serve(lambda number: _order(number) if number % 2 else _CHUNKED_REFUSAL)
    requests = generator.OrderRequests(server.url, ["A"], lines=1)
    outcome = await generator.drive(server.url, requests, connections=1, seconds=0.1)
    assert outcome.refused == len(server.bodies) // 2 > 0
    assert len(outcome.acknowledged_ids) == len(server.bodies) - outcome.refused


async def test_reads_go_round_their_paths(serve: Serve) -> None:
    """Reads ask for each path in turn, without a body."""
    server = await serve(_order)
    outcome = await generator.drive(
        server.url, generator.ReadRequests(server.url, ["/a", "/b?x=1"]), connections=1, seconds=0.1
    )
    assert server.paths[:3] == [b"/a", b"/b?x=1", b"/a"]
    assert len(outcome.latencies_seconds) == len(server.paths)


async def test_a_server_that_is_not_there_ends_the_run() -> None:
    """Where nothing listens the run fails with a line that says where."""
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1:"):
        await generator.drive(
            "http://127.0.0.1:1",
            generator.ReadRequests("http://127.0.0.1:1", ["/"]),
            connections=3,
            seconds=5,
        )
