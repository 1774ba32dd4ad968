"""Another server takes over, or the one there is cannot be written to: orders come back soon, reads never stop."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from psycopg2.extensions import make_dsn

from app.embedded_postgres import EmbeddedPostgres
from tests.support.ledger import Ledger
from tests.support.order_api import execute
from tests.support.order_client import OrderClient
from tests.support.outages import frozen, killed
from tests.support.relay import Relay
from tests.support.replication import SYNCHRONOUS, is_synchronous, promote, standby_of
from tests.support.service_process import ServiceProcess
from tests.support.small_disk import fill, small_disk
from tests.support.traffic import Exchange, Traffic, acknowledged

StartService = Callable[..., ServiceProcess]

FIRST_ORDER_SECONDS = 5
WATCHED_SECONDS = 9  # of an outage: time for two or three trials
AT_ONCE_SECONDS = 1.0


async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # it is another process
            await asyncio.sleep(0.05)


@pytest.fixture
def primary(
    tmp_path: Path, postgres_template: Path, postgres_bin_dir: Path | None
) -> Iterator[EmbeddedPostgres]:
    """A server whose commits wait for a standby."""
    directory = shutil.copytree(postgres_template, tmp_path / "primary")
    with EmbeddedPostgres(directory, bin_dir=postgres_bin_dir, settings=SYNCHRONOUS) as server:
        yield server
        for pid in server.processes():  # frozen, perhaps, or waiting for a standby
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def standby(
    primary: EmbeddedPostgres, tmp_path: Path, postgres_bin_dir: Path | None
) -> Iterator[EmbeddedPostgres]:
    """The standby that confirms the commits of `primary`."""
    with standby_of(primary, tmp_path / "standby", bin_dir=postgres_bin_dir) as server:
        while not is_synchronous(primary):
            time.sleep(0.02)
        yield server


def by_hosts(primary: EmbeddedPostgres, standby: EmbeddedPostgres) -> str:
    """The DSN that names both servers and wants the one that takes writes."""
    hosts = ",".join(str(server.directory / "socket") for server in (primary, standby))
    return str(make_dsn(primary.dsn, host=hosts, target_session_attrs="read-write"))


def told(service: ServiceProcess, event: str) -> list[dict[str, object]]:
    """The lines of the service's log that tell of *event*."""
    lines = (json.loads(line) for line in service.log_path.read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def transitions(service: ServiceProcess, to: str, breaker: str = "postgres") -> float:
    return service.metric("circuit_breaker_transitions_total", breaker=breaker, to=to)


def first_order_after(traffic: Traffic, moment: float) -> float:
    """How long after *moment* the first order was acknowledged that was placed after it."""
    after = [order.ended_at for order in acknowledged(traffic.orders) if order.started_at > moment]
    return min(after, default=float("inf")) - moment


async def until_orders_are_back(traffic: Traffic, moment: float) -> None:
    """Wait for the first order after *moment*, which must come soon, and until all of the last ones are taken."""
    with contextlib.suppress(TimeoutError):
        await traffic.until(lambda: first_order_after(traffic, moment) < float("inf"), 45)
    seconds = first_order_after(traffic, moment)
    print(f"the first order came after {seconds:.2f} s")  # noqa: T201  # a figure to be read with -s
    assert seconds < FIRST_ORDER_SECONDS, f"the first order came after {seconds:.1f} s"
    await traffic.until(lambda: all(order.acknowledged for order in traffic.orders[-20:]), 15)


def states(probes: list[Exchange]) -> set[bytes]:
    return {probe.answer.body for probe in probes if probe.answer and probe.path == "/readyz"}


# Failover


@pytest.mark.parametrize("way", ["relay", pytest.param("hosts", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "gone", [frozen, pytest.param(killed, marks=pytest.mark.slow)], ids=["frozen", "killed"]
)
async def test_failover_under_load(
    primary: EmbeddedPostgres,
    standby: EmbeddedPostgres,
    start_service: StartService,
    way: str,
    gone: Callable[[EmbeddedPostgres], contextlib.AbstractAsyncContextManager[None]],
) -> None:
    """The primary goes under load and the standby is promoted: orders within 5 s, none lost, none doubled."""
    with Relay(primary.dsn) as relay:
        service = start_service(dsn=relay.dsn if way == "relay" else by_hosts(primary, standby))
        ledger = Ledger(primary.dsn)
        async with Traffic(service.url) as traffic:
            await traffic.until(lambda: len(acknowledged(traffic.orders)) >= 40, 30)
            # Not entered and left as a block: what is gone stays away, and is ended with its fixture.
            await gone(primary).__aenter__()
            await traffic.until(lambda: traffic.orders[-1].error_type == "circuit_open", 15)
            relay.switch(standby.dsn)
            await asyncio.sleep(1)  # the new address leads to a server that is read-only still
            await asyncio.to_thread(promote, standby)
            await until_orders_are_back(traffic, time.monotonic())
        ledger.moved_to(standby.dsn)
        ledger.assert_clean(traffic.orders)
        assert service.metric("circuit_breaker_state", breaker="postgres") == 0
        assert transitions(service, "closed") == len(back(service, "postgres")) == 1
        service.kill()


def back(service: ServiceProcess, breaker: str) -> list[dict[str, object]]:
    return [line for line in told(service, "database_is_back") if line["breaker"] == breaker]


# One server that cannot be written to


@contextlib.asynccontextmanager
async def read_only(server: EmbeddedPostgres) -> AsyncIterator[None]:
    """As a primary that was demoted, or a managed one that ran out of its disk."""
    execute(server.dsn, "ALTER SYSTEM SET default_transaction_read_only = on")
    execute(server.dsn, "SELECT pg_reload_conf()")
    yield
    execute(f"{server.dsn}&options=-cdefault_transaction_read_only%3Doff", "ALTER SYSTEM RESET ALL")
    execute(server.dsn, "SELECT pg_reload_conf()")


async def reads_while(service: ServiceProcess, order_id: str, orders: list[Exchange]) -> None:
    """Read an order, which no cache holds, over and over."""
    async with OrderClient(service.url) as client:
        while True:
            started_at = time.monotonic()
            answer = await client.send("GET", f"/orders/{order_id}")
            orders.append(Exchange("/orders/{id}", answer, started_at, time.monotonic()))
            await asyncio.sleep(0.05)


async def watch_outage(
    service: ServiceProcess,
    ledger: Ledger,
    outage: Callable[[], contextlib.AbstractAsyncContextManager[None]],
    *,
    orders_per_second: float = 40,
) -> None:
    """Orders, reads and probes through an outage of the writes alone: what must hold in each of them."""
    reads: list[Exchange] = []
    async with Traffic(service.url, orders_per_second=orders_per_second) as traffic:
        await traffic.until(lambda: len(acknowledged(traffic.orders)) >= 10, 30)
        reading = asyncio.create_task(reads_while(service, acknowledged(traffic.orders)[0].order_id, reads))
        async with outage():
            begins = time.monotonic()
            await traffic.until(lambda: traffic.orders[-1].error_type == "circuit_open", 20)
            open_from = time.monotonic()
            await asyncio.sleep(WATCHED_SECONDS)
            open_until = time.monotonic()
            assert transitions(service, "half_open") >= 2
            assert transitions(service, "closed") == 0
        await until_orders_are_back(traffic, time.monotonic())
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    during = [read for read in reads if begins < read.started_at < read.ended_at < open_until]
    assert len(during) > 50
    assert {read.answer and read.answer.status for read in during} == {200}
    assert max(read.seconds for read in during) < AT_ONCE_SECONDS
    assert transitions(service, "open", "postgres_reads") == 0
    refused = [o for o in traffic.orders if open_from < o.started_at < o.ended_at < open_until]
    assert {(order.status, order.error_type, order.outcome) for order in refused} == {
        (503, "circuit_open", "not_executed")
    }
    probes = [p for p in traffic.probes if open_from < p.started_at < p.ended_at < open_until]
    assert states(probes) == {b'{"status":"degraded"}'}
    assert len(back(service, "postgres")) == transitions(service, "closed") == 1
    assert back(service, "postgres_reads") == []
    ledger.assert_clean(traffic.orders)


async def test_read_only_server(own_postgres: EmbeddedPostgres, start_service: StartService) -> None:
    """While the server is read-only orders are refused and reads go on; nothing flaps; then all comes back."""
    service = start_service(dsn=own_postgres.dsn)
    await watch_outage(service, Ledger(own_postgres.dsn), lambda: read_only(own_postgres))


async def test_full_disk(
    tmp_path: Path, postgres_template: Path, postgres_bin_dir: Path | None, start_service: StartService
) -> None:
    """While the disk is full orders are refused and reads go on; nothing flaps; then all comes back."""
    (tmp_path / "disk").mkdir()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(small_disk(tmp_path / "disk", megabytes=200))
        except OSError as exc:
            pytest.skip(f"NOT PROVED, a disk of its own cannot be mounted here: {exc}")
        directory = shutil.copytree(postgres_template, tmp_path / "disk" / "postgres")
        # Its WAL lies elsewhere, as it should: without room for WAL PostgreSQL ends at once, which is another test.
        shutil.move(directory / "data" / "pg_wal", tmp_path / "wal")
        (directory / "data" / "pg_wal").symlink_to(tmp_path / "wal")
        server = stack.enter_context(EmbeddedPostgres(directory, bin_dir=postgres_bin_dir))

        @contextlib.asynccontextmanager
        async def full() -> AsyncIterator[None]:
            filler = fill(tmp_path / "disk")
            yield
            filler.unlink()

        service = start_service(dsn=server.dsn)
        await watch_outage(service, Ledger(server.dsn), full)
        assert service.terminate() == 0


# A standby that commits wait for

STUCK = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


@pytest.mark.slow
async def test_standby_is_away(
    primary: EmbeddedPostgres, standby: EmbeddedPostgres, start_service: StartService
) -> None:
    """While commits wait for a standby orders are refused, reads go on, and the server gathers no hanging commits."""
    service = start_service(dsn=primary.dsn, DB_STATEMENT_TIMEOUT_SECONDS=0.5)
    # Few orders, of other products each: a hanging commit keeps its locks, and would hold the next one back.
    stuck: list[int] = []

    async def count_stuck() -> None:
        while True:
            stuck.append(execute(primary.dsn, STUCK)[0][0])
            await asyncio.sleep(0.2)

    @contextlib.asynccontextmanager
    async def standby_away() -> AsyncIterator[None]:
        await asyncio.to_thread(standby.stop)
        counting = asyncio.create_task(count_stuck())
        yield
        counting.cancel()
        await asyncio.gather(counting, return_exceptions=True)
        await asyncio.to_thread(standby.start)
        await until(lambda: is_synchronous(primary))

    ledger = Ledger(primary.dsn)
    await watch_outage(service, ledger, standby_away, orders_per_second=4)
    assert 1 <= max(stuck) <= 4  # those that opened the breaker, and one trial
    assert execute(primary.dsn, STUCK) == [(0,)]
