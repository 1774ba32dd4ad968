"""Locks that stand in the service's way, held by a session of the test's own."""

import asyncio
import contextlib
from collections.abc import Iterator

import psycopg2

from tests.support.order_api import execute

PRODUCTS = "SELECT FROM products FOR UPDATE"  # orders wait
ORDERS = "LOCK TABLE orders IN ACCESS EXCLUSIVE MODE"  # reads of orders wait, too

_SELECT_WAITING = """
    SELECT count(*)
      FROM pg_stat_activity
     WHERE datname = current_database() AND wait_event_type = 'Lock'
"""


@contextlib.contextmanager
def holding(dsn: str, lock: str) -> Iterator[None]:
    """Hold the locks that the statement *lock* takes, until the block ends."""
    with contextlib.closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute(lock)
        yield


async def until_waiting(dsn: str, sessions: int = 1, *, timeout_seconds: float = 30) -> None:
    """Return once so many sessions of the database wait for a lock."""
    async with asyncio.timeout(timeout_seconds):
        while execute(dsn, _SELECT_WAITING) != [(sessions,)]:  # noqa: ASYNC110  # it is another process
            await asyncio.sleep(0.02)
