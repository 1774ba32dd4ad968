"""A Service of a cluster, on loopback: new connections go to the replicas that are ready, as far as it has heard."""

import asyncio
import contextlib
import itertools
from collections import Counter
from typing import Self
from urllib.parse import urlsplit

from tests.support.order_client import OrderClient
from tests.support.service_process import ServiceProcess

_PROBE_SECONDS = 0.2


class ClusterService:
    """Balances connections over replicas, and follows their readiness; hears of an end only after a while.

    `connections` counts those that are open now, by replica.
    """

    def __init__(self, *, propagation_seconds: float) -> None:
        self.connections: Counter[ServiceProcess] = Counter()
        self.url = ""
        self._propagation_seconds = propagation_seconds
        self._ready: list[ServiceProcess] = []
        self._turn = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def add(self, replica: ServiceProcess) -> None:
        """Send connections to *replica* once its readiness probe says so."""
        async with OrderClient(replica.operations_url) as client:
            while (await client.send("GET", "/readyz")).status != 200:  # noqa: ASYNC110 - another process
                await asyncio.sleep(_PROBE_SECONDS)
        self._ready.append(replica)

    async def remove(self, replica: ServiceProcess) -> int:
        """End *replica* as a cluster does: SIGTERM at once, and no new connections a while later; its exit code."""
        replica.process.terminate()
        await asyncio.sleep(self._propagation_seconds)
        self._ready.remove(replica)
        return await asyncio.to_thread(replica.process.wait, 40)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        replica = self._ready[next(self._turn) % len(self._ready)]
        address = urlsplit(replica.url)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections[replica] += 1
        writers = [writer]
        try:
            backend_reader, backend_writer = await asyncio.open_connection(address.hostname, address.port)
            writers.append(backend_writer)
            await asyncio.gather(_pass(reader, backend_writer), _pass(backend_reader, writer))
        except OSError:
            pass  # the connection is cut below: whoever opened it is told
        finally:
            self.connections[replica] -= 1
            for each in writers:
                each.transport.abort()
            await asyncio.gather(*(each.wait_closed() for each in writers), return_exceptions=True)
            self._tasks.discard(task)


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
