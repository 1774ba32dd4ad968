"""The order path against a database that answers as it is told; the real one is in the other folders."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any, cast

import orjson
import pytest

from app.catalogue import Catalogue
from app.db import Database, is_database_failure
from app.domain import IncomingOrder, Order, OrderQuery, OrderStatus, PlacedOrder
from app.errors import ConnectionLost, DeadlineExceeded
from app.resilience import CircuitBreaker, Guard, RetryBudget
from app.service import OrderService
from app.timestamp import timestamp


class ScriptedDatabase:
    """Stores every order it is sent, after raising what it was told to."""

    def __init__(self, *failures: Exception, seconds: float = 0.0) -> None:
        self.failures = list(failures)
        self.seconds = seconds
        self.batches: list[list[str]] = []
        self.time_limits: list[float] = []

    async def run(
        self, _sql: str, params: Mapping[str, Any], *, timeout_seconds: float
    ) -> list[tuple[Any, ...]]:
        assert timeout_seconds > 0
        self.time_limits.append(timeout_seconds)
        await asyncio.sleep(self.seconds)
        self.batches.append([order_id for _principal, order_id, *_ in orjson.loads(params["batch"])])
        if self.failures:
            raise self.failures.pop(0)
        return [(None, "stored", None, None, None, None, None)]


def service(db: ScriptedDatabase) -> OrderService:
    breaker = CircuitBreaker("test", fail_max=3, reset_seconds=2, is_failure=is_database_failure)
    database, guard = cast("Database", db), Guard(breaker, RetryBudget(), max_attempts=3)
    catalogue = Catalogue(
        database, guard, cache_ttl_seconds=300, cache_max_size=10, request_deadline_seconds=5
    )
    return OrderService(
        database,
        catalogue,
        writes=guard,
        reads=guard,
        batch_max_size=100,
        batch_max_wait_seconds=0.5,
        request_deadline_seconds=5,
    )


def incoming(order_id: str, *, seconds_left: float = 5) -> IncomingOrder:
    now = time.monotonic()
    return IncomingOrder(
        principal="p",
        customer_id="c",
        items=[("SKU-0001", 1)],
        idempotency_key=None,
        arrived_at=now,
        parsed_at=now,
        deadline=now + seconds_left,
        order=Order(order_id, "c", "confirmed", "EUR", 1, [("SKU-0001", 1, 1)], timestamp()),
    )


async def test_an_order_whose_time_is_up_is_not_sent_and_does_not_cut_its_neighbours_time() -> None:
    """An order with next to no time left is taken out, `not_executed`; its neighbours are stored."""
    db = ScriptedDatabase()
    late, in_time = await service(db)._store(
        [incoming("late", seconds_left=0.01), incoming("in-time")], one_by_one=False
    )
    assert isinstance(late, DeadlineExceeded)
    assert late.outcome == "not_executed"
    assert isinstance(in_time, PlacedOrder)
    assert db.batches == [["in-time"]]


async def test_a_batch_of_late_orders_reaches_neither_the_database_nor_the_breaker() -> None:
    """A batch of which nothing is sent says nothing of the database's health."""
    db = ScriptedDatabase()
    orders = service(db)
    for _ in range(2):
        with pytest.raises(ConnectionLost):
            await orders._writes.breaker.call(_fail)
    await orders._store([incoming("late", seconds_left=-1)], one_by_one=False)
    assert db.batches == []
    with pytest.raises(ConnectionLost):
        await orders._writes.breaker.call(_fail)
    assert orders._writes.breaker.state == "open"  # the third failure in a row: nothing came between


async def test_a_retry_sends_the_same_ids() -> None:
    """The service's own retry repeats the order ids, so that the database can tell it from a new order."""
    db = ScriptedDatabase(ConnectionLost(outcome="unknown"))
    (placed,) = await service(db)._store([incoming("one")], one_by_one=False)
    assert isinstance(placed, PlacedOrder)
    assert not placed.replayed
    assert db.batches == [["one"], ["one"]]


async def test_faults_an_order_that_runs_out_of_time_does_not_end_its_batch() -> None:
    """It is answered at its own deadline, `unknown`; its batch goes on with all the time its neighbours have."""
    db = ScriptedDatabase(seconds=0.6)
    orders = service(db)
    started = time.monotonic()
    late, in_time = incoming("late", seconds_left=0.3), incoming("in-time")
    failure, placed = await asyncio.gather(
        orders._queue(late, is_suspect=False),
        orders._queue(in_time, is_suspect=False),
        return_exceptions=True,
    )
    assert isinstance(failure, DeadlineExceeded)
    assert failure.outcome == "unknown"
    assert isinstance(placed, PlacedOrder)
    assert db.batches == [["late", "in-time"]]
    assert db.time_limits[0] > 4
    assert time.monotonic() - started >= 0.6
    assert orders._writes.breaker._pybreaker.fail_counter == 0


async def test_faults_an_order_whose_time_ends_in_the_queue_is_not_executed() -> None:
    """It waits behind a batch for longer than it has, is answered in time, and never sent."""
    db = ScriptedDatabase(seconds=0.4)
    orders = service(db)
    first = orders._queue(incoming("first"), is_suspect=False)
    await asyncio.sleep(0.05)
    with pytest.raises(DeadlineExceeded) as raised:
        await orders._queue(incoming("late", seconds_left=0.2), is_suspect=False)
    assert raised.value.outcome == "not_executed"
    assert isinstance(await first, PlacedOrder)
    await orders.drain()
    assert db.batches == [["first"]]


class Shelf:
    """A database of no orders that notes what it is asked at once."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def run(self, _sql: str, params: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        self.asked.append(len(orjson.loads(params["queries"])))
        return []


@pytest.mark.parametrize(
    ("customer_id", "status", "asked"),
    [
        (None, None, [5]),
        ("c", None, [5]),
        (None, "cancelled", [5]),
        (None, "confirmed", [1] * 5),
        ("c", "confirmed", [1] * 5),
        ("c", "cancelled", [1] * 5),
    ],
)
async def test_faults_a_page_that_may_take_long_is_read_alone(
    customer_id: str | None, status: OrderStatus | None, asked: list[int]
) -> None:
    """Pages that an index leads to share a round trip; the others could cost their neighbours their time."""
    shelf = Shelf()
    orders = service(cast("ScriptedDatabase", shelf))
    query = OrderQuery("p", customer_id, status, None, 50)
    assert await asyncio.gather(*(orders.orders(query) for _ in range(5))) == [[]] * 5
    assert shelf.asked == asked


async def _fail() -> None:
    raise ConnectionLost
