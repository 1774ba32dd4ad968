"""Stock under contention: what there is, is sold, exactly; and nobody waits for somebody else's product."""

import asyncio
import random
from collections.abc import Callable, Iterable, Iterator

import pytest

from app.embedded_postgres import EmbeddedPostgres
from tests.support.ledger import Ledger
from tests.support.order_api import execute
from tests.support.order_client import Attempt, OrderClient, OrderRequest
from tests.support.service_process import ServiceProcess

HOT = [f"SKU-{n:04}" for n in range(1, 6)]

# A slow machine must not turn contention into refusals: every order is stored, or there was no stock.
PATIENT = {
    "BATCH_MAX_WAIT_SECONDS": 20,
    "REQUEST_DEADLINE_SECONDS": 40,
    "DB_STATEMENT_TIMEOUT_SECONDS": 20,
    "CATALOG_SIZE": 10,
}


def set_stock(dsn: str, product_ids: Iterable[str], pieces: int) -> None:
    update = "UPDATE products SET stock = %(pieces)s WHERE id = ANY (%(product_ids)s)"
    execute(dsn, update, {"pieces": pieces, "product_ids": list(product_ids)})


class Shoppers:
    """Customers of two replicas, who order, order again, and change their minds."""

    def __init__(self, replicas: tuple[OrderClient, OrderClient], seed: int) -> None:
        self._replicas = replicas
        self._random = random.Random(seed)  # noqa: S311
        self.cancelled = 0

    def requests(self, count: int) -> Iterator[OrderRequest]:
        """Orders of one or two of the hot products, in either order, one to three pieces each."""
        for _ in range(count):
            products = self._random.sample(HOT, self._random.choice([1, 1, 2]))
            yield OrderRequest.keyed(
                *((product_id, self._random.choice([1, 1, 2, 3])) for product_id in products)
            )

    async def shop(self, requests: Iterator[OrderRequest]) -> None:
        """Take one request after the other from *requests*, which others share."""
        for request in requests:
            here, there = self._random.sample(self._replicas, 2)
            chance = self._random.random()
            if chance < 0.1:  # impatient: twice at once
                await asyncio.gather(here.place(request), there.place(request))
            elif chance < 0.2:  # forgetful: once more
                await here.place(request)
                await there.place(request)
            else:
                attempt = await here.place(request)
                if chance < 0.4 and attempt.acknowledged:
                    await self._cancel(attempt.order_id)

    async def sell_the_rest(self) -> None:
        """Buy every product piece by piece until there is none."""
        client = self._replicas[0]
        for product_id in HOT:
            while (await client.place(OrderRequest.keyed((product_id, 1)))).acknowledged:
                pass

    async def _cancel(self, order_id: str) -> None:
        """Cancel an order, now and then on both replicas at once: its stock comes back once."""
        replicas = self._replicas[: self._random.choice([1, 2])]
        for answer in await asyncio.gather(*(client.cancel(order_id) for client in replicas)):
            assert answer.status == 200, answer
            assert answer.json()["status"] == "cancelled"
        self.cancelled += 1


@pytest.mark.parametrize("orders", [1000, pytest.param(5000, marks=pytest.mark.slow)])
async def test_hot_products_on_two_replicas(
    start_service: Callable[..., ServiceProcess], own_postgres: EmbeddedPostgres, orders: int
) -> None:
    """Two replicas sell exactly the stock of five contended products, and no transaction meets a deadlock."""
    services = [start_service(dsn=own_postgres.dsn, **PATIENT) for _ in range(2)]
    pieces = orders * 4 // 5  # and about 2 are asked for by an order
    set_stock(own_postgres.dsn, HOT, pieces // len(HOT))
    ledger = Ledger(own_postgres.dsn)
    history: list[Attempt] = []
    async with (
        OrderClient(services[0].url, history=history) as one,
        OrderClient(services[1].url, history=history) as two,
    ):
        shoppers = Shoppers((one, two), seed=orders)
        requests = shoppers.requests(orders)
        async with asyncio.TaskGroup() as group:
            for _ in range(100):
                group.create_task(shoppers.shop(requests))
        await shoppers.sell_the_rest()

    assert {attempt.error_type for attempt in history} == {"", "out_of_stock"}
    assert any(attempt.replayed for attempt in history)
    assert shoppers.cancelled
    ledger.assert_clean(history)
    assert [ledger.stock()[product_id] for product_id in HOT] == [0] * len(HOT)
    cancelled = sum(order.status == "cancelled" for order in ledger.orders())
    assert cancelled == shoppers.cancelled
    sold = sum(
        quantity for order in ledger.orders() if order.status == "confirmed" for _, quantity, _ in order.lines
    )
    assert sold == pieces
    assert "deadlock detected" not in own_postgres.log_path.read_text()


async def test_sold_out_does_not_hold_up_the_others(
    start_service: Callable[..., ServiceProcess], database_url: str
) -> None:
    """Orders for a sold-out product are refused in the same pass that stores their neighbours, one pass for all."""
    service = start_service(**PATIENT)
    sold_out, *others = HOT
    set_stock(database_url, [sold_out], 0)
    ledger = Ledger(database_url)
    async with OrderClient(service.url) as client:
        attempts = await asyncio.gather(
            *(
                client.place(OrderRequest.keyed((sold_out if n % 2 else others[n % len(others)], 1 + n % 3)))
                for n in range(400)
            )
        )
    for n, attempt in enumerate(attempts):
        if n % 2:
            assert (attempt.status, attempt.error_type) == (409, "out_of_stock")
            assert attempt.outcome == "not_executed"
        else:
            assert attempt.acknowledged
    ledger.assert_clean(client.history)
    assert service.metric("order_batch_size_sum") == len(attempts)  # no order was sent twice


async def test_first_come_first_served(
    start_service: Callable[..., ServiceProcess], database_url: str
) -> None:
    """Within a batch the stock goes to those who came first; one that asks for too much stands in nobody's way."""
    service = start_service(**PATIENT)
    product_id = HOT[0]
    set_stock(database_url, [product_id], 5)
    ledger = Ledger(database_url)
    async with OrderClient(service.url) as client:
        attempts = await client.place_batch(
            [OrderRequest.keyed((product_id, quantity)) for quantity in (3, 9, 4, 2, 1)]
        )
    assert [attempt.status for attempt in attempts] == [201, 409, 409, 201, 409]
    ledger.assert_clean(client.history)
    assert ledger.stock()[product_id] == 0
