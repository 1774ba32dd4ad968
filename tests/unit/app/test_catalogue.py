"""Prices, and what it takes to look them up."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any, cast

import pytest

from app.catalogue import Catalogue
from app.db import Database, is_database_failure
from app.errors import UnknownProduct
from app.resilience import CircuitBreaker, Guard, RetryBudget


class Shelf:
    """A database of products that counts what it is asked."""

    def __init__(self) -> None:
        self.products: dict[str, tuple[Any, ...]] = {}
        self.asked: list[list[str]] = []
        self.most_tasks = 0

    async def run(self, _sql: str, params: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        self.asked.append(list(params["ids"]))
        self.most_tasks = max(self.most_tasks, len(asyncio.all_tasks()))
        return [self.products[product_id] for product_id in params["ids"] if product_id in self.products]


def catalogue(shelf: Shelf) -> Catalogue:
    breaker = CircuitBreaker("test", fail_max=3, reset_seconds=2, is_failure=is_database_failure)
    return Catalogue(
        cast("Database", shelf),
        Guard(breaker, RetryBudget(), max_attempts=3),
        cache_ttl_seconds=300,
        cache_max_size=10_000,
        request_deadline_seconds=5,
    )


async def test_faults_a_batch_of_unknown_products_costs_one_query() -> None:
    """A hundred orders of fifty products nobody knows: one query, and no task for a line."""
    shelf = Shelf()
    priced = catalogue(shelf)
    deadline = time.monotonic() + 5
    results = await asyncio.gather(
        *(
            priced.price([(f"X-{order}-{line}", 1) for line in range(50)], deadline=deadline)
            for order in range(100)
        ),
        return_exceptions=True,
    )
    assert all(isinstance(result, UnknownProduct) for result in results)
    assert [len(ids) for ids in shelf.asked] == [5000]
    assert shelf.most_tasks < 150


async def test_faults_a_product_that_is_gone_is_read_anew() -> None:
    """What the database refused as unknown is not sold from the cache again."""
    shelf = Shelf()
    shelf.products["P-1"] = ("P-1", "A product", 100, "EUR")
    priced = catalogue(shelf)
    deadline = time.monotonic() + 5
    assert (await priced.price([("P-1", 3)], deadline=deadline)).total_cents == 300
    shelf.products.clear()
    assert (await priced.price([("P-1", 3)], deadline=deadline)).total_cents == 300
    priced.forget(["P-1"])
    with pytest.raises(UnknownProduct):
        await priced.price([("P-1", 3)], deadline=deadline)
