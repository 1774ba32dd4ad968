"""A connection that cannot be opened: a pool that lives goes on with what it has, and a silent host hides no other."""

import asyncio
import contextlib
import shutil
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg2
import pytest
from prometheus_client import REGISTRY
from psycopg2.extensions import make_dsn, parse_dsn

from app import aiopg_fixes
from app.db import Database, is_database_failure
from app.embedded_postgres import EmbeddedPostgres
from app.errors import ConnectionLost, Overloaded
from tests.support.order_api import execute
from tests.support.relay import Relay
from tests.support.replication import promote, standby_of
from tests.support.service_process import ServiceProcess

StartService = Callable[..., ServiceProcess]
LIMIT = 3


async def connect(dsn: str, **changes: Any) -> Database:
    settings = {
        "pool_min_size": 1,
        "pool_max_size": 10,
        "pool_timeout_seconds": 30,
        "acquire_timeout_seconds": 5,
        "connect_timeout_seconds": 2,
        "statement_timeout_seconds": 5,
    }
    return await Database.connect(dsn, **settings | changes)


@contextlib.asynccontextmanager
async def connected(dsn: str, **changes: Any) -> AsyncIterator[Database]:
    database = await connect(dsn, **changes)
    yield database
    assert database.in_use == 0
    await database.close(timeout_seconds=5)


@contextlib.contextmanager
def limited_role(postgres: EmbeddedPostgres, limit: int) -> Iterator[str]:
    """The DSN of an empty database whose owner may have *limit* connections at once."""
    name = f"limited_{uuid.uuid4().hex}"
    execute(postgres.dsn, f"CREATE ROLE {name} LOGIN CONNECTION LIMIT {limit}")
    execute(postgres.dsn, f"CREATE DATABASE {name} OWNER {name}")
    yield make_dsn(postgres.dsn, dbname=name, user=name)
    execute(postgres.dsn, f"DROP DATABASE {name} WITH (FORCE)")
    execute(postgres.dsn, f"DROP ROLE {name}")


@pytest.fixture
def limited_dsn(postgres: EmbeddedPostgres) -> Iterator[str]:
    with limited_role(postgres, LIMIT) as dsn:
        yield dsn


def failed_connects() -> float:
    return REGISTRY.get_sample_value("db_connections_total", {"outcome": "failed"}) or 0.0


# Growth


async def test_too_many_connections_open_no_breaker(
    postgres: EmbeddedPostgres, start_service: StartService
) -> None:
    """60 readers of a role that may have 12 connections are all served, and the breakers stay closed."""
    with limited_role(postgres, 12) as dsn:
        service = start_service(dsn=dsn, DB_POOL_MIN_SIZE=5)
        limits = httpx.Limits(max_connections=60, max_keepalive_connections=60)
        async with httpx.AsyncClient(base_url=service.url, limits=limits, timeout=30) as client:
            statuses: list[int] = []

            async def read() -> None:
                statuses.extend(
                    [(await client.get("/orders?status=confirmed")).status_code for _ in range(10)]
                )

            await asyncio.gather(*(read() for _ in range(60)))
        assert service.metric("db_connections_total", outcome="failed") > 0
        assert service.metric("db_pool_size") == 12
        opened = {
            labels: value
            for (name, labels), value in service.metrics().items()
            if name == "circuit_breaker_transitions_total"
        }
        assert set(opened.values()) == {0}
        assert statuses == [200] * 600
        service.kill()


async def test_failed_growth_waits_for_a_connection_that_lives(limited_dsn: str) -> None:
    """A call that finds no more connections to open is served by one that comes back, in its turn."""
    async with connected(limited_dsn) as database:
        answers = await asyncio.gather(
            *(database.run("SELECT %(n)s, pg_sleep(0.05)", {"n": n}) for n in range(30))
        )
        assert [rows[0][0] for rows in answers] == list(range(30))
        assert database.size == LIMIT


async def test_growth_that_failed_is_not_tried_at_once_again(limited_dsn: str) -> None:
    """The server is not asked for one more connection by every call: it refused a moment ago."""
    async with connected(limited_dsn) as database:
        before = failed_connects()
        for _ in range(10):
            await asyncio.gather(*(database.run("SELECT pg_sleep(0.01)") for _ in range(10)))
        assert 1 <= failed_connects() - before <= 10 - LIMIT  # the first ten ask together


async def test_failed_growth_that_is_served_by_nobody_is_shed(limited_dsn: str) -> None:
    """Where no connection comes back in time the call is shed, which is no failure of the database."""
    async with connected(limited_dsn, acquire_timeout_seconds=0.2) as database:
        holders = [asyncio.create_task(database.run("SELECT pg_sleep(1)")) for _ in range(LIMIT)]
        await asyncio.sleep(0.1)
        with pytest.raises(Overloaded) as refusal:
            await database.ping()
        assert not is_database_failure(refusal.value)
        await asyncio.gather(*holders)


async def test_pool_without_a_living_connection_is_lost(own_postgres: EmbeddedPostgres) -> None:
    """Where nothing lives and nothing can be opened every caller is told at once that the database is away."""
    async with connected(own_postgres.dsn) as database:
        own_postgres.stop()
        refusals = await asyncio.gather(*(database.ping() for _ in range(30)), return_exceptions=True)
        assert {type(refusal) for refusal in refusals} == {ConnectionLost}
        own_postgres.start()
        await asyncio.gather(*(database.ping() for _ in range(30)))


async def test_last_living_connection_dies_while_others_wait_for_it(own_postgres: EmbeddedPostgres) -> None:
    """Calls that wait for a connection in use open one of their own when that one breaks."""
    async with connected(own_postgres.dsn, pool_max_size=2) as database:
        holder = asyncio.create_task(database.run("SELECT pg_sleep(60)"))
        await asyncio.sleep(0.1)
        database._pool._grow_again_at = asyncio.get_running_loop().time() + 60  # as if it had just failed
        waiting = asyncio.create_task(database.run("SELECT 1"))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        execute(
            own_postgres.dsn,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep'",
        )
        with pytest.raises(ConnectionLost):
            await holder
        async with asyncio.timeout(2):
            assert await waiting == [(1,)]


async def test_cancelled_waiters_lose_no_connection(limited_dsn: str) -> None:
    """Callers that go away while they wait take neither a place nor a connection with them."""
    async with connected(limited_dsn) as database:
        for round_ in range(20):
            calls = [asyncio.create_task(database.run("SELECT pg_sleep(0.002)")) for _ in range(10)]
            await asyncio.sleep(0.0005 * round_)
            for call in calls[::2]:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            assert database.in_use == 0
        assert database._pool._gate._value == 10
        assert not database._pool._waiting
        assert database.size <= LIMIT
        await asyncio.gather(*(database.ping() for _ in range(10)))


# One server gone: all its connections are


async def test_read_only_server_loses_all_its_connections_at_once(database_url: str) -> None:
    """One refused write is enough: connections in use leave when they come back, the others now."""
    async with connected(database_url, pool_min_size=5) as database:
        pids = {pid for (pid,) in await busy(database, 5)}
        lent = asyncio.create_task(database.run("SELECT pg_backend_pid(), pg_sleep(0.3)"))
        await asyncio.sleep(0.1)
        with pytest.raises(ConnectionLost):
            await database.run("SET LOCAL transaction_read_only = on; CREATE TABLE things ()")
        assert database.size == database.in_use == 1
        assert (await lent)[0][0] in pids
        assert database.size == 0
        assert not pids & {pid for (pid,) in await busy(database, 5)}


async def busy(database: Database, connections: int) -> list[tuple[Any, ...]]:
    """Use so many connections at once; the process of each."""
    sql = "SELECT pg_backend_pid() FROM pg_sleep(0.1)"
    return [(await one)[0] for one in [asyncio.ensure_future(database.run(sql)) for _ in range(connections)]]


async def test_silent_server_costs_one_statement_not_one_for_each_connection(
    own_postgres: EmbeddedPostgres, postgres: EmbeddedPostgres
) -> None:
    """The first statement without an answer makes the pool find the server that took the place of the silent one."""
    with Relay(own_postgres.dsn) as relay:
        async with connected(relay.dsn, pool_min_size=5, statement_timeout_seconds=0.5) as database:
            relay.hold_answer(b"SELECT", times=1_000)
            silent = asyncio.create_task(database.run("SELECT 'silent'"))
            await asyncio.sleep(0.1)
            relay.switch(postgres.dsn)
            relay.hold_answer(b"no such text")
            with pytest.raises(Exception, match="in time"):
                await silent
            assert database.size == 0
            assert await database.run("SELECT pg_postmaster_start_time()") == execute(
                postgres.dsn, "SELECT pg_postmaster_start_time()"
            )


# Several hosts, several addresses


@pytest.fixture
def silent_host() -> Iterator[str]:
    """A directory whose Postgres socket takes connections and says nothing."""
    directory = Path(f"/tmp/silent-{uuid.uuid4().hex[:8]}")  # noqa: S108  # a socket's path is short
    directory.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(directory / ".s.PGSQL.5432"))
        silent.listen(100)
        yield str(directory)
    shutil.rmtree(directory)


async def test_silent_first_host_hides_no_second(silent_host: str, database_url: str) -> None:
    """A host that accepts and says nothing gets its share of the time, and the one behind it the rest."""
    dsn = make_dsn(database_url, host=f"{silent_host},{parse_dsn(database_url)['host']}")
    begins = time.monotonic()
    async with connected(dsn, connect_timeout_seconds=1) as database:
        assert 0.4 < time.monotonic() - begins < 1
        await database.ping()


async def test_failure_of_every_host_is_told(silent_host: str) -> None:
    """Where no host can be reached each says why, within the connect timeout."""
    dsn = f"postgresql://app@/orders?host={silent_host},/nowhere,{silent_host}"
    begins = time.monotonic()
    with pytest.raises(psycopg2.OperationalError) as refusal:
        await aiopg_fixes.connect(dsn, 0.6)
    assert time.monotonic() - begins < 0.9
    reasons = str(refusal.value).split("; ")
    assert [reason.partition(":")[0] for reason in reasons if "no connection within" not in reason] == [
        'connection to server on socket "/nowhere/.s.PGSQL.5432" failed'
    ]
    assert len(reasons) == 3


@pytest.fixture
def tcp_postgres(
    tmp_path: Path, postgres_template: Path, postgres_bin_dir: Path | None
) -> Iterator[EmbeddedPostgres]:
    directory = shutil.copytree(postgres_template, tmp_path / "tcp-postgres")
    with EmbeddedPostgres(directory, bin_dir=postgres_bin_dir, port=free_port()) as server:
        yield server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_silent_first_address_of_a_name_hides_no_second(
    tcp_postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every address of a name gets its share, a silent one too; a name that is not known hides no other host."""
    port = tcp_postgres.port
    resolve = asyncio.get_running_loop().getaddrinfo

    async def two_addresses(host: str, *args: Any, **kwargs: Any) -> Any:
        if host != "db.test":
            return await resolve(host, *args, **kwargs)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 0)) for a in ("127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", two_addresses)
    with socket.create_server(("127.0.0.2", port or 0)):
        dsn = make_dsn(tcp_postgres.tcp_dsn, host="unknown.invalid,db.test")
        async with connected(dsn, connect_timeout_seconds=3) as database:
            assert await database.run("SELECT host(inet_server_addr())") == [("127.0.0.1",)]


@pytest.mark.parametrize("form", ["sockets", "names"])
async def test_the_server_that_takes_writes_is_found(
    tcp_postgres: EmbeddedPostgres, tmp_path: Path, postgres_bin_dir: Path | None, form: str
) -> None:
    """`target_session_attrs` chooses among hosts, in any order, by socket and by name, and again after a promotion."""
    standby = standby_of(tcp_postgres, tmp_path / "standby", bin_dir=postgres_bin_dir, port=free_port())
    with standby:

        async def found_by(attrs: str) -> bool:
            """True where the server that was found is a standby."""
            if form == "sockets":
                pair = [make_dsn(server.dsn, port=server.port) for server in (standby, tcp_postgres)]
            else:
                pair = [make_dsn(server.tcp_dsn, host="localhost") for server in (standby, tcp_postgres)]
            options = [parse_dsn(dsn) for dsn in pair]
            several = {name: ",".join(str(one[name]) for one in options) for name in ("host", "port")}
            conn = await aiopg_fixes.connect(
                make_dsn(pair[0], target_session_attrs=attrs, **several), 5, enable_hstore=False
            )
            cursor = await conn.run("SELECT pg_is_in_recovery()", None, 5)
            in_recovery = bool(cursor.fetchone()[0])
            conn.close()
            return in_recovery

        assert not await found_by("read-write")
        assert not await found_by("primary")
        assert await found_by("read-only")
        assert await found_by("standby")
        assert await found_by("prefer-standby")
        tcp_postgres.stop()
        assert await found_by("prefer-standby")
        with pytest.raises(psycopg2.OperationalError):
            await found_by("read-write")
        await asyncio.to_thread(promote, standby)
        assert not await found_by("read-write")
        assert not await found_by("prefer-standby")
