"""What one order can do to its neighbours: hold them up, have their work undone, cut their time."""

import asyncio
import contextlib
import itertools
import signal
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator

import psycopg2
import pytest

from tests.support.ledger import Ledger
from tests.support.locks import holding, holding_commits, until_waiting
from tests.support.order_api import execute
from tests.support.order_client import Attempt, OrderClient, OrderRequest
from tests.support.service_process import ServiceProcess

LOCKED = "SKU-0001"
LOCK = f"SELECT FROM products WHERE id = '{LOCKED}' FOR UPDATE"

StartService = Callable[..., ServiceProcess]


@contextlib.asynccontextmanager
async def closed_loop(
    url: str, history: list[Attempt], products: Iterator[str], customers: int
) -> AsyncIterator[None]:
    """Customers who order one of *products* after the other, each as soon as the one before is answered."""

    async def order(client: OrderClient) -> None:
        for product_id in products:
            await client.place(OrderRequest.keyed((product_id, 1)))

    async with OrderClient(url, history=history) as client:
        tasks = [asyncio.create_task(order(client)) for _ in range(customers)]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def answered(history: list[Attempt], since: float, until: float) -> list[Attempt]:
    return [attempt for attempt in history if since <= attempt.started_at and attempt.ended_at < until]


@pytest.mark.parametrize("is_timed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "timed"])
async def test_faults_a_locked_product_stops_no_other_sale(
    start_service: StartService, database_url: str, *, is_timed: bool
) -> None:
    """Others keep their rate and their latency; the locked one's orders are refused in time, and never stored."""
    service = start_service()
    ledger = Ledger(database_url)
    history: list[Attempt] = []
    others = itertools.cycle([f"SKU-{n:04}" for n in range(2, 22)])
    async with (
        closed_loop(service.url, history, others, customers=8),
        closed_loop(service.url, history, itertools.repeat(LOCKED), customers=8),
    ):
        await asyncio.sleep(1.0)
        before = time.monotonic()
        await asyncio.sleep(3.0)
        with holding(database_url, LOCK):
            locked_at = time.monotonic()
            await asyncio.sleep(3.0)
            freed_at = time.monotonic()
        await asyncio.sleep(1.5)
        ended = time.monotonic()

    def of_others(attempts: list[Attempt]) -> list[Attempt]:
        return [attempt for attempt in attempts if attempt.request.items[0][0] != LOCKED]

    free, held = (
        of_others(answered(history, before, locked_at)),
        of_others(answered(history, locked_at, freed_at)),
    )
    assert all(attempt.acknowledged for attempt in (*free, *held))
    # Before, each batch waited 1.5 s for the lock: two batches, of eight at most.
    assert len(held) > 16
    if is_timed:
        # A ratio within one run: they have the processor of the locked one's customers, too.
        assert len(held) >= 0.8 * len(free)
        assert statistics.quantiles([attempt.seconds for attempt in held], n=100)[98] < 0.25
    refused = [
        attempt
        for attempt in history
        if attempt.request.items[0][0] == LOCKED and not attempt.acknowledged and attempt.error_type != "left"
    ]
    assert refused
    assert {(attempt.status, attempt.outcome) for attempt in refused} == {(503, "not_executed")}
    assert max(attempt.seconds for attempt in refused) < 5.5
    assert any(
        attempt.acknowledged and attempt.request.items[0][0] == LOCKED
        for attempt in answered(history, freed_at, ended)
    )
    ledger.assert_clean(history)


@pytest.mark.parametrize("with_key", [True, False], ids=["keyed", "keyless"])
async def test_faults_a_locked_key_stops_no_other_sale(
    start_service: StartService, database_url: str, *, with_key: bool
) -> None:
    """An order whose key another transaction is storing is refused alone; those that came with it are stored."""
    service = start_service()
    history: list[Attempt] = []
    async with OrderClient(service.url, history=history) as client:
        assert (await client.place(OrderRequest.keyed(("SKU-0002", 1)))).acknowledged
        with contextlib.closing(psycopg2.connect(database_url)) as connection, connection.cursor() as cursor:
            # Another transaction has stored an order under the key, and does not commit.
            cursor.execute(
                "INSERT INTO orders (principal, id, customer_id, status, currency, total_cents, lines, created_at,"
                " idempotency_key, request_hash) SELECT principal, gen_random_uuid(), customer_id, status, currency,"
                " total_cents, lines, created_at, 'held', 'another' FROM orders LIMIT 1"
            )
            batch = [
                OrderRequest(((f"SKU-{n:04}", 1),), f"free-{n}" if with_key else None) for n in range(3, 11)
            ]
            batch.insert(4, OrderRequest((("SKU-0003", 1),), "held"))
            attempts = await client.place_batch(batch)
    held = attempts.pop(4)
    assert (held.status, held.error_type, held.outcome) == (503, "database", "not_executed")
    assert all(attempt.acknowledged for attempt in attempts)


async def test_faults_orders_of_a_batch_that_need_a_locked_product(
    start_service: StartService, database_url: str
) -> None:
    """Of one batch request, the orders for the locked product alone are refused; after the lock they are stored."""
    service = start_service()
    ledger = Ledger(database_url)
    async with OrderClient(service.url) as client:
        batch = [OrderRequest.keyed((f"SKU-{n:04}", 1), ("SKU-0050", 1)) for n in range(1, 9)]
        with holding(database_url, LOCK):
            first, *others = await client.place_batch(batch)
            again, *_ = await client.place_batch(batch[:1])
        assert [(attempt.status, attempt.outcome) for attempt in (first, again)] == [
            (503, "not_executed")
        ] * 2
        assert all(attempt.acknowledged for attempt in others)
        await asyncio.sleep(0.2)
        assert (await client.place(batch[0])).acknowledged
        ledger.assert_clean(client.history)


async def test_faults_cancelling_an_order_of_a_locked_product(
    start_service: StartService, database_url: str
) -> None:
    """Its cancellation is refused, and changes nothing."""
    service = start_service()
    async with OrderClient(service.url) as client:
        placed = await client.place(OrderRequest.keyed((LOCKED, 1)))
        with holding(database_url, LOCK):
            answer = await client.cancel(placed.order_id)
        assert answer.status == 503
        assert answer.json()["outcome"] == "not_executed"
        assert (await client.cancel(placed.order_id)).json()["status"] == "cancelled"


@pytest.mark.parametrize("trouble", ["replayed", "sold out"])
async def test_faults_a_repeating_client_does_not_undo_its_neighbours_batches(
    start_service: StartService, database_url: str, trouble: str
) -> None:
    """An order that is known to fail a common attempt has a batch of its own: next to no stock is taken twice over.

    PostgreSQL counts the rows it updated, those of undone attempts too.
    """
    service = start_service()
    updated = "SELECT coalesce(sum(n_tup_upd), 0)::int FROM pg_stat_user_tables WHERE relname = 'products'"
    async with OrderClient(service.url) as client:
        repeated = OrderRequest.keyed(("SKU-0900", 1))
        assert (await client.place(repeated)).acknowledged
        if trouble == "sold out":
            execute(database_url, "UPDATE products SET stock = 0 WHERE id = 'SKU-0909'")
            repeated = OrderRequest((("SKU-0909", 1),))
            assert (await client.place(repeated)).error_type == "out_of_stock"
        for _ in range(50):
            orders = [OrderRequest.keyed((f"SKU-{n:04}", 1)) for n in range(11, 31)]
            attempts = await asyncio.gather(*map(client.place, (repeated, *orders)))
            assert all(attempt.acknowledged for attempt in attempts[1:])
    # A session's statistics come when it ends, if not before.
    service.kill()
    async with asyncio.timeout(20):
        while (rows := execute(database_url, updated)[0][0]) < 1001:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert rows - 1001 <= 100


async def test_faults_crafted_quantities_are_decided_in_one_pass(
    start_service: StartService, database_url: str
) -> None:
    """Orders of which every second takes more than the one before it leaves are decided by one call, in order."""
    service = start_service()
    products = [f"SKU-{n:04}" for n in range(1, 51)]
    execute(database_url, "UPDATE products SET stock = 1000 WHERE id = ANY (%(ids)s)", {"ids": products})
    ledger = Ledger(database_url)
    async with OrderClient(service.url) as client:
        quantities = [600, 500, 240, 200, 96, 80, 38, 32, 15, 13, 6, 6, 2]
        batch = [
            OrderRequest.keyed(*((product_id, pieces) for product_id in products)) for pieces in quantities
        ]
        attempts = await client.place_batch(batch)
        ledger.assert_clean(client.history)
    assert [attempt.error_type for attempt in attempts] == ["", "out_of_stock"] * 6 + [""]
    assert service.metrics()["order_batch_size_count", ()] == 1


async def test_faults_a_process_that_stood_still_takes_the_answers_that_came_meanwhile(
    start_service: StartService, database_url: str
) -> None:
    """Stopped for longer than its time limits, it reads the socket before it calls a timeout."""
    service = start_service(DB_STATEMENT_TIMEOUT_SECONDS=1, REQUEST_DEADLINE_SECONDS=2, BREAKER_FAIL_MAX=1)
    ledger = Ledger(database_url)
    async with OrderClient(service.url) as client:
        assert (await client.place(OrderRequest.keyed(("SKU-0001", 1)))).acknowledged
        with holding_commits(database_url):
            placing = [
                asyncio.create_task(client.place(OrderRequest.keyed(("SKU-0001", 1)))) for _ in range(10)
            ]
            await until_waiting(database_url)
            service.process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(3)
        finally:
            service.process.send_signal(signal.SIGCONT)
        attempts = await asyncio.gather(*placing)
        ledger.assert_clean(client.history)
    # The first batch was answered while nobody listened; what queued behind it had no time left.
    assert attempts[0].acknowledged
    assert {attempt.outcome for attempt in attempts} <= {"stored", "not_executed"}
    assert (
        service.metrics()["circuit_breaker_transitions_total", (("breaker", "postgres"), ("to", "open"))] == 0
    )
