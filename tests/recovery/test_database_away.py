"""The database goes away under load and comes back: refused early, served stale, nothing lost, back to normal alone."""

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from psycopg2.extensions import parse_dsn

from app.embedded_postgres import EmbeddedPostgres
from tests.support.ledger import Ledger
from tests.support.order_client import OrderClient, OrderRequest
from tests.support.outages import frozen, killed
from tests.support.service_process import ServiceProcess
from tests.support.traffic import Exchange, Traffic, acknowledged

StartService = Callable[..., ServiceProcess]

CACHE_TTL_SECONDS = 0.5
DEADLINE_SECONDS = 5
STATEMENT_SECONDS = 2
AT_ONCE_SECONDS = 1.0  # usually 0.01: far below the 2 s for which a statement or a connect waits
RECOVERY_SECONDS = 10


def ttl_seconds(read: Exchange) -> int | None:
    """The seconds of freshness left in the product that was served from the cache; None: not from the cache."""
    assert read.answer is not None
    assert read.answer.status == 200
    from_cache = re.fullmatch(r"products; hit; ttl=(-?\d+)", read.answer.headers["cache-status"])
    return int(from_cache[1]) if from_cache else None


@pytest.mark.parametrize("away", [frozen, pytest.param(killed, marks=pytest.mark.slow)])
async def test_outage_under_load(
    own_postgres: EmbeddedPostgres,
    start_service: StartService,
    away: Callable[[EmbeddedPostgres], AbstractAsyncContextManager[None]],
) -> None:
    """Orders are refused at once, products come stale, all is normal soon after, and what was promised holds."""
    service = start_service(dsn=own_postgres.dsn, CACHE_TTL_SECONDS=CACHE_TTL_SECONDS)
    ledger = Ledger(own_postgres.dsn)
    async with Traffic(service.url) as traffic:

        def orders_since(moment: float) -> int:
            return sum(order.started_at > moment for order in traffic.orders)

        await traffic.until(lambda: len(acknowledged(traffic.orders)) >= 40 and len(traffic.reads) >= 20, 30)
        async with away(own_postgres):
            # At most BREAKER_FAIL_MAX (3) statements one after the other.
            await traffic.until(
                lambda: traffic.orders[-1].error_type == "circuit_open", 3 * STATEMENT_SECONDS + 4
            )
            open_from = time.monotonic()
            await traffic.until(lambda: orders_since(open_from) >= 200, 30)  # 5 s: there are some trial calls
            open_until = time.monotonic()
        back_at = time.monotonic()
        await traffic.until(
            lambda: (
                is_ready(traffic.probes)
                and all(order.acknowledged and order.started_at > back_at for order in traffic.orders[-20:])
            ),
            RECOVERY_SECONDS,
        )
        normal_from = time.monotonic()
        await traffic.until(lambda: orders_since(normal_from) >= 80, 30)

    refused = [
        order for order in traffic.orders if open_from <= order.started_at < order.ended_at < open_until
    ]
    assert len(refused) >= 190
    assert {(order.status, order.error_type, order.outcome) for order in refused} == {
        (503, "circuit_open", "not_executed")
    }
    assert max(order.seconds for order in refused) < AT_ONCE_SECONDS
    assert max(order.seconds for order in traffic.orders) < DEADLINE_SECONDS + AT_ONCE_SECONDS

    assert all(read.answer and read.answer.status == 200 for read in traffic.reads)
    # What was sent before it opened may still wait for its statement, and others for the product it loads.
    settled_from = open_from + STATEMENT_SECONDS
    stale = [read for read in traffic.reads if settled_from < read.started_at < read.ended_at < open_until]
    assert len(stale) >= 40
    assert all((ttl_seconds(read) or 0) < 0 for read in stale)
    assert max(read.seconds for read in stale) < AT_ONCE_SECONDS

    assert {probe.answer and probe.answer.status for probe in traffic.probes} == {200}
    assert max(probe.seconds for probe in traffic.probes) < AT_ONCE_SECONDS  # the event loop never blocked
    while_open = [
        probe for probe in traffic.probes if open_from < probe.started_at < probe.ended_at < open_until
    ]
    assert not is_ready(while_open)
    assert {probe.answer.body for probe in while_open if probe.answer and probe.path == "/readyz"} == {
        b'{"status":"degraded"}'
    }

    assert all(order.acknowledged for order in traffic.orders if order.started_at > normal_from)
    assert all((ttl_seconds(read) or 0) >= 0 for read in traffic.reads if read.started_at > normal_from)
    ledger.assert_clean(traffic.orders)

    samples = service.metrics()
    retries = sum(
        value
        for (name, labels), value in samples.items()
        if name == "retries_total" and dict(labels)["outcome"] != "budget_exhausted"
    )
    assert retries <= 10 + 0.1 * (
        len(traffic.orders) + len(traffic.reads)
    )  # the burst, and a tenth of the calls
    assert samples["db_pool_in_use", ()] == 0
    assert samples["db_pool_size", ()] <= samples["db_pool_max", ()]
    assert service.terminate() == 0


def is_ready(probes: list[Exchange]) -> bool:
    """Whether the last `/readyz` said that all is well."""
    answers = [probe.answer for probe in probes if probe.path == "/readyz"]
    return answers[-1] is not None and answers[-1].body == b'{"status":"ok"}'


async def test_refusal_says_when_to_come_back(
    own_postgres: EmbeddedPostgres, start_service: StartService
) -> None:
    """With the database gone an order, single or in a batch, is refused with the seconds to wait; so are reads."""
    service = start_service(dsn=own_postgres.dsn)
    async with OrderClient(service.url) as client:
        stored = await client.place(OrderRequest.keyed(("SKU-0001", 1)))
        async with killed(own_postgres):
            await until_circuit_opens(client)
            await until_reads_are_refused(client, f"/orders/{stored.order_id}")
            order = await client.send("POST", "/orders", OrderRequest.keyed(("SKU-0001", 1)).document())
            read = await client.send("GET", f"/orders/{stored.order_id}")
            unread = await client.send("GET", "/products/SKU-0002")
            cancelled = await client.cancel(stored.order_id)
            for answer in (order, read, unread, cancelled):
                assert answer.status == 503
                assert 1 <= int(answer.headers["retry-after"]) <= 2
                assert answer.json()["error_type"] == "circuit_open"
                assert answer.json()["outcome"] == "not_executed"
            batch = await client.place_batch([OrderRequest.keyed(("SKU-0001", 1)) for _ in range(3)])
            assert {(one.status, one.error_type) for one in batch} == {(503, "circuit_open")}

            # Nobody calls: it must find the database again by itself.
        async with asyncio.timeout(RECOVERY_SECONDS):
            while (await client.send("GET", "/readyz")).json() != {"status": "ok"}:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert (await client.place(OrderRequest.keyed(("SKU-0001", 1)))).acknowledged
        assert (await client.send("GET", f"/orders/{stored.order_id}")).body == stored.body


async def until_circuit_opens(client: OrderClient) -> None:
    async with asyncio.timeout(20):
        while (await client.place(OrderRequest.keyed(("SKU-0001", 1)))).error_type != "circuit_open":
            pass


async def until_reads_are_refused(client: OrderClient, path: str) -> None:
    """Reads have a breaker of their own."""
    async with asyncio.timeout(20):
        while (await client.send("GET", path)).json()["error_type"] != "circuit_open":
            pass


class SilentServer:
    """Stands where the database was: takes connections, answers nothing, and notes when each began and ended."""

    def __init__(self) -> None:
        self.connections: list[list[float]] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Keep one connection for as long as the other side does."""
        connection = [time.monotonic(), float("inf")]
        self.connections.append(connection)
        self._writers.append(writer)
        with contextlib.suppress(OSError):
            while await reader.read(4096):
                pass
        connection[1] = time.monotonic()
        writer.close()

    def cut(self) -> None:
        """End the connections that are left: the event loop may end before the other side does."""
        for writer in self._writers:
            writer.transport.abort()


async def test_one_trial_at_a_time_reaches_the_database(
    own_postgres: EmbeddedPostgres, start_service: StartService
) -> None:
    """However many ask, an open breaker lets one call at a time through, once in BREAKER_RESET_SECONDS."""
    service = start_service(dsn=own_postgres.dsn, BREAKER_RESET_SECONDS=0.5, DB_CONNECT_TIMEOUT_SECONDS=0.5)
    silent = SilentServer()
    socket_path = Path(parse_dsn(own_postgres.dsn)["host"], ".s.PGSQL.5432")

    def trials() -> float:
        return service.metric("circuit_breaker_transitions_total", breaker="postgres", to="half_open")

    # Without reads, which have a breaker, and so trials, of their own; prices stay cached.
    async with Traffic(service.url, orders_per_second=80, reads_per_second=0) as traffic:
        await traffic.until(lambda: len(acknowledged(traffic.orders)) >= 40, 30)
        async with killed(own_postgres):
            socket_path.unlink()  # noqa: ASYNC240  # a local file
            server = await asyncio.start_unix_server(silent.serve, socket_path)
            await traffic.until(lambda: trials() >= 1, 30)
            watched_from = time.monotonic()
            before = trials()
            reached_before = len(silent.connections)
            await traffic.until(lambda: trials() >= before + 3, 30)
            reached = len(silent.connections) - reached_before
            counted = trials() - before
            server.close()
            silent.cut()
            socket_path.unlink()  # noqa: ASYNC240  # a local file
    asked = [order for order in traffic.orders if order.started_at > watched_from]
    assert len(asked) > 100
    # The one under way when the count began, or ended, may stand on either side.
    assert counted - 1 <= reached <= counted + 1
    trials_seen = sorted(connection for connection in silent.connections if connection[0] > watched_from)
    assert all(ended <= begins for (_, ended), (begins, _) in itertools.pairwise(trials_seen))
