"""aiopg 1.4.0 without its known defects: a connection, and a pool put where `aiopg.create_pool` looks for it.

aiopg's last release is of October 2022 and its fixes lie unmerged: the version is pinned, private methods are
overridden. tests/integration/test_aiopg_defects.py reproduces each defect on stock aiopg too, and so tells
when a fix is no longer needed. Mended:

- A query cancelled by the server (57014, `statement_timeout`) was raised as `asyncio.CancelledError`, which
  `except Exception` misses and a `TaskGroup` swallows (aio-libs/aiopg#537).
- An SQL error on a descriptor of 1024 or more, which `select()` cannot take, hung until the query's timeout
  and lost the connection (aio-libs/aiopg#668).
- A failed connect left its writer registered: on uvloop every second one raised `RuntimeError`
  (aio-libs/aiopg#856, #909), and a list of hosts hung when the first one refused (#275).
- A connection that came back closed woke no waiter, and `wait_closed()` then waited for ever.
- The pool held its lock while it connected: free connections waited behind a hanging connect.
- `asyncio.Condition` loses a wakeup when a notified waiter is cancelled (CPython before 3.13).
- `pool_recycle` counts idle time only: under load a connection to a demoted primary was kept for ever.
- A connect that failed for one more connection failed its caller, though others were about to come back.
- A host that accepts and says nothing took the time of those after it: libpq has no bound of its own for each
  host in an asynchronous connect (its `connect_timeout` is for the blocking one).
"""

import asyncio
import collections
import ipaddress
import os
import random
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import aiopg
import aiopg.connection
import aiopg.pool
import psycopg2
from psycopg2 import extensions

_GROWTH_PAUSE_SECONDS = 1.0

T = TypeVar("T")

FIXED_VERSION = "1.4.0"
if aiopg.__version__ != FIXED_VERSION:
    raise ImportError(f"the fixes are for aiopg {FIXED_VERSION}, this is {aiopg.__version__}")


class NotSent(Exception):
    """The driver cannot write a value, and has sent nothing; its own exception may be of any kind."""


class SafeConnection(aiopg.connection.Connection):
    """An aiopg connection that leaves nothing registered and never turns an SQL error into a cancellation."""

    opened_at = 0.0  # loop time, when the connect began
    retire_at = float("inf")
    _established = False

    async def run(self, sql: str, params: Mapping[str, Any] | None, timeout_seconds: float) -> Any:
        """Send *sql* and wait for its answer.

        Returns:
            The psycopg2 cursor, with the rows and the status message of the last statement.

        Raises:
            NotSent: the parameters cannot be put into the statement.
            psycopg2.Error: whatever the server or the connection answered.
            TimeoutError: no answer in time; the connection is closed and the outcome unknown.
        """
        waiter = self._create_waiter("run")
        try:
            cursor = self._conn.cursor()
            cursor.execute(sql, params)
        except (
            psycopg2.OperationalError,
            psycopg2.InterfaceError,
        ):  # the connection is closed, or could not take it
            self._waiter = None
            raise
        except Exception as exc:
            # Parameters are put in before anything is sent; what the server says comes later.
            self._waiter = None
            raise NotSent from exc
        await self._poll(waiter, timeout_seconds)
        return cursor

    @staticmethod
    def _ready(weak_self: Any) -> None:
        self: SafeConnection | None = weak_self()
        if self is None:
            return
        waiter = self._waiter
        if not self._established:
            self._detach()  # while it connects, libpq may close its socket or go on with another
        try:
            state = self._conn.poll()
        except (psycopg2.Warning, psycopg2.Error) as exc:
            if self._conn.closed or not self._established:
                self._detach()
                self._notifies_proxy.close(exc)
            if waiter is not None and not waiter.done():
                waiter.set_exception(exc)
            return
        self._conn.notifies.clear()  # nobody listens; unread notifications would pile up
        if self._fileno is None:
            self._fileno = self._conn.fileno()
            self._loop.add_reader(self._fileno, self._ready, weak_self)
        self._watch(writing=state == extensions.POLL_WRITE)
        if state == extensions.POLL_OK:
            self._established = True
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def _watch(self, *, writing: bool) -> None:
        """Wait for the socket to take data, or stop waiting for it."""
        if writing != self._writing and self._fileno is not None:
            if writing:
                self._loop.add_writer(self._fileno, self._ready, self._weakref)
            else:
                self._loop.remove_writer(self._fileno)
            self._writing = writing

    def _detach(self) -> None:
        """Take the socket out of the event loop, reader and writer."""
        descriptor, self._fileno = self._fileno, None
        if descriptor is not None:
            self._loop.remove_reader(descriptor)
            if self._writing:
                self._loop.remove_writer(descriptor)
        self._writing = False

    async def _poll(self, waiter: "asyncio.Future[None]", timeout: float) -> None:  # noqa: ASYNC109  # aiopg's name
        # A timer on the waiter is half the price of asyncio.timeout() and cancels no task.
        timer = self._loop.call_later(timeout, self._expire, waiter)
        try:
            self._ready(self._weakref)
            await waiter
        except (asyncio.CancelledError, TimeoutError):
            self._close()  # the answer could still come: the connection is of no use to the next query
            raise
        finally:
            timer.cancel()
            self._waiter = None

    def _expire(self, waiter: "asyncio.Future[None]") -> None:
        """End the wait, unless the answer is in the socket: uvloop calls timers first after the process stood still."""
        if not waiter.done():
            self._ready(self._weakref)
        if not waiter.done():
            waiter.set_exception(TimeoutError())


async def connect(dsn: str, timeout_seconds: float, **kwargs: Any) -> SafeConnection:
    """Open a connection to the first of the DSN's hosts, and of a host's addresses, that takes one.

    Each gets an equal share of the time that is left, so that a silent one does not hide those behind it. The
    name look-up is kept off the event loop: libpq's own blocks it while DNS is away.

    Args:
        dsn: libpq's keyword form or a URI.
        timeout_seconds: bounds look-ups, connects and authentication together.
        kwargs: what `aiopg.connect` takes.

    Raises:
        psycopg2.OperationalError: none took it in time; it says why, for each of them.
    """
    ends_at = asyncio.get_running_loop().time() + timeout_seconds
    reasons: list[str] = []
    for host, host_ends_at in _shares(_hosts(dsn), ends_at):
        try:
            async with asyncio.timeout_at(host_ends_at):
                addresses = await _addresses(host)
        except (TimeoutError, OSError) as exc:
            reason = "not in time" if isinstance(exc, TimeoutError) else exc.strerror
            reasons.append(f'could not resolve the host name "{host["host"]}": {reason}')
            continue
        for address, address_ends_at in _shares(addresses, host_ends_at):
            try:
                return await _connect_to(dsn, address_ends_at, **kwargs | address)
            except psycopg2.Error as exc:
                reasons.append(str(exc).strip())
    raise psycopg2.OperationalError("; ".join(reasons))


async def _connect_to(dsn: str, ends_at: float, **kwargs: Any) -> SafeConnection:
    seconds = ends_at - asyncio.get_running_loop().time()
    try:
        return cast("SafeConnection", await SafeConnection(dsn, seconds, **kwargs))
    except TimeoutError as exc:
        raise psycopg2.OperationalError(f"no connection within {seconds:.1f} s") from exc
    except OSError as exc:
        raise psycopg2.OperationalError(str(exc)) from exc


def _shares(items: Sequence[T], ends_at: float) -> Iterator[tuple[T, float]]:
    """Each of *items* and when its time is up: what is left until *ends_at*, shared with those after it."""
    loop = asyncio.get_running_loop()
    for left, item in zip(range(len(items), 0, -1), items, strict=True):
        now = loop.time()
        yield item, now + (ends_at - now) / left


def _hosts(dsn: str) -> list[dict[str, str]]:
    """The parameters that lead *dsn* to one of its hosts only, in the order in which to try them."""
    options = extensions.parse_dsn(dsn)
    if options.get("service") or any(os.environ.get(name) for name in ("PGSERVICE", "PGHOSTADDR")):
        # What they add is known to libpq alone.
        return [{}]
    lists = {name: options[name].split(",") for name in ("host", "hostaddr", "port") if options.get(name)}
    count = max(map(len, lists.values()), default=1)
    if any(len(values) not in {1, count} for values in lists.values()):
        return [{}]  # libpq will say that they do not match
    hosts = [
        {name: values[n] if len(values) > 1 else values[0] for name, values in lists.items()}
        for n in range(count)
    ]
    if options.get("load_balance_hosts") == "random":
        random.shuffle(hosts)
    if options.get("target_session_attrs") == "prefer-standby":
        return [{**host, "target_session_attrs": attrs} for attrs in ("standby", "any") for host in hosts]
    return hosts


async def _addresses(host: dict[str, str]) -> list[dict[str, str]]:
    """*host* once for each address of its name, or as it is where there is nothing to look up."""
    name = host.get("host", "")
    if host.get("hostaddr") or not _is_name(name):
        return [host]
    infos = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return [{**host, "hostaddr": str(info[4][0])} for info in infos]


def _is_name(host: str) -> bool:
    """True if *host* has to be looked up: neither a socket directory nor an address."""
    if not host or host.startswith(("/", "@")):
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


class SafePool(aiopg.pool.Pool):
    """An aiopg pool in which nobody waits for a lock: a first-in, first-out gate stands before the free list.

    The gate has as many places as the pool may have connections. Whoever passes it takes a free connection; where
    there is none, one more is opened, and whichever comes first is taken: the new one, or one that comes back.
    A place, not aiopg's condition, is what the next caller waits for, and it always comes back.
    """

    _free: collections.deque[SafeConnection]  # type: ignore[assignment]  # only `_open` makes them

    def __init__(
        self,
        *args: Any,
        acquire_timeout_seconds: float | None = None,
        connect_timeout_seconds: float | None = None,
        max_age_seconds: float = 300,
        on_connect_failed: Callable[[], None] = lambda: None,
        **kwargs: Any,
    ) -> None:
        """Take what `aiopg.create_pool` takes; its `timeout` is the outer bound of the first two below.

        Args:
            acquire_timeout_seconds: the most a caller waits at the gate, and again for a connection of others.
            connect_timeout_seconds: the most opening one connection may take.
            max_age_seconds: an older connection is replaced when its turn comes; give or take a fifth, so
                that not all go at once.
            on_connect_failed: called after each failed connect, also where nobody has to be told.
        """
        super().__init__(*args, **kwargs)
        if not self.maxsize:
            raise ValueError("maxsize should be one or greater")
        self._acquire_timeout = min(self._timeout, acquire_timeout_seconds or self._timeout)
        self._connect_timeout = min(self._timeout, connect_timeout_seconds or self._timeout)
        self._max_age = max_age_seconds
        self._on_connect_failed = on_connect_failed
        self._gate = asyncio.Semaphore(self.maxsize)
        self._places = self.maxsize
        self._waiting: collections.deque[asyncio.Future[SafeConnection]] = collections.deque()
        self._growths: set[asyncio.Task[None]] = set()
        self._grow_again_at = 0.0
        self._condemned_until = float("-inf")

    @property
    def size(self) -> int:
        """Connections open or being opened; those that broke while idle do not count."""
        return sum(not conn.closed for conn in self._free) + self.in_use + len(self._growths)

    @property
    def in_use(self) -> int:
        """Connections lent."""
        return len(self._used)

    async def _acquire(self) -> aiopg.connection.Connection:
        """Lend a connection.

        Raises:
            TimeoutError: no place at the gate in time, or none of the connections that live came back in time.
            psycopg2.OperationalError: it had to be opened and could not be, and no other one lives.
            RuntimeError: the pool is closing.
        """
        if self._closing:
            raise RuntimeError("the pool is closing")
        if self._gate.locked():
            async with asyncio.timeout(self._acquire_timeout):
                await self._gate.acquire()
        else:
            await self._gate.acquire()  # does not suspend
        try:
            conn = self._take_free() or await self._next_one()
        except BaseException:
            self._gate.release()
            raise
        self._used.add(conn)
        return conn

    def release(self, conn: aiopg.connection.Connection) -> "asyncio.Future[None]":
        """Take *conn* back; it is kept if it is open, idle and young."""
        if conn in self._terminated:
            self._terminated.remove(conn)
        else:
            self._used.remove(conn)
            if conn.raw.get_transaction_status() != extensions.TRANSACTION_STATUS_IDLE:
                conn.close()
            elif not conn.closed:
                self._give(cast("SafeConnection", conn))
        self._gate.release()
        self._grow()  # there may be room now
        done: asyncio.Future[None] = self._loop.create_future()
        done.set_result(None)
        return done

    def condemn(self, conn: SafeConnection) -> None:
        """Let no connection be lent any more that was opened before *conn* met the end of its server."""
        if conn.opened_at > self._condemned_until:
            self._condemned_until = self._loop.time()
            self._grow_again_at = 0.0
            while self._free:
                self._free.popleft().close()

    async def wait_closed(self) -> None:
        """Close what is free and wait until everything lent has come back."""
        if self._closed:
            return
        if not self._closing:
            raise RuntimeError(".wait_closed() should be called after .close()")
        while self._free:
            self._free.popleft().close()
        while self._places:
            await self._gate.acquire()  # each place taken is one that nobody holds any more
            self._places -= 1
        self._end_growths()
        await asyncio.gather(*self._growths, return_exceptions=True)
        self._closed = True

    def terminate(self) -> None:
        """Close everything now, what is lent and what is being opened, too."""
        super().terminate()
        self._end_growths()

    def _end_growths(self) -> None:
        for growth in self._growths:
            growth.cancel()

    def _take_free(self) -> SafeConnection | None:
        """Take the connection used last, and drop broken and old ones on the way.

        Its server process has warm caches: taking turns among ten made a `SELECT 1` a third slower.
        """
        while self._free:
            conn = self._free.pop()
            if not conn.closed and not self._is_spent(conn):
                return conn
            conn.close()
        return None

    def _is_spent(self, conn: SafeConnection) -> bool:
        """True for a connection that is not lent any more, though it may be open."""
        return conn.retire_at <= self._loop.time() or conn.opened_at <= self._condemned_until

    async def _next_one(self) -> SafeConnection:
        """Wait for the next connection, new or returned."""
        waiter: asyncio.Future[SafeConnection] = self._loop.create_future()
        self._waiting.append(waiter)
        growth = self._grow()
        try:
            while not waiter.done():
                await asyncio.wait((waiter,), timeout=self._acquire_timeout)
                no_growth = growth is None or growth.done()
                if not waiter.done() and no_growth and (self._lives() or not self._growths):
                    raise TimeoutError
            return waiter.result()
        except asyncio.CancelledError:
            if waiter.done() and waiter.exception() is None:
                self._used.discard(waiter.result())
                self._give(waiter.result())
            raise
        finally:
            if not waiter.done():
                self._waiting.remove(waiter)

    def _give(self, conn: SafeConnection) -> None:
        """Lend *conn* to whoever has waited longest, or keep it."""
        if self._is_spent(conn):
            conn.close()
            self._grow()
        elif self._waiting:
            self._used.add(conn)
            self._waiting.popleft().set_result(conn)
        elif self._closing:
            conn.close()
        else:
            self._free.append(conn)

    def _grow(self) -> asyncio.Task[None] | None:
        """Open one more connection in the background where one is waited for, and there is room and hope."""
        if len(self._growths) >= len(self._waiting) or self.size >= (self.maxsize or 0):
            return None
        if self._loop.time() < self._grow_again_at and self._lives():
            return None
        growth = self._loop.create_task(self._open_one_more())
        self._growths.add(growth)
        growth.add_done_callback(self._growths.discard)
        return growth

    async def _open_one_more(self) -> None:
        try:
            conn = await self._open()
        except Exception as exc:  # noqa: BLE001 -- whoever waits for it gets it
            self._growths.discard(cast("asyncio.Task[None]", asyncio.current_task()))
            self._on_connect_failed()
            self._growth_failed(exc)
        else:
            self._growths.discard(cast("asyncio.Task[None]", asyncio.current_task()))
            self._give(conn)

    def _growth_failed(self, exc: Exception) -> None:
        """Where no connection lives there is nothing to wait for; else those that do will come back."""
        if self._lives():
            self._grow_again_at = self._loop.time() + _GROWTH_PAUSE_SECONDS  # "too many connections", perhaps
            return
        for _ in range(1 if self._growths else len(self._waiting)):
            if self._waiting:
                self._waiting.popleft().set_exception(exc)

    def _lives(self) -> bool:
        """True while any connection is open, as far as is known."""
        return any(not conn.closed for conn in (*self._used, *self._free))

    async def _open(self) -> SafeConnection:
        opened_at = self._loop.time()
        conn = await connect(
            self._dsn,
            self._connect_timeout,
            echo=self._echo,
            enable_json=self._enable_json,
            enable_hstore=self._enable_hstore,
            enable_uuid=self._enable_uuid,
            **self._conn_kwargs,
        )
        conn.opened_at = opened_at
        conn.retire_at = self._loop.time() + self._max_age * random.uniform(0.8, 1.2)  # noqa: S311  # not a secret
        if self._on_connect is not None:
            try:
                await self._on_connect(conn)
            except BaseException:
                conn.close()
                raise
        return conn

    async def _fill_free_pool(self, override_min: bool) -> None:  # noqa: ARG002, FBT001  # aiopg's signature
        """Open the first connections; later ones are opened when they are needed."""
        try:
            while len(self._free) < self.minsize:
                self._free.append(await self._open())
        except BaseException:
            while self._free:
                self._free.popleft().close()
            raise


aiopg.pool.Pool = SafePool  # type: ignore[misc]  # the name from which `aiopg.create_pool` builds the pool
