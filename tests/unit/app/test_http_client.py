"""The small HTTP client, against servers that answer badly, in pieces, late, or not at all."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from app.http_client import HttpClient

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Server:
    """Sends *answers*, one to a request, in pieces; None: it closes the connection instead."""

    def __init__(self, answers: list[list[bytes] | None]) -> None:
        self.answers = answers
        self.connections = 0
        self.requests: list[bytes] = []
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        while self.answers:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
            except (EOFError, OSError):
                break
            pieces = self.answers.pop(0)
            if pieces is None:
                break
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.001)
        writer.close()


@asynccontextmanager
async def client_of(*answers: list[bytes] | None, path: str = "") -> AsyncIterator[tuple[HttpClient, Server]]:
    server = Server(list(answers))
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    client = HttpClient(f"http://127.0.0.1:{port}{path}")
    yield client, server
    client.close()
    for writer in server.writers:
        writer.transport.abort()
    listener.close()
    await listener.wait_closed()


async def ask(client: HttpClient) -> tuple[int, bytes]:
    async with asyncio.timeout(5):
        return await client.post(b"/target", b"{}", b"Idempotency-Key: k\r\n")


async def test_a_request_is_sent_as_it_should_be() -> None:
    """Its path follows that of the server's URL; host, type, length and the caller's headers are there."""
    async with client_of([OK], path="/base/") as (client, server):
        assert await ask(client) == (200, b"ok")
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /base/target HTTP/1.1"
    assert lines[1].startswith(b"Host: 127.0.0.1:")
    assert {b"Content-Type: application/json", b"Content-Length: 2", b"Idempotency-Key: k"} <= set(lines)
    assert body == b"{}"


@pytest.mark.parametrize(
    "pieces",
    [
        [OK],
        [bytes([byte]) for byte in OK],
        [b"HTTP/1.1 100 Continue\r\n\r\n", OK],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n", b"1\r\nk\r\n0\r\n\r\n"],
    ],
    ids=["at once", "byte by byte", "after an interim answer", "chunked"],
)
async def test_an_answer_in_any_form_is_read_and_the_connection_kept(pieces: list[bytes]) -> None:
    async with client_of(pieces, [OK]) as (client, server):
        assert await ask(client) == (200, b"ok")
        assert await ask(client) == (200, b"ok")
        assert server.connections == 1


async def test_a_connection_that_is_to_end_is_not_used_again() -> None:
    """Whether the server says so, or has closed it meanwhile."""
    closing = OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    async with client_of([closing], [OK], [OK]) as (client, server):
        assert await ask(client) == (200, b"ok")
        assert await ask(client) == (200, b"ok")
        assert server.connections == 2
        server.writers[-1].transport.abort()
        await asyncio.sleep(0.05)
        assert await ask(client) == (200, b"ok")
        assert server.connections == 3


@pytest.mark.parametrize(
    "pieces",
    [
        None,
        [b"SSH-2.0-OpenSSH\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n", b"x" * 70_000],
    ],
    ids=["closed", "not HTTP", "too long"],
)
async def test_what_is_no_answer_is_an_error_and_ends_the_connection(pieces: list[bytes] | None) -> None:
    async with client_of(pieces, [OK]) as (client, server):
        with pytest.raises(OSError, match=r"\w"):
            await ask(client)
        assert await ask(client) == (200, b"ok")
        assert server.connections == 2


async def test_an_answer_that_is_given_up_is_not_taken_for_the_next_ones() -> None:
    """Running out of time closes the connection: what comes late is nobody's."""
    async with client_of([], [OK]) as (client, server):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await ask(client)
        server.answers.insert(0, [OK])
        assert await ask(client) == (200, b"ok")
        assert server.connections == 2


async def test_nobody_there(unused_tcp_port_factory: Callable[[], int]) -> None:
    client = HttpClient(f"http://127.0.0.1:{unused_tcp_port_factory()}")
    with pytest.raises(OSError, match=r"\w"):
        await ask(client)
