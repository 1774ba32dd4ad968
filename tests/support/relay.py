"""A relay between a service and Postgres that can hold back, or cut off, the server's answer to a statement.

The statement itself always reaches the server, and is committed there: what is lost is the answer alone, which no
signal to either side could bring about at that moment.
"""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

from psycopg2.extensions import parse_dsn

_T = TypeVar("_T")

# ReadyForQuery outside of a transaction: the end of the answer to a simple query, sent after its commit.
# https://www.postgresql.org/docs/current/protocol-message-formats.html
_COMMITTED = b"Z\x00\x00\x00\x05I"


class Interception:
    """What happens to the answers to the next statements that contain a text."""

    def __init__(self, text: bytes, then: Literal["hold", "cut"], times: int) -> None:
        self.text = text
        self.then = then
        self._left = times
        self._answered = threading.Semaphore(0)

    def wait(self, timeout_seconds: float = 30) -> None:
        """Return once the server has answered one more of the statements, so that it is committed."""
        if not self._answered.acquire(timeout=timeout_seconds):
            raise TimeoutError(f"no answer to {self.text!r} came by")

    def take(self) -> bool:
        """Whether this applies to one more statement."""
        self._left -= 1
        return self._left >= 0

    def answered(self) -> None:
        """Note that the server has answered."""
        self._answered.release()


class Relay:
    """Listens on a loopback port for one Postgres server, in a thread of its own: start and stop it with `with`."""

    def __init__(self, dsn: str) -> None:
        """Relay to the server of *dsn*, over its Unix socket or TCP."""
        self._options = parse_dsn(dsn)
        self._interception: Interception | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay")

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def dsn(self) -> str:
        """The URI of the same database, through the relay."""
        port = self._server.sockets[0].getsockname()[1]
        password = quote(self._options.get("password", ""))
        return f"postgresql://{self._options['user']}:{password}@127.0.0.1:{port}/{self._options['dbname']}"

    def switch(self, dsn: str) -> None:
        """Lead new connections to the server of *dsn*, as a moved address does; those there are stay where they are."""
        self._options = parse_dsn(dsn)

    def hold_answer(self, text: bytes, *, times: int = 1) -> Interception:
        """Hold back, for good, the server's answer to each of the next *times* statements that contain *text*."""
        return self._intercept(Interception(text, "hold", times))

    def cut_answer(self, text: bytes, *, times: int = 1) -> Interception:
        """Cut the connection, in place of the answer, of the next *times* statements that contain *text*."""
        return self._intercept(Interception(text, "cut", times))

    def _intercept(self, interception: Interception) -> Interception:
        async def replace() -> Interception:
            self._interception = interception
            return interception

        return self._run(replace())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of the service, for as long as both ends keep it."""
        self._connections.add(writer)
        try:
            server_reader, server_writer = await self._connect()
        except OSError:  # the server is away: so are we
            self._abort(writer)
            return
        self._connections.add(server_writer)
        state = _Connection()
        await asyncio.gather(
            self._pass_statements(reader, server_writer, state),
            self._pass_answers(server_reader, writer, state),
            return_exceptions=True,  # either end may break at any moment
        )
        self._abort(writer, server_writer)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = self._options["host"], self._options.get("port", "5432")
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, int(port))

    async def _pass_statements(
        self, reader: asyncio.StreamReader, server: asyncio.StreamWriter, state: "_Connection"
    ) -> None:
        while chunk := await reader.read(65536):
            wanted = self._interception
            # libpq sends a statement at once, and its text begins it: it is never split over two reads here.
            if wanted is not None and state.interception is None and wanted.text in chunk and wanted.take():
                state.interception = wanted
            server.write(chunk)
            await server.drain()
        server.close()

    async def _pass_answers(
        self, reader: asyncio.StreamReader, client: asyncio.StreamWriter, state: "_Connection"
    ) -> None:
        held = b""
        while chunk := await reader.read(65536):
            if state.interception is None:
                client.write(chunk)
                await client.drain()
                continue
            held += chunk
            if held.endswith(_COMMITTED):
                if state.interception.then == "cut":
                    self._abort(client)
                state.interception.answered()
        self._abort(client)

    def _abort(self, *writers: asyncio.StreamWriter) -> None:
        for writer in writers:
            writer.transport.abort()
            self._connections.discard(writer)

    async def _close(self) -> None:
        self._server.close()
        self._abort(*self._connections)
        serving = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*serving, return_exceptions=True)

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)


class _Connection:
    interception: Interception | None = None
