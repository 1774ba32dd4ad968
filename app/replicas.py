"""Several replicas on one port: one PostgreSQL, a listening socket for each, and a successor for each that dies.

The kernel spreads connections over the sockets that share a port (SO_REUSEPORT), and resets what one of them holds when
its last holder closes it. So the process that starts the replicas holds every socket and accepts nothing: a replica
inherits one (one for each address of HOST), and its successor finds there who connected in the meantime.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import structlog

from app.main import database_url, open_database, prepare_schema
from app.server.serve import Stopped, bound_sockets, ending_signals, until_signal
from app.settings import Settings, SettingsError

COMMAND = "replica"

_RESTART_SECONDS = 1.0  # from start to start, at least
_SETTLED_SECONDS = 10.0  # who dies sooner, again and again, is started less and less often
_LONGEST_PAUSE_SECONDS = 30.0
_HIGHEST_PORT = 65535

_log = structlog.get_logger("app.replicas")


async def serve_replicas(settings: Settings, count: int) -> int:
    """Serve with *count* processes until SIGTERM, SIGHUP or SIGINT, and end as they do, without losing a request.

    Returns:
        The exit code: 0, or 1 where one of them did not start, or gave up requests at its end.

    Raises:
        SettingsError, EmbeddedPostgresError, ServiceError: the ports or the database cannot be used.
    """
    settings = settings.model_copy(update={"max_replicas": max(count, settings.max_replicas)})
    async with AsyncExitStack() as stack:
        replicas = _bind(settings, count, stack)
        signalled = stack.enter_context(ending_signals(at_once=lambda: _kill(replicas)))
        try:
            dsn = await until_signal(_prepare_database(settings, stack), signalled)
        except Stopped:
            return 0
        environment = {
            **os.environ,
            "DATABASE_URL": dsn,
            "PORT": str(replicas[0].port),
            "MIGRATE_ON_START": "false",
            "MAX_REPLICAS": str(settings.max_replicas),
        }
        try:
            return await _run(replicas, environment, settings, signalled)
        finally:
            _kill(replicas)


@dataclass(frozen=True)
class Inheritance:
    """A replica's side: the sockets it listens on, and the line to who started it."""

    sockets: Sequence[socket.socket]
    starter: socket.socket

    @classmethod
    def of(cls, descriptors: str) -> Self:
        """The sockets of *descriptors*, numbers by commas; the line is where stdin was.

        Raises:
            SettingsError: one of them is no socket.
        """
        try:
            return cls(
                [socket.socket(fileno=int(number)) for number in descriptors.split(",")],
                socket.socket(fileno=0),
            )
        except (OSError, ValueError) as exc:
            raise SettingsError(
                f"{COMMAND}: {descriptors} are no listening sockets: `serve --replicas` starts it"
            ) from exc

    def tell_started(self) -> None:
        """Say that it listens; from now on end, as by SIGTERM, when who started it has ended."""
        loop = asyncio.get_running_loop()

        def end() -> None:
            loop.remove_reader(self.starter)
            os.kill(os.getpid(), signal.SIGTERM)

        loop.add_reader(self.starter, end)
        with contextlib.suppress(OSError):  # it is gone: `end` comes next
            self.starter.send(b"+")


@dataclass
class _Replica:
    """One of the processes: its number, its sockets and ports, and the process that runs now."""

    number: int
    sockets: list[socket.socket]
    reserved: list[
        socket.socket
    ]  # of its operations port: bound and never listening, so that nobody takes it
    process: asyncio.subprocess.Process | None = None
    listens: bool = False  # this process does
    came_up: asyncio.Event = field(default_factory=asyncio.Event)  # once, at least

    @property
    def port(self) -> int:
        return int(self.sockets[0].getsockname()[1])

    @property
    def operations_port(self) -> int:
        return int(self.reserved[0].getsockname()[1])


def _bind(settings: Settings, count: int, stack: AsyncExitStack) -> list[_Replica]:
    # Sockets that share a port are bound beside a stranger's, too, where the account is the same: this one is not.
    with bound_sockets(settings.host, settings.port) as probes:
        port = probes[0].getsockname()[1]
    first = settings.ops_port
    if first is None:
        first = settings.port and port + 1
    if first and (first <= port < first + count or first + count > _HIGHEST_PORT + 1):
        raise SettingsError(
            f"OPS_PORT: {count} replicas use {first} and those that follow, but not PORT ({port})"
        )
    return [
        _Replica(
            number + 1,
            stack.enter_context(bound_sockets(settings.host, port, shared=True)),
            stack.enter_context(bound_sockets(settings.host, first and first + number, setting="OPS_PORT")),
        )
        for number in range(count)
    ]


async def _prepare_database(settings: Settings, stack: AsyncExitStack) -> str:
    """Start a PostgreSQL unless one is named, and migrate it once for all; its DSN."""
    dsn = await database_url(settings, stack)
    one = settings.model_copy(update={"db_pool_min_size": 1, "db_pool_max_size": 1})
    async with AsyncExitStack() as opened:
        await prepare_schema(await open_database(one, dsn, opened), one)
    return dsn


async def _run(
    replicas: Sequence[_Replica],
    environment: Mapping[str, str],
    settings: Settings,
    signalled: asyncio.Future[int],
) -> int:
    ending = asyncio.Event()
    keepers = [asyncio.create_task(_keep(replica, environment, settings, ending)) for replica in replicas]
    ready = asyncio.create_task(_all_up(replicas))
    either: list[asyncio.Future[Any]] = [signalled, *keepers]
    await asyncio.wait([ready, *either], return_when=asyncio.FIRST_COMPLETED)
    if ready.done():
        url = _url(settings.host, replicas[0].port)
        where = "DATABASE_URL" if settings.database_url else settings.embedded_postgres_dir.resolve()
        sys.stderr.write(f"order service on {url}   docs {url}/docs   data in {where}\n")
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    ending.set()
    # First, so that each replica is its sockets' last holder, and takes who has connected until it closes them.
    for replica in replicas:
        for listener in replica.sockets:
            listener.close()
    for replica in replicas:
        if replica.process and replica.process.returncode is None:
            # Who is still starting may not have its handlers yet.
            known = replica.listens and signalled.done()
            replica.process.send_signal(signalled.result() if known else signal.SIGTERM)
    statuses = await asyncio.gather(*keepers)
    return 0 if signalled.done() and {0, -signal.SIGTERM}.issuperset(statuses) else 1


async def _all_up(replicas: Sequence[_Replica]) -> None:
    for replica in replicas:
        await replica.came_up.wait()


async def _keep(
    replica: _Replica, environment: Mapping[str, str], settings: Settings, ending: asyncio.Event
) -> int:
    """Run *replica*, and its successors, until *ending*, or until one does not even start; the last one's status."""
    failures = 0
    while True:
        began_at = time.monotonic()
        try:
            status = await _live(replica, environment, settings)
        except OSError as exc:  # no memory for a process, no descriptor: the others serve on
            _log.error("replica_start_failed", replica=replica.number, reason=str(exc))
            status = 1
        lived_seconds = time.monotonic() - began_at
        if ending.is_set() or not replica.came_up.is_set():
            return status
        failures = 0 if status == 0 or lived_seconds > _SETTLED_SECONDS else failures + 1
        pause_seconds = max(0.0, _RESTART_SECONDS - lived_seconds)
        if failures > 1:
            pause_seconds = min(_LONGEST_PAUSE_SECONDS, _RESTART_SECONDS * 2 ** (failures - 1))
        _log.warning(
            "replica_restarting", replica=replica.number, status=status, pause_seconds=round(pause_seconds, 3)
        )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ending.wait(), pause_seconds)
            return status


async def _live(replica: _Replica, environment: Mapping[str, str], settings: Settings) -> int:
    """Run one process to its end; its status."""
    descriptors = [listener.fileno() for listener in replica.sockets]
    replica.listens = False
    ours, its = socket.socketpair()
    ours.settimeout(0)
    with ours:
        with its:
            replica.process = process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "app",
                COMMAND,
                ",".join(map(str, descriptors)),
                env={**environment, "OPS_PORT": str(replica.operations_port)},
                stdin=its.fileno(),
                pass_fds=descriptors,
                start_new_session=True,  # Ctrl-C is for us: we tell them
            )
        if await asyncio.get_running_loop().sock_recv(ours, 1):
            url, operations = (_url(settings.host, port) for port in (replica.port, replica.operations_port))
            sys.stderr.write(
                f"replica {replica.number} on {url}   operations {operations}   process {process.pid}\n"
            )
            replica.listens = True
            replica.came_up.set()
        return await process.wait()


def _kill(replicas: Sequence[_Replica]) -> None:
    for replica in replicas:
        if replica.process and replica.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(replica.process.pid, signal.SIGKILL)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
