"""A small HTTP/1.1 client over kept connections, for many requests at once to one server.

httpx takes 1.6 ms of CPU for a request, eight times what an order costs from its first byte to its last; with this a
whole authorisation, its claim and its booking included, takes 0.3 ms. The parser is the one that reads the service's
own requests. It repeats nothing: its caller knows what may be.
"""

import asyncio
import ssl
from typing import Any
from urllib.parse import urlsplit

import httptools

_MAX_BODY_BYTES = 64 * 1024


class HttpClient:
    """Requests to one server; cancelling one closes its connection."""

    def __init__(self, url: str) -> None:
        """*url*: `http` or `https`, a host, perhaps a port and a path that comes before every target."""
        address = urlsplit(url)
        self._tls = ssl.create_default_context() if address.scheme == "https" else None
        self._host = address.hostname or ""
        self._port = address.port or (443 if self._tls else 80)
        self._path = address.path.rstrip("/").encode("ascii")
        self._host_header = address.netloc.encode("ascii")
        self._idle: list[_Connection] = []

    async def post(self, target: bytes, body: bytes, headers: bytes) -> tuple[int, bytes]:
        """Send *body* once; the status and the body of the answer. It takes any time: its caller bounds it.

        Args:
            target: appended to the path of the server's URL.
            body: of type `application/json`.
            headers: more of them, each ended by CR and LF.

        Raises:
            OSError: no connection, or it broke; what came was no HTTP answer, or too long.
        """
        head = (
            b"POST %b%b HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n"
            % (self._path, target, self._host_header, len(body), headers)
        )
        connection = await self._connection()
        try:
            answer = await connection.exchange(head + body)
        except BaseException:
            connection.close()
            raise
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    async def _connection(self) -> "_Connection":
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        _, connection = await asyncio.get_running_loop().create_connection(
            _Connection, self._host, self._port, ssl=self._tls
        )
        return connection

    def close(self) -> None:
        """Close the connections that are idle."""
        while self._idle:
            self._idle.pop().close()


class _Connection(asyncio.Protocol):
    """One exchange after the other."""

    def __init__(self) -> None:
        self.reusable = True
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._parser: Any = None
        self._body = b""

    async def exchange(self, request: bytes) -> tuple[int, bytes]:
        if self._transport is None or not self.reusable:
            raise ConnectionResetError("the connection is closed")
        self._answer = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._body = b""
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():  # nobody has asked
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._fail(ConnectionError(f"no HTTP answer: {exc}"))

    def eof_received(self) -> None:
        self._fail(ConnectionResetError("the server closed the connection"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(ConnectionResetError(f"the connection was lost: {exc}"))

    def _fail(self, failure: OSError) -> None:
        self.reusable = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(failure)

    # What the parser calls

    def on_body(self, body: bytes) -> None:
        self._body += body
        if len(self._body) > _MAX_BODY_BYTES:
            self._fail(ConnectionError(f"the answer is longer than {_MAX_BODY_BYTES} bytes"))
            self.close()

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._answer is None or self._answer.done() or status < 200:  # noqa: PLR2004 - an interim answer
            return
        self.reusable = self.reusable and self._parser.should_keep_alive()
        self._answer.set_result((status, self._body))
