"""The defects of aiopg 1.4.0 that can reach the service: present in stock aiopg, gone with the fixes.

A test that fails for `stock` says that upstream has mended the defect, and a fix may go.
"""

import asyncio
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from importlib import metadata
from typing import Any

import aiopg
import aiopg.pool
import psycopg2
import pytest
from psycopg2 import errors, extensions

from app import aiopg_fixes
from app.aiopg_fixes import SafeConnection, SafePool

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])

StockPool = SafePool.__bases__[0]
OpenPool = Callable[..., Awaitable[Any]]
PATIENCE_SECONDS = 0.5  # how long to wait for what never comes


@pytest.fixture(params=["stock", "fixed"])
def version(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def pool_class(version: str) -> Any:
    return SafePool if version == "fixed" else StockPool


@pytest.fixture
def connection_class(version: str) -> Any:
    return SafeConnection if version == "fixed" else aiopg.Connection


@pytest.fixture
async def open_pool(pool_class: Any, database_url: str) -> AsyncIterator[OpenPool]:
    """Open pools as `aiopg.create_pool` does, and cut off what is left of them."""
    pools = []

    async def open_pool(minsize: int = 1, maxsize: int = 1) -> Any:
        pool = await pool_class.from_pool_fill(
            database_url,
            minsize,
            maxsize,
            60,
            enable_json=True,
            enable_hstore=False,
            enable_uuid=True,
            echo=False,
            on_connect=None,
            pool_recycle=-1,
        )
        pools.append(pool)
        return pool

    yield open_pool
    for pool in pools:
        pool.terminate()
        while pool._free:
            pool._free.popleft().close()


@pytest.fixture
def high_descriptors() -> Iterator[None]:
    """Every descriptor opened from now on is 1024 or more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    taken = [os.open(os.devnull, os.O_RDONLY)]
    while taken[-1] < 1024:
        taken.append(os.dup(taken[0]))
    yield
    for descriptor in taken:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def refused_port() -> Iterator[int]:
    """A port at which nobody listens, and nobody else can."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


def waiters(pool: Any) -> Any:
    """Futures of those who wait for a connection, first come first."""
    return (pool._gate if isinstance(pool, SafePool) else pool._cond)._waiters or ()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # aiopg announces none of this
        await asyncio.sleep(0)


async def test_the_fixes_are_for_the_installed_version() -> None:
    """Another version of aiopg stops the import; the fixes override its private methods."""
    assert metadata.version("aiopg") == aiopg_fixes.FIXED_VERSION == "1.4.0"


async def test_create_pool_makes_the_fixed_pool_of_fixed_connections(database_url: str) -> None:
    """`aiopg.create_pool` itself is what is mended."""
    async with aiopg.create_pool(dsn=database_url, minsize=1, maxsize=2, timeout=30) as pool:
        assert type(pool) is SafePool
        async with pool.acquire() as conn:
            assert type(conn) is SafeConnection


async def test_statement_timeout_is_no_cancellation(open_pool: OpenPool, version: str) -> None:
    """A query that the server cancelled raises an SQL error, not the cancellation of the task."""
    pool = await open_pool()
    expected = errors.QueryCanceled if version == "fixed" else asyncio.CancelledError
    async with pool.acquire() as conn, conn.cursor() as cursor:
        with pytest.raises(expected):
            await cursor.execute("SET statement_timeout = 20; SELECT pg_sleep(60)")


async def test_connection_without_an_answer_is_closed(database_url: str) -> None:
    """After a timeout the late answer cannot reach the next query."""
    conn = await aiopg_fixes.connect(database_url, 5)
    with pytest.raises(TimeoutError):
        await conn.run("SELECT pg_sleep(60)", None, 0.05)
    assert conn.closed


async def test_broken_connection_frees_its_place(open_pool: OpenPool, version: str) -> None:
    """A connection that comes back closed lets the next waiter in."""
    pool = await open_pool()
    conn = await pool.acquire()
    waiting = asyncio.ensure_future(pool.acquire())
    await until(lambda: len(waiters(pool)) == 1)
    conn.close()
    await pool.release(conn)
    if version == "fixed":
        await pool.release(await waiting)
    else:
        done, _ = await asyncio.wait([waiting], timeout=PATIENCE_SECONDS)
        assert not done
        waiting.cancel()
        await asyncio.wait([waiting])


async def test_broken_connection_does_not_keep_the_pool_open(open_pool: OpenPool, version: str) -> None:
    """A connection that comes back closed is waited for no longer when the pool closes."""
    pool = await open_pool()
    conn = await pool.acquire()
    pool.close()
    waiting = asyncio.ensure_future(pool.wait_closed())
    await until(lambda: len(waiters(pool)) == 1)
    conn.close()
    await pool.release(conn)
    if version == "fixed":
        await waiting
    else:
        done, _ = await asyncio.wait([waiting], timeout=PATIENCE_SECONDS)
        assert not done
        waiting.cancel()
        await asyncio.wait([waiting])


async def test_sql_error_on_a_high_descriptor(
    high_descriptors: None, open_pool: OpenPool, version: str
) -> None:
    """With 1,000 clients connected an SQL error is still an SQL error, and the connection still good."""
    pool = await open_pool()
    conn = await pool.acquire()
    assert conn.raw.fileno() >= 1024
    async with conn.cursor() as cursor:
        if version == "fixed":
            with pytest.raises(errors.DivisionByZero):
                await cursor.execute("SELECT 1 / 0", timeout=PATIENCE_SECONDS)
            assert not conn.closed
        else:  # select()'s own error comes through where the answer was there before anybody waited for it
            with pytest.raises((asyncio.TimeoutError, ValueError)):
                await cursor.execute("SELECT 1 / 0", timeout=PATIENCE_SECONDS)
    await pool.release(conn)


@pytest.mark.filterwarnings("ignore:Unclosed connection")  # stock's, when it fails
async def test_failed_connects_leave_nothing_behind(
    connection_class: Any, version: str, refused_port: int
) -> None:
    """Every connect fails alike, as a database error, while the database is away."""
    seen = set()
    for _ in range(4):
        try:
            await connection_class(f"host=127.0.0.1 port={refused_port} user=app", 5)
        except Exception as exc:  # noqa: BLE001  # which one it is, is the question
            seen.add(type(exc))
    on_uvloop = type(asyncio.get_running_loop()).__module__.startswith("uvloop")
    assert seen == {psycopg2.OperationalError} | (
        {RuntimeError} if on_uvloop and version == "stock" else set()
    )


async def test_second_host_is_reached(
    connection_class: Any, version: str, refused_port: int, database_url: str
) -> None:
    """A list of hosts works when the first one refuses."""
    options = extensions.parse_dsn(database_url)
    hosts = {"host": f"127.0.0.1,{options['host']}", "port": f"{refused_port},5432"}
    dsn = extensions.make_dsn(**options | hosts)
    if version == "fixed":
        conn = await connection_class(dsn, 5, enable_hstore=False)
        conn.close()
    else:
        with pytest.raises(asyncio.TimeoutError):
            await connection_class(dsn, PATIENCE_SECONDS, enable_hstore=False)


async def test_hanging_connect_holds_nobody_up(open_pool: OpenPool, version: str) -> None:
    """While a connection is being opened, one that comes back serves whoever waits, the first one first."""
    pool = await open_pool(minsize=1, maxsize=2)
    conn = await pool.acquire()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, nobody answers
        silent.setblocking(False)  # noqa: FBT003
        pool._dsn = f"host=127.0.0.1 port={silent.getsockname()[1]} user=app dbname=orders"
        hanging = asyncio.ensure_future(pool.acquire())
        peer, _ = await asyncio.get_running_loop().sock_accept(silent)
        releasing = asyncio.ensure_future(pool.release(conn))
        waiting = asyncio.ensure_future(pool.acquire())
        if version == "fixed":
            for waiter in (hanging, waiting):
                assert await waiter is conn
                await pool.release(conn)
        else:
            done, _ = await asyncio.wait([waiting], timeout=PATIENCE_SECONDS)
            assert not done
        for task in (waiting, hanging, releasing):
            task.cancel()
        await asyncio.wait([waiting, hanging, releasing])
        peer.close()


async def test_cancelled_waiter_passes_its_turn_on(open_pool: OpenPool, version: str) -> None:
    """A caller that goes away just when its turn comes does not take the turn with it."""
    pool = await open_pool()
    conn = await pool.acquire()
    leaving = asyncio.ensure_future(pool.acquire())
    await until(lambda: len(waiters(pool)) == 1)
    staying = asyncio.ensure_future(pool.acquire())
    await until(lambda: len(waiters(pool)) == 2)
    released = asyncio.ensure_future(pool.release(conn))
    await until(lambda: bool(waiters(pool)[0].done()))
    leaving.cancel()
    await asyncio.wait([leaving, released])
    if version == "fixed" or sys.version_info >= (3, 13):
        await pool.release(await staying)
    else:
        done, _ = await asyncio.wait([staying], timeout=PATIENCE_SECONDS)
        assert not done
        staying.cancel()
        await asyncio.wait([staying])


async def test_stock_transaction_believes_a_commit_that_rolled_back(
    open_pool: OpenPool, version: str
) -> None:
    """aiopg's own transaction ends well though nothing was stored: `Database` must not use it."""
    pool = await open_pool()
    async with pool.acquire() as conn, conn.cursor() as cursor:
        await cursor.execute("CREATE TABLE kept (id int)")
        async with cursor.begin():
            await cursor.execute("INSERT INTO kept VALUES (1)")
            with pytest.raises(errors.DivisionByZero):
                await cursor.execute("SELECT 1 / 0")
        await cursor.execute("SELECT count(*) FROM kept")
        assert await cursor.fetchone() == (0,)
