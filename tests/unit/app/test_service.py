"""The order path against a database that answers as it is told; the real one is in the other folders."""

import time
from collections.abc import Mapping
from typing import Any, cast

import orjson
import pytest

from app.catalogue import Catalogue
from app.db import Database, is_database_failure
from app.domain import IncomingOrder, Order, PlacedOrder
from app.errors import ConnectionLost, DeadlineExceeded
from app.resilience import CircuitBreaker, Guard, RetryBudget
from app.service import OrderService
from app.timestamp import timestamp


class ScriptedDatabase:
    """Stores every order it is sent, after raising what it was told to."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.batches: list[list[str]] = []

    async def run(
        self, _sql: str, params: Mapping[str, Any], *, timeout_seconds: float
    ) -> list[tuple[Any, ...]]:
        assert timeout_seconds > 0
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
        guard,
        catalogue,
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
            await orders._guard.breaker.call(_fail)
    await orders._store([incoming("late", seconds_left=-1)], one_by_one=False)
    assert db.batches == []
    with pytest.raises(ConnectionLost):
        await orders._guard.breaker.call(_fail)
    assert orders._guard.breaker.state == "open"  # the third failure in a row: nothing came between


async def test_a_retry_sends_the_same_ids() -> None:
    """The service's own retry repeats the order ids, so that the database can tell it from a new order."""
    db = ScriptedDatabase(ConnectionLost(outcome="unknown"))
    (placed,) = await service(db)._store([incoming("one")], one_by_one=False)
    assert isinstance(placed, PlacedOrder)
    assert not placed.replayed
    assert db.batches == [["one"], ["one"]]


async def _fail() -> None:
    raise ConnectionLost
