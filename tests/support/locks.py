"""What stands in the service's way: locks held by a session of the test's own, and commits that do not end."""

import asyncio
import contextlib
from collections.abc import Iterator

import psycopg2

from tests.support.order_api import execute

ORDERS = "LOCK TABLE orders IN ACCESS EXCLUSIVE MODE"  # reads of orders wait, too

_SELECT_WAITING = """
    SELECT count(*)
      FROM pg_stat_activity
     WHERE datname = current_database() AND (wait_event_type = 'Lock' OR wait_event = 'PgSleep')
"""

_HOLD_COMMITS = """
    CREATE TABLE IF NOT EXISTS held_commits ();
    CREATE OR REPLACE FUNCTION wait_while_held() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        WHILE EXISTS (SELECT FROM held_commits) LOOP
            PERFORM pg_sleep(0.02);
        END LOOP;
        RETURN NULL;
    END;
    $$;
    CREATE OR REPLACE TRIGGER held_commits
        BEFORE INSERT ON orders FOR EACH STATEMENT EXECUTE FUNCTION wait_while_held();
    INSERT INTO held_commits DEFAULT VALUES;
"""


@contextlib.contextmanager
def holding(dsn: str, lock: str) -> Iterator[None]:
    """Hold the locks that the statement *lock* takes, until the block ends."""
    with contextlib.closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute(lock)
        yield


@contextlib.contextmanager
def holding_commits(dsn: str) -> Iterator[None]:
    """Let every batch wait in the middle of its transaction, until the block ends. No lock is in its way."""
    execute(dsn, _HOLD_COMMITS)
    yield
    execute(dsn, "DELETE FROM held_commits")


async def until_waiting(dsn: str, sessions: int = 1, *, timeout_seconds: float = 30) -> None:
    """Return once so many sessions of the database wait for a lock, or in `holding_commits`."""
    async with asyncio.timeout(timeout_seconds):
        while execute(dsn, _SELECT_WAITING) != [(sessions,)]:  # noqa: ASYNC110  # it is another process
            await asyncio.sleep(0.02)
