"""The database: one round trip at a time, bounded, with every driver error translated.

Only this module and the fixes beside it know aiopg and psycopg2. Nothing here needs session state, so that a
PgBouncer in transaction mode may stand between.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, NoReturn, Self, cast

import aiopg
import psycopg2
from psycopg2 import extensions

from app import aiopg_fixes, metrics
from app.errors import (
    ConnectionLost,
    DatabaseError,
    DeadlineExceeded,
    InternalError,
    LockTimeout,
    Outcome,
    Overloaded,
    ServiceError,
    StatementRejected,
    TransactionConflict,
)
from app.settings import SettingsError

# The server gives up before the client does, and on a lock before that: only its answer tells the outcome.
_SERVER_SHARE = 0.9
_LOCK_SHARE = 0.75

# A connection that was silently cut is noticed within 25 s idle, 10 s sending. Unix sockets ignore these.
_DSN_DEFAULTS = {
    "application_name": "order-service",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}

# Whatever the DSN, the environment or the role says: in another one a name in one order fails a whole batch.
_DSN_PINNED = {"client_encoding": "UTF8"}

# psycopg2 has no SQLSTATE for a failed asynchronous connect, only the text of libpq and the server.
_CONFIGURATION_FAILURES = (
    "authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "is not permitted to log in",
    "does not support SSL",
    "certificate",
    "invalid ",
    "permission denied",
    "unrecognized configuration parameter",
    "could not match",
    "definition of service",
    "is too long",
)

# What the server answered, by SQLSTATE or its class (PostgreSQL manual, appendix A); the rest is our defect.
_MEANINGS: Mapping[str, type[ServiceError]] = {
    "57014": DeadlineExceeded,  # statement_timeout
    "40001": TransactionConflict,  # serialization failure
    "40P01": TransactionConflict,  # deadlock
    "55P03": LockTimeout,
    "25006": ConnectionLost,  # read-only: a primary that was demoted
    "08": ConnectionLost,
    "22": StatementRejected,  # a value of a wrong form
    "23": StatementRejected,  # a broken constraint
    "53": DatabaseError,  # out of disk, memory, connections
    "57": DatabaseError,
    "58": DatabaseError,
    "XX": DatabaseError,
}

_DRIVER_ERRORS = (psycopg2.Error, psycopg2.Warning, RuntimeError, OSError)  # OSError: TimeoutError too


class ConfigurationError(SettingsError):
    """DATABASE_URL can never work as it is; waiting does not help."""


class Database:
    """A pool of connections on which to run SQL."""

    def __init__(self, pool: aiopg_fixes.SafePool, statement_timeout_seconds: float) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._timeout_seconds = statement_timeout_seconds
        self._limits = _server_limits(statement_timeout_seconds)

    @classmethod
    async def connect(
        cls,
        dsn: str,
        *,
        pool_min_size: int,
        pool_max_size: int,
        pool_timeout_seconds: float,
        acquire_timeout_seconds: float,
        connect_timeout_seconds: float,
        statement_timeout_seconds: float,
    ) -> Self:
        """Open the pool with its first `pool_min_size` connections.

        Args:
            dsn: a URI or libpq's keyword form.
            pool_timeout_seconds: aiopg's own bound, an outer one: the next three bound a request.
            acquire_timeout_seconds: the most `run` waits for a connection in use by others.
            connect_timeout_seconds: the most opening a connection takes, all hosts and addresses together.
            statement_timeout_seconds: the most `run` waits for an answer.

        Raises:
            ConfigurationError: the DSN can never work.
            ConnectionLost: the database cannot be reached now.
        """
        try:
            pool: Any = await aiopg.create_pool(
                dsn=_complete(dsn),
                minsize=pool_min_size,
                maxsize=pool_max_size,
                timeout=pool_timeout_seconds,
                enable_hstore=False,  # would cost a query per connection
                on_connect=_count_opened,
                acquire_timeout_seconds=acquire_timeout_seconds,
                connect_timeout_seconds=connect_timeout_seconds,
                on_connect_failed=metrics.DB_CONNECTIONS.labels("failed").inc,
            )
        except _DRIVER_ERRORS as exc:
            _raise_connect_failure(exc, dsn)
        database = cls(pool, statement_timeout_seconds)
        metrics.DB_POOL_SIZE.set_function(lambda: database.size)
        metrics.DB_POOL_IN_USE.set_function(lambda: database.in_use)
        metrics.DB_POOL_MAX.set_function(lambda: database.max_size)
        return database

    async def run(
        self, sql: str, params: Mapping[str, Any] | None = None, *, timeout_seconds: float | None = None
    ) -> list[tuple[Any, ...]]:
        """Run *sql* in one round trip.

        Args:
            sql: one or several statements, together one transaction in which each sees what those before it
                did. No BEGIN, no COMMIT.
            params: values for `%(name)s`; with params a literal `%` is written `%%`.
            timeout_seconds: bounds the execution further than the statement timeout does, and before it the wait
                for a connection. The server's own timeouts, a bit below, bound each statement; this one bounds
                the whole string.

        Returns:
            The rows of the last statement, [] if it has none.

        Raises:
            Overloaded: no connection came free in time; nothing was sent.
            ConnectionLost: `not_executed` if none is open and none could be opened, or if the server is
                read-only; `unknown` if it broke after sending. No connection opened before is used again.
            DeadlineExceeded: `not_executed` if the server gave up, `unknown` if it did not answer in time;
                then, too, no connection opened before is used again.
            TransactionConflict: serialization failure, deadlock or lock timeout; rolled back.
            StatementRejected: the values broke a constraint or a type, and were rolled back; or the driver cannot
                write them, and nothing was sent.
            DatabaseError: the server is out of something or failed; rolled back.
            InternalError: the statement is wrong.
            asyncio.CancelledError: the caller was cancelled; the connection is closed, the outcome unknown.
        """
        conn = await self._acquire(timeout_seconds)
        try:
            if timeout_seconds is None or timeout_seconds >= self._timeout_seconds:
                cursor = await _execute(conn, self._limits + sql, params, self._timeout_seconds)
            else:
                cursor = await _execute(conn, _server_limits(timeout_seconds) + sql, params, timeout_seconds)
            return _rows(cursor)
        except ServiceError:
            if conn.closed:  # its server is gone, silent or read-only: so it is for those opened before
                self._pool.condemn(conn)
            raise
        finally:
            self._pool.release(conn)

    @asynccontextmanager
    async def transaction(
        self, *, statement_timeout_seconds: float | None = None
    ) -> AsyncIterator["Transaction"]:
        """Run several round trips as one transaction: for migrations, not for requests.

        Leaving the block commits. An exception in it closes the connection, so that the server rolls back.

        Args:
            statement_timeout_seconds: bounds each statement in place of the default; an index takes its time.

        Raises:
            InternalError: a statement had failed and the block carried on; nothing was stored.
        """
        timeout_seconds = statement_timeout_seconds or self._timeout_seconds
        conn = await self._acquire()
        try:
            await _execute(conn, "BEGIN", None, timeout_seconds, lost="not_executed")
            yield Transaction(conn, timeout_seconds)
            committed = await _execute(conn, "COMMIT", None, timeout_seconds)
            if committed.statusmessage != "COMMIT":  # a failed transaction answers ROLLBACK, and no error
                raise InternalError("The transaction had failed before its commit.")  # noqa: TRY301
        except BaseException:
            conn.close()
            raise
        finally:
            self._pool.release(conn)

    @asynccontextmanager
    async def borrowed(self) -> AsyncIterator[None]:
        """Keep one connection from everybody else while the block runs; raises `Overloaded`, `ConnectionLost`."""
        conn = await self._acquire()
        try:
            yield
        finally:
            self._pool.release(conn)

    async def ping(self) -> None:
        """Prove that the database answers; raises what `run` raises."""
        await self.run("SELECT 1")

    async def close(self, timeout_seconds: float) -> None:
        """Refuse new work, wait for what runs, and cut off what still runs after *timeout_seconds*."""
        self._pool.close()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._pool.wait_closed()
        except TimeoutError:
            self._pool.terminate()
        for gauge in (metrics.DB_POOL_SIZE, metrics.DB_POOL_IN_USE, metrics.DB_POOL_MAX):
            gauge.set_function(float)  # 0.0, and the pool is let go

    @property
    def size(self) -> int:
        """Connections open or being opened."""
        return self._pool.size

    @property
    def in_use(self) -> int:
        """Connections lent to a call."""
        return self._pool.in_use

    @property
    def max_size(self) -> int:
        """The most connections there can be."""
        return self._pool.maxsize or 0

    async def _acquire(self, timeout_seconds: float | None = None) -> aiopg_fixes.SafeConnection:
        started = self._loop.time()
        try:
            async with asyncio.timeout(timeout_seconds):
                conn = await self._pool.acquire()
        except TimeoutError as exc:
            raise Overloaded(reason="pool") from exc
        except _DRIVER_ERRORS as exc:
            raise ConnectionLost from exc
        finally:
            metrics.DB_POOL_WAIT_SECONDS.observe(self._loop.time() - started)
        return cast("aiopg_fixes.SafeConnection", conn)


class Transaction:
    """An open transaction."""

    def __init__(self, conn: aiopg_fixes.SafeConnection, timeout_seconds: float) -> None:
        self._conn = conn
        self._timeout_seconds = timeout_seconds

    async def run(
        self, sql: str, params: Mapping[str, Any] | None = None, *, timeout_seconds: float | None = None
    ) -> list[tuple[Any, ...]]:
        """Run *sql* as `Database.run` does; until the commit every failure is `not_executed`."""
        timeout_seconds = min(timeout_seconds or self._timeout_seconds, self._timeout_seconds)
        sql = _server_limits(timeout_seconds) + sql
        return _rows(await _execute(self._conn, sql, params, timeout_seconds, lost="not_executed"))


def is_database_failure(exc: BaseException) -> bool:
    """True if *exc* says that the database is unwell, and a circuit breaker should count it.

    Connect failures, lost connections, execution timeouts, a server out of something. Not shed load, lost
    conflicts, refused values or cancellation: those say nothing of its health.
    """
    return isinstance(exc, DatabaseError | DeadlineExceeded) and not isinstance(exc, TransactionConflict)


async def wait_for_database(
    dsn: str,
    *,
    connect_timeout_seconds: float,
    start_timeout_seconds: float,
    on_retry: Callable[[str], None],
) -> None:
    """Return once the database accepts a connection.

    Args:
        on_retry: called after each failed attempt with one line that says why; it never holds the password.

    Raises:
        ConfigurationError: the DSN can never work (syntax, password, role, database, TLS, a database that is not in
            UTF-8); one line.
        ConnectionLost: not reachable for `start_timeout_seconds`; its detail is one line.
    """
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + start_timeout_seconds
    pause_seconds = 0.1
    while True:
        try:
            conn = await aiopg_fixes.connect(_complete(dsn), connect_timeout_seconds, enable_hstore=False)
        except _DRIVER_ERRORS as exc:
            try:
                _raise_connect_failure(exc, dsn)
            except ConnectionLost as failure:
                if loop.time() + pause_seconds > give_up_at:
                    raise
                on_retry(failure.detail)
        else:
            encoding = conn.raw.get_parameter_status("server_encoding")
            conn.close()
            if encoding != "UTF8":
                raise ConfigurationError(
                    f"DATABASE_URL: the database's encoding is {encoding}, in which not every order can be stored: "
                    "make one with ENCODING 'UTF8'"
                )
            return
        await asyncio.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, 1.0)


async def _execute(
    conn: aiopg_fixes.SafeConnection,
    sql: str,
    params: Mapping[str, Any] | None,
    timeout_seconds: float,
    *,
    lost: Outcome = "unknown",
) -> Any:
    """Run *sql* on *conn*; *lost* is the outcome where no answer came."""
    try:
        return await conn.run(sql, params, timeout_seconds)
    except aiopg_fixes.NotSent as exc:
        raise StatementRejected from exc
    except _DRIVER_ERRORS as exc:
        raise _translate(exc, conn, lost) from exc


def _translate(exc: BaseException, conn: aiopg_fixes.SafeConnection, lost: Outcome) -> ServiceError:
    """Say what *exc*, raised by a statement on *conn*, means; a connection of no further use is closed."""
    if isinstance(exc, TimeoutError):
        return DeadlineExceeded(outcome=lost)
    code = getattr(exc, "pgcode", None)
    # The server's last words (57P01, 08xxx) reach psycopg2 without their code.
    if conn.closed or code is None:
        conn.close()
        return ConnectionLost(outcome=lost)
    # The server has answered: the transaction was rolled back.
    meaning = _MEANINGS.get(code) or _MEANINGS.get(code[:2], InternalError)
    if meaning is ConnectionLost:
        conn.close()
    return meaning()


def _raise_connect_failure(exc: BaseException, dsn: str) -> NoReturn:
    """Raise what a failed connect means, in one line without the password."""
    metrics.DB_CONNECTIONS.labels("failed").inc()
    reason = " ".join(str(exc).split()) or type(exc).__name__
    password = extensions.parse_dsn(dsn).get("password")
    if password:
        reason = reason.replace(password, "***")
    missing = "FATAL: " in reason and "does not exist" in reason  # the role or the database
    if missing or any(failure in reason for failure in _CONFIGURATION_FAILURES):
        raise ConfigurationError(f"DATABASE_URL: {reason}") from None
    raise ConnectionLost(f"DATABASE_URL: {reason}") from exc


def _complete(dsn: str) -> str:
    """Add what every connection should have and the DSN does not set, or must not."""
    try:
        options = _DSN_DEFAULTS | extensions.parse_dsn(dsn) | _DSN_PINNED
    except (psycopg2.ProgrammingError, ValueError):  # UnicodeError, too: the environment may hold any bytes
        # libpq's message quotes the DSN, perhaps the password: neither message nor cause is passed on
        raise ConfigurationError(
            "DATABASE_URL: neither a URI (postgresql://user@host/database) nor keyword=value pairs"
        ) from None
    return str(extensions.make_dsn(**options))


def _server_limits(timeout_seconds: float) -> str:
    """Write SQL that bounds the statements after it, in this transaction only."""
    milliseconds = 1000 * timeout_seconds
    return (
        f"SET LOCAL statement_timeout = {max(1, int(milliseconds * _SERVER_SHARE))}; "
        f"SET LOCAL lock_timeout = {max(1, int(milliseconds * _LOCK_SHARE))}; "
    )


def _rows(cursor: Any) -> list[tuple[Any, ...]]:
    return cursor.fetchall() if cursor.description else []


async def _count_opened(_conn: aiopg.Connection) -> None:
    metrics.DB_CONNECTIONS.labels("opened").inc()
