"""Ways in which a Postgres of the test's own is away while a block runs."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg2

from app.embedded_postgres import EmbeddedPostgres

_START_SECONDS = 60


@asynccontextmanager
async def frozen(server: EmbeddedPostgres) -> AsyncIterator[None]:
    """Every process of the server stands still; its connections stay open, and nothing answers."""
    for _ in range(2):  # what the main process had started meanwhile, too
        for pid in server.processes():
            os.kill(pid, signal.SIGSTOP)
    yield
    for pid in server.processes():
        os.kill(pid, signal.SIGCONT)


@asynccontextmanager
async def killed(server: EmbeddedPostgres) -> AsyncIterator[None]:
    """Every process of the server is gone, without a word; then it is restarted."""
    for pid in server.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    yield
    supervisor = asyncio.create_task(server.supervise())
    try:
        async with asyncio.timeout(_START_SECONDS):
            while not _accepts_connections(server.dsn):  # noqa: ASYNC110  # it is another process
                await asyncio.sleep(0.02)
    finally:
        supervisor.cancel()
        await asyncio.gather(supervisor, return_exceptions=True)


def _accepts_connections(dsn: str) -> bool:
    try:
        psycopg2.connect(dsn).close()
    except psycopg2.OperationalError:
        return False
    return True
