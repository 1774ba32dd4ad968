"""Orders that queue behind a commit that does not end."""

import asyncio
from collections.abc import Callable

from tests.support.ledger import Ledger
from tests.support.locks import holding_commits, until_waiting
from tests.support.order_client import OrderClient, OrderRequest
from tests.support.service_process import ServiceProcess

ORDERS = 1000
HELD_SECONDS = 1.0
PRODUCT, OTHER = "SKU-0001", "SKU-0002"

# So that nothing but the commit holds an order up, and nothing gives up before it is released.
PATIENT = {
    "BATCH_MAX_WAIT_SECONDS": 30,
    "REQUEST_DEADLINE_SECONDS": 60,
    "DB_STATEMENT_TIMEOUT_SECONDS": 40,
}


async def until_queued(service: ServiceProcess, orders: int) -> None:
    while await asyncio.to_thread(service.metric, "order_batch_queue_depth") < orders:  # noqa: ASYNC110
        await asyncio.sleep(0.05)


async def test_a_thousand_orders_behind_one_commit(
    start_service: Callable[..., ServiceProcess], database_url: str
) -> None:
    """A thousand orders that queue behind one commit are stored once each, in the fewest commits there can be."""
    service = start_service(**PATIENT)
    ledger = Ledger(database_url)
    loop = asyncio.get_running_loop()
    async with OrderClient(service.url) as client:
        with holding_commits(database_url):
            first = asyncio.create_task(client.place(OrderRequest(((PRODUCT, 1),))))
            await until_waiting(database_url)
            others = [
                asyncio.create_task(client.place(OrderRequest(((PRODUCT, 1 + n % 9), (OTHER, 1)))))
                for n in range(1, ORDERS)
            ]
            await until_queued(service, ORDERS - 1)
            held_since = loop.time()
            await asyncio.sleep(HELD_SECONDS)
            assert not any(task.done() for task in [first, *others])
            held_seconds = loop.time() - held_since
        attempts = await asyncio.gather(first, *others)

    for attempt in attempts:
        assert attempt.acknowledged, attempt
        assert not attempt.replayed
        assert attempt.document["customer_id"] == attempt.request.customer_id
    assert len({attempt.order_id for attempt in attempts}) == ORDERS
    ledger.assert_clean(client.history)
    stored = ledger.orders()
    assert len(stored) == ORDERS
    commits = len({order.commit for order in stored})
    assert commits <= 12

    metrics = service.metrics()
    assert metrics["order_batch_size_sum", ()] == ORDERS
    assert metrics["order_batch_size_count", ()] == commits
    assert metrics["order_batch_queue_depth", ()] == 0
    for stage in ("queue", "store"):
        assert metrics["order_stage_seconds_count", (("stage", stage),)] == ORDERS
    assert metrics["order_stage_seconds_sum", (("stage", "queue"),)] >= (ORDERS - 1) * held_seconds
    assert metrics["order_stage_seconds_sum", (("stage", "store"),)] >= held_seconds
    assert metrics["orders_total", (("error_type", ""), ("status", "success"))] == ORDERS


async def test_a_caller_that_goes_away(
    start_service: Callable[..., ServiceProcess], database_url: str
) -> None:
    """A caller that disconnects after sending disturbs no neighbour in its batch, and its order is found by its key."""
    service = start_service(**PATIENT)
    ledger = Ledger(database_url)
    async with OrderClient(service.url) as client:
        leaver = OrderRequest.keyed((PRODUCT, 3))
        with holding_commits(database_url):
            first = asyncio.create_task(client.place(OrderRequest(((PRODUCT, 1),))))
            await until_waiting(database_url)
            neighbours = [
                asyncio.create_task(client.place(OrderRequest.keyed((PRODUCT, 1)))) for _ in range(5)
            ]
            leaving = asyncio.create_task(client.place(leaver))
            neighbours += [
                asyncio.create_task(client.place(OrderRequest.keyed((PRODUCT, 1)))) for _ in range(5)
            ]
            await until_queued(service, len(neighbours) + 1)
            leaving.cancel()
            await asyncio.wait([leaving])
        stayed = await asyncio.gather(first, *neighbours)
        assert all(attempt.acknowledged and not attempt.replayed for attempt in stayed)

        again = await client.place(leaver)
        assert again.acknowledged
        assert again.replayed
        ledger.assert_clean(client.history)
        batch = {order.commit for order in ledger.orders() if order.id != stayed[0].order_id}
        assert len(batch) == 1  # they did share one


async def test_a_caller_that_goes_away_during_the_commit(
    start_service: Callable[..., ServiceProcess], database_url: str
) -> None:
    """Disconnecting while the batch is being stored cancels nothing of it."""
    service = start_service(**PATIENT)
    ledger = Ledger(database_url)
    async with OrderClient(service.url) as client:
        leaver, neighbour = OrderRequest.keyed((PRODUCT, 3)), OrderRequest.keyed((OTHER, 1))
        with holding_commits(database_url):
            sending = asyncio.create_task(client.place_batch([leaver]))
            await until_waiting(database_url)
            staying = asyncio.create_task(client.place(neighbour))
            await until_queued(service, 1)
            sending.cancel()
            await asyncio.wait([sending])
        assert (await staying).acknowledged

        again = await client.place(leaver)
        assert again.acknowledged
        assert again.replayed
        ledger.assert_clean(client.history)
