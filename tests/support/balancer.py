"""A plain TCP balancer: every new connection goes to the next of its backends that accepts it."""

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit


@contextlib.contextmanager
def balancer(backend_urls: Sequence[str]) -> Iterator[str]:
    """The URL of a balancer over *backend_urls*, in a thread of its own, while the block runs."""
    backends = itertools.cycle([(part.hostname, part.port) for part in map(urlsplit, backend_urls)])
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="balancer")
    thread.start()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in backend_urls:
            host, port = next(backends)
            try:
                backend_reader, backend_writer = await asyncio.open_connection(host, port)
                break
            except OSError:
                continue  # that one is gone
        else:
            writer.close()
            return
        await asyncio.gather(_pass(reader, backend_writer), _pass(backend_reader, writer))

    async def end() -> None:
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    try:
        start = asyncio.start_server(serve, "127.0.0.1", 0)
        server = asyncio.run_coroutine_threadsafe(start, loop).result(10)
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass  # one end is gone: so is the other
    finally:
        writer.close()
