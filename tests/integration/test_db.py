"""`Database` against a real server: results, bounds, and what every kind of failure means."""

import asyncio
import re
import shutil
import socket
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from prometheus_client import REGISTRY
from psycopg2 import extensions

from app.db import ConfigurationError, Database, is_database_failure, wait_for_database
from app.embedded_postgres import EmbeddedPostgres
from app.errors import (
    CircuitOpen,
    ConnectionLost,
    DatabaseError,
    DeadlineExceeded,
    InternalError,
    LockTimeout,
    Overloaded,
    ServiceError,
    StatementRejected,
    TransactionConflict,
)

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])

MAX_SIZE = 3
NEVER_ENDS = "SELECT pg_sleep(60)"
INSERT_AND_HANG = "INSERT INTO things VALUES (1, 1); SELECT pg_sleep(60)"
WITHOUT_SERVER_TIMEOUT = "SET LOCAL statement_timeout = 0; "
PASSWORD = "correct-horse"  # noqa: S105


async def connect(dsn: str, **changes: Any) -> Database:
    settings = {
        "pool_min_size": 1,
        "pool_max_size": MAX_SIZE,
        "pool_timeout_seconds": 30,
        "acquire_timeout_seconds": 10,
        "connect_timeout_seconds": 10,
        "statement_timeout_seconds": 10,
    }
    return await Database.connect(dsn, **settings | changes)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = await connect(database_url)
    await database.run("CREATE TABLE things (id int PRIMARY KEY, size int CHECK (size > 0))")
    yield database
    assert database.in_use == 0  # no test leaves a connection lent
    await database.close(timeout_seconds=5)


@pytest.fixture
async def observer(database_url: str) -> AsyncIterator[Database]:
    """Another pool on the same database, to look and to interfere."""
    database = await connect(database_url)
    yield database
    await database.close(timeout_seconds=5)


@pytest.fixture
def refused_port() -> Iterator[int]:
    """A port at which nobody listens, and nobody else can."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@pytest.fixture
def tcp_postgres(
    tmp_path: Path, postgres_template: Path, postgres_bin_dir: Path | None, refused_port: int
) -> Iterator[EmbeddedPostgres]:
    """A server on TCP, which asks for a password."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    directory = shutil.copytree(postgres_template, tmp_path / "tcp-postgres")
    with EmbeddedPostgres(directory, bin_dir=postgres_bin_dir, port=port) as server:
        yield server


async def backend_pid(database: Database) -> Any:
    return (await database.run("SELECT pg_backend_pid()"))[0][0]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # a pool announces none of this
        await asyncio.sleep(0.005)


async def sleeping_backend(observer: Database) -> Any:
    """The process that executes pg_sleep, once there is one."""
    find = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
    while not (rows := await observer.run(find)):  # noqa: ASYNC110  # it is another process
        await asyncio.sleep(0.005)
    return rows[0][0]


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_rows_of_the_last_statement(database: Database) -> None:
    """One string of several statements answers with the rows of the last one."""
    insert = "INSERT INTO things VALUES (%(id)s, 1); SELECT id, size FROM things ORDER BY id"
    assert await database.run(insert, {"id": 7}) == [(7, 1)]
    assert await database.run("INSERT INTO things VALUES (8, 1)") == []
    assert await database.run("SELECT '100%'") == [("100%",)]
    await database.ping()


async def test_one_string_is_one_transaction(database: Database) -> None:
    """The first statement never happened if the second one fails; the connection stays good."""
    pid = await backend_pid(database)
    with pytest.raises(StatementRejected) as refusal:
        await database.run("INSERT INTO things VALUES (1, 1); INSERT INTO things VALUES (1, 1)")
    assert refusal.value.outcome == "not_executed"
    assert await database.run("SELECT * FROM things") == []
    assert await backend_pid(database) == pid


async def test_refused_values_are_not_quoted(database: Database) -> None:
    """The problem that a client is told names neither value nor constraint nor table."""
    with pytest.raises(StatementRejected) as refusal:
        await database.run("INSERT INTO things VALUES (1, %(size)s)", {"size": -4711})
    assert "things_size_check" in str(refusal.value.__cause__)
    assert not re.search("4711|things", str(refusal.value.problem()))


async def test_limits_leave_no_trace_in_the_session(database: Database, observer: Database) -> None:
    """Timeouts hold for one call only and warn of nothing, so that PgBouncer may stand between."""
    assert await database.run("SHOW statement_timeout") == [("9s",)]
    assert await database.run("SHOW lock_timeout", timeout_seconds=1) == [("750ms",)]
    conn = await database._pool.acquire()
    try:
        cursor = await conn.run("SHOW statement_timeout", None, 5)  # type: ignore[attr-defined]
        assert cursor.fetchall() == [("0",)]
        assert conn.raw.notices == []
    finally:
        database._pool.release(conn)


async def test_statement_timeout(database: Database) -> None:
    """The server gives up first, on a later statement too: nothing was stored, the connection stays good."""
    pid = await backend_pid(database)
    with pytest.raises(DeadlineExceeded) as refusal:
        await database.run(INSERT_AND_HANG, timeout_seconds=0.2)
    assert refusal.value.outcome == "not_executed"
    assert is_database_failure(refusal.value)
    assert await database.run("SELECT * FROM things") == []
    assert await backend_pid(database) == pid


async def test_statement_timeout_in_a_task_group_is_an_error(database: Database) -> None:
    """A task group does not swallow a query that the server cancelled."""
    with pytest.raises(ExceptionGroup) as failures:
        async with asyncio.TaskGroup() as group:
            group.create_task(database.run(NEVER_ENDS, timeout_seconds=0.1))
    assert [type(failure) for failure in failures.value.exceptions] == [DeadlineExceeded]


async def test_lock_timeout(database: Database, observer: Database) -> None:
    """Waiting for a lock ends before the statement's own time: a conflict, to be tried again."""
    async with observer.transaction() as transaction:
        await transaction.run("LOCK TABLE things")
        with pytest.raises(TransactionConflict) as refusal:
            await database.run("SELECT * FROM things", timeout_seconds=0.4)
    assert refusal.value.outcome == "not_executed"
    assert not is_database_failure(refusal.value)


async def test_client_timeout(database: Database) -> None:
    """A server that does not answer in time leaves the outcome unknown; its connection is not used again."""
    pid = await backend_pid(database)
    with pytest.raises(DeadlineExceeded) as refusal:
        await database.run(WITHOUT_SERVER_TIMEOUT + NEVER_ENDS, timeout_seconds=0.2)
    assert refusal.value.outcome == "unknown"
    assert is_database_failure(refusal.value)
    assert await backend_pid(database) != pid


async def test_cancelled_caller(database: Database, observer: Database) -> None:
    """A cancelled caller sees its cancellation, and its connection is not lent again."""
    query = asyncio.create_task(database.run(NEVER_ENDS))
    pid = await sleeping_backend(observer)
    query.cancel()
    with pytest.raises(asyncio.CancelledError):
        await query
    assert await backend_pid(database) != pid
    assert database.in_use == 0


async def test_connection_killed_while_idle(database: Database, observer: Database) -> None:
    """A connection that the server closed is replaced, and nobody sees an error."""
    pid = await backend_pid(database)
    await observer.run("SELECT pg_terminate_backend(%(pid)s, 5000)", {"pid": pid})
    await until(lambda: database.size == 0)
    assert await backend_pid(database) != pid


async def test_connection_killed_during_a_query(database: Database, observer: Database) -> None:
    """A connection that breaks after sending leaves the outcome unknown; the next call is served."""
    query = asyncio.create_task(database.run(INSERT_AND_HANG))
    pid = await sleeping_backend(observer)
    await observer.run("SELECT pg_terminate_backend(%(pid)s)", {"pid": pid})
    with pytest.raises(ConnectionLost) as refusal:
        await query
    assert refusal.value.outcome == "unknown"
    assert refusal.value.retryable
    assert is_database_failure(refusal.value)
    await database.ping()


async def test_exhausted_pool_sheds(database_url: str, observer: Database) -> None:
    """With every connection lent a call is refused after the acquire timeout, and no place is lost."""
    database = await connect(database_url, acquire_timeout_seconds=0.1)
    waits = sample("db_pool_wait_seconds_count")
    holders = [asyncio.create_task(database.run(NEVER_ENDS)) for _ in range(MAX_SIZE)]
    await until(lambda: database.in_use == MAX_SIZE)
    assert sample("db_pool_in_use") == sample("db_pool_size") == sample("db_pool_max") == MAX_SIZE
    refusals = await asyncio.gather(*(database.ping() for _ in range(20)), return_exceptions=True)
    assert {type(refusal) for refusal in refusals} == {Overloaded}
    for refusal in refusals:
        assert isinstance(refusal, Overloaded)
        assert (refusal.reason, refusal.outcome) == ("pool", "not_executed")
        assert not is_database_failure(refusal)
    for holder in holders:
        holder.cancel()
    await asyncio.wait(holders)
    assert sample("db_pool_wait_seconds_count") == waits + MAX_SIZE + 20
    assert database.in_use == 0
    assert database._pool._gate._value == MAX_SIZE
    await asyncio.gather(*(database.ping() for _ in range(MAX_SIZE)))
    await database.close(timeout_seconds=5)
    assert sample("db_pool_size") == sample("db_pool_max") == 0


async def test_more_callers_than_connections(database: Database) -> None:
    """Callers beyond the pool's size wait their turn, and the pool never grows past its size."""
    opened = sample("db_connections_total", outcome="opened")
    answers = await asyncio.gather(*(database.run("SELECT %(n)s", {"n": n}) for n in range(200)))
    assert answers == [[(n,)] for n in range(200)]
    assert database.size <= MAX_SIZE
    assert sample("db_connections_total", outcome="opened") - opened < MAX_SIZE


async def test_old_connection_is_replaced(database: Database) -> None:
    """A connection past its age is not lent again, however busy it is."""
    pid = await backend_pid(database)
    database._pool._free[-1].retire_at = 0
    assert await backend_pid(database) != pid


@pytest.mark.parametrize(
    ("sqlstate", "meaning", "counted"),
    [
        ("40001", TransactionConflict, "not-counted"),
        ("40P01", TransactionConflict, "not-counted"),
        ("55P03", LockTimeout, "not-counted"),
        ("57014", DeadlineExceeded, "counted"),
        ("22003", StatementRejected, "not-counted"),
        ("23514", StatementRejected, "not-counted"),
        ("25006", ConnectionLost, "counted"),
        ("53100", DatabaseError, "counted"),
        ("58030", DatabaseError, "counted"),
        ("XX000", DatabaseError, "counted"),
        ("42501", InternalError, "not-counted"),
    ],
)
async def test_meaning_of_an_answered_error(
    database: Database, sqlstate: str, meaning: type[ServiceError], counted: str
) -> None:
    """Nothing was stored, whatever error the server answers; the code tells what it means."""
    failing = """
        INSERT INTO things VALUES (1, 1);
        DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = %(sqlstate)s; END $$
    """
    with pytest.raises(ServiceError) as refusal:
        await database.run(failing, {"sqlstate": sqlstate})
    assert type(refusal.value) is meaning
    assert refusal.value.outcome == "not_executed"
    assert isinstance(refusal.value.__cause__, psycopg2.Error)
    assert is_database_failure(refusal.value) is (counted == "counted")
    assert await database.run("SELECT * FROM things") == []


async def test_demoted_primary_is_left(database: Database) -> None:
    """Connections to a read-only server are dropped, so that the retry may find the new primary."""
    pid = await backend_pid(database)
    with pytest.raises(ConnectionLost) as refusal:
        await database.run("SET LOCAL transaction_read_only = on; INSERT INTO things VALUES (1, 1)")
    assert refusal.value.outcome == "not_executed"
    assert await backend_pid(database) != pid


async def test_value_that_cannot_be_sent(database: Database) -> None:
    """A value that psycopg2 cannot adapt is a defect of ours; nothing was sent."""
    with pytest.raises(InternalError) as refusal:
        await database.run("SELECT %(value)s", {"value": object()})
    assert refusal.value.outcome == "not_executed"
    await database.ping()


async def test_what_a_breaker_does_not_count() -> None:
    """Refusals that say nothing of the database's health are no failures of it."""
    for exc in (Overloaded(), CircuitOpen(), InternalError(), asyncio.CancelledError(), ValueError()):
        assert not is_database_failure(exc)


async def test_transaction_commits(database: Database, observer: Database) -> None:
    """The work of several round trips is seen by others when the block is left, and not before."""
    async with database.transaction() as transaction:
        await transaction.run("INSERT INTO things VALUES (1, 1)")
        assert await transaction.run("SELECT id FROM things") == [(1,)]
        assert await observer.run("SELECT id FROM things") == []
    assert await observer.run("SELECT id FROM things") == [(1,)]


async def test_transaction_rolls_back(database: Database) -> None:
    """An exception in the block leaves nothing behind."""
    with pytest.raises(ZeroDivisionError):  # noqa: PT012  # leaving the block is what raises
        async with database.transaction() as transaction:
            await transaction.run("INSERT INTO things VALUES (1, 1)")
            raise ZeroDivisionError
    assert await database.run("SELECT id FROM things") == []


async def test_commit_that_rolls_back_is_an_error(database: Database) -> None:
    """A commit that PostgreSQL answers with ROLLBACK raises: nothing was stored."""
    with pytest.raises(InternalError) as refusal:  # noqa: PT012  # leaving the block is what raises
        async with database.transaction() as transaction:
            await transaction.run("INSERT INTO things VALUES (1, 1)")
            with pytest.raises(StatementRejected):
                await transaction.run("INSERT INTO things VALUES (1, 1)")
    assert type(refusal.value) is InternalError
    assert refusal.value.outcome == "not_executed"
    assert await database.run("SELECT id FROM things") == []


async def test_connection_killed_before_the_commit(database: Database, observer: Database) -> None:
    """Until the commit is sent a lost connection is known to have stored nothing."""
    with pytest.raises(ConnectionLost) as refusal:  # noqa: PT012
        async with database.transaction() as transaction:
            pid = (await transaction.run("SELECT pg_backend_pid()"))[0][0]
            await observer.run("SELECT pg_terminate_backend(%(pid)s, 5000)", {"pid": pid})
            await transaction.run("INSERT INTO things VALUES (1, 1)")
    assert refusal.value.outcome == "not_executed"


async def test_database_away_and_back(own_postgres: EmbeddedPostgres) -> None:
    """Nothing is executed while the server is away; when it is back calls are served again."""
    database = await connect(own_postgres.dsn)
    failed = sample("db_connections_total", outcome="failed")
    own_postgres.stop()
    await until(lambda: database.size == 0)
    for _ in range(5):
        with pytest.raises(ConnectionLost) as refusal:
            await database.ping()
        assert refusal.value.outcome == "not_executed"
    assert sample("db_connections_total", outcome="failed") == failed + 5
    own_postgres.start()
    await asyncio.gather(*(database.ping() for _ in range(10)))
    await database.close(timeout_seconds=5)


async def test_connect_timeout(database_url: str) -> None:
    """A server that accepts and says nothing holds a call up for no longer than the connect timeout."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dsn = f"host=127.0.0.1 port={silent.getsockname()[1]} user=app dbname=orders"
        with pytest.raises(ConnectionLost, match=r"no connection within 0\.1 s"):
            await connect(dsn, connect_timeout_seconds=0.1)


async def test_close_waits_for_what_runs(database_url: str) -> None:
    """Closing lets a running call finish and refuses new ones."""
    database = await connect(database_url)
    query = asyncio.create_task(database.run("SELECT pg_sleep(0.2), 'done'"))
    await until(lambda: database.in_use == 1)
    await database.close(timeout_seconds=10)
    assert (await query)[0][1] == "done"
    with pytest.raises(ConnectionLost):
        await database.ping()


async def test_close_cuts_off_what_does_not_end(database_url: str, observer: Database) -> None:
    """A call that still runs after the timeout is cut off with its outcome unknown."""
    database = await connect(database_url)
    query = asyncio.create_task(database.run(NEVER_ENDS))
    await sleeping_backend(observer)
    await database.close(timeout_seconds=0.1)
    with pytest.raises(ConnectionLost) as refusal:
        await query
    assert refusal.value.outcome == "unknown"


async def test_tcp_connections_notice_a_dead_peer(tcp_postgres: EmbeddedPostgres) -> None:
    """Over TCP, and by name, a connection has keepalives, a send timeout and a name for the server's view."""
    options = extensions.parse_dsn(tcp_postgres.tcp_dsn) | {"host": "localhost"}
    database = await connect(extensions.make_dsn(**options))
    assert await database.run("SHOW application_name") == [("order-service",)]
    conn = await database._pool.acquire()
    peer = socket.socket(fileno=conn.raw.fileno())
    try:
        assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
        assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
    finally:
        peer.detach()
        database._pool.release(conn)
    await database.close(timeout_seconds=5)


@pytest.mark.parametrize("change", ["password", "user", "dbname"])
async def test_wrong_credentials_stop_the_start(tcp_postgres: EmbeddedPostgres, change: str) -> None:
    """A wrong password, role or database is said at once, in one line, and the password never is."""
    options = extensions.parse_dsn(tcp_postgres.tcp_dsn)
    if change == "dbname":
        options["host"] = extensions.parse_dsn(tcp_postgres.dsn)["host"]
    dsn = extensions.make_dsn(**options | {"password": PASSWORD, change: PASSWORD})
    for start in (
        connect(dsn),
        wait_for_database(dsn, connect_timeout_seconds=5, start_timeout_seconds=60, on_retry=pytest.fail),
    ):
        with pytest.raises(ConfigurationError, match=r"^DATABASE_URL: ") as refusal:
            await start
        said = "".join(traceback.format_exception(refusal.value))
        assert PASSWORD not in said
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "dsn",
    [
        f"host=h {PASSWORD}",
        f"postgresql://app:secret@h/db?{PASSWORD}=1",
        f"host=/tmp port={PASSWORD}",
        "host=127.0.0.1 sslmode=perhaps",
    ],
    ids=["no-keyword", "unknown-parameter", "port", "sslmode"],
)
async def test_impossible_dsn_stops_the_start(dsn: str) -> None:
    """A DSN that can never work is said at once and not quoted."""
    with pytest.raises(ConfigurationError, match=r"^DATABASE_URL: ") as refusal:
        await wait_for_database(
            dsn, connect_timeout_seconds=5, start_timeout_seconds=60, on_retry=pytest.fail
        )
    if "port=" not in dsn:
        assert PASSWORD not in "".join(traceback.format_exception(refusal.value))


async def test_unreachable_database_is_retried(refused_port: int) -> None:
    """A database that is not there is tried until the time is up, each failure told in one line."""
    told: list[str] = []
    dsn = f"postgresql://app:{PASSWORD}@127.0.0.1:{refused_port}/orders"
    with pytest.raises(ConnectionLost, match="Connection refused"):
        await wait_for_database(
            dsn, connect_timeout_seconds=1, start_timeout_seconds=0.5, on_retry=told.append
        )
    assert told
    assert not any("\n" in line or PASSWORD in line for line in told)


async def test_database_that_comes_up_later(own_postgres: EmbeddedPostgres) -> None:
    """The start waits for a database that starts after it."""
    own_postgres.stop()
    told: list[str] = []

    def start_it(reason: str) -> None:
        told.append(reason)
        if len(told) == 2:
            own_postgres.start()

    await wait_for_database(
        own_postgres.dsn, connect_timeout_seconds=5, start_timeout_seconds=60, on_retry=start_it
    )
    assert len(told) >= 2
