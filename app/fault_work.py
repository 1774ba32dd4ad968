"""Faults that hit the process and not a request: each works until it is cancelled, and leaves nothing behind."""

import asyncio
import contextlib
import mmap
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from app.db import Database
from app.errors import ServiceError

_MEGABYTE = 1024 * 1024
_CHUNK_BYTES = 16 * _MEGABYTE
_SLICE_SECONDS = 0.05

Hit = Callable[[], None]


async def hold_connections(asked: Any, db: Database, hit: Hit) -> None:
    """Borrow connections from the pool and do nothing with them."""

    async def hold() -> None:
        while True:
            with contextlib.suppress(ServiceError):  # others have them, or the database is away: try again
                async with db.borrowed():
                    hit()
                    await asyncio.Event().wait()
            await asyncio.sleep(0.1)

    await asyncio.gather(*(hold() for _ in range(min(asked.connections, db.max_size))))


async def block_loop(asked: Any, _: Database, hit: Hit) -> None:
    """Sleep in the event loop's own thread."""
    while True:
        hit()
        time.sleep(asked.block_ms / 1000)  # noqa: ASYNC251 - that is the fault
        await asyncio.sleep(asked.pause_ms / 1000)


async def burn_cpu(asked: Any, _: Database, hit: Hit) -> None:
    """Compute in a thread, which takes the interpreter's lock as any thread does."""
    ended = threading.Event()

    def burn() -> None:
        while not ended.wait((1 - asked.cpu_share) * _SLICE_SECONDS):
            until = time.thread_time() + asked.cpu_share * _SLICE_SECONDS
            while time.thread_time() < until and not ended.is_set():
                pass

    hit()
    thread = threading.Thread(target=burn, name="burn_cpu", daemon=True)
    thread.start()
    try:
        await asyncio.Event().wait()
    finally:
        ended.set()


async def eat_memory(asked: Any, _: Database, hit: Hit) -> None:
    """Fill memory in steps, so that the event loop is not what suffers."""
    hit()
    # Mapped by itself, so that it goes back to the system at the end: the allocator might keep it.
    with mmap.mmap(-1, asked.megabytes * _MEGABYTE) as eaten:
        for begin in range(0, len(eaten), _CHUNK_BYTES):
            for page in range(begin, min(begin + _CHUNK_BYTES, len(eaten)), mmap.PAGESIZE):
                eaten[page] = 1  # a page that nobody has written takes no memory
            await asyncio.sleep(0)
        await asyncio.Event().wait()


WORK: Mapping[str, Callable[[Any, Database, Hit], Coroutine[Any, Any, None]]] = {
    "hold_connections": hold_connections,
    "block_loop": block_loop,
    "burn_cpu": burn_cpu,
    "eat_memory": eat_memory,
}
