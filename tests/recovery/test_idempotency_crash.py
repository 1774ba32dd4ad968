"""One key, one order: through races, lost answers and killed processes."""

import asyncio
import contextlib
import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from app.embedded_postgres import EmbeddedPostgres
from tests.support.ledger import Ledger
from tests.support.order_client import Attempt, OrderClient, OrderRequest
from tests.support.relay import Relay
from tests.support.service_process import ServiceProcess

STORE = b"store_orders"
LINE = ("SKU-0001", 2)


@pytest.fixture
def relay(database_url: str) -> Iterator[Relay]:
    """A relay to the test's database."""
    with Relay(database_url) as relay:
        yield relay


def orders_total(service: ServiceProcess, status: str, error_type: str = "") -> float:
    return service.metric("orders_total", status=status, error_type=error_type)


async def ask(service: ServiceProcess, request: OrderRequest, history: list[Attempt]) -> Attempt:
    async with OrderClient(service.url, history=history) as client:
        return await client.place(request)


async def test_fifty_at_once_on_two_replicas(
    start_service: Callable[..., ServiceProcess], database_url: str
) -> None:
    """Fifty requests at once with one key, over two processes, store one order and get one answer."""
    services = [start_service(), start_service()]
    ledger = Ledger(database_url)
    request, history = OrderRequest.keyed(LINE, ("SKU-0002", 1)), list[Attempt]()
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(OrderClient(service.url, history=history)) for service in services
        ]
        attempts = await asyncio.gather(*(clients[n % 2].place(request) for n in range(50)))
    assert {attempt.status for attempt in attempts} == {201}
    assert len({attempt.body for attempt in attempts}) == 1
    assert sum(not attempt.replayed for attempt in attempts) == 1
    ledger.assert_clean(history)
    assert len(ledger.orders()) == 1
    assert sum(orders_total(service, "success") for service in services) == 1
    assert sum(orders_total(service, "replayed") for service in services) == 49


async def test_service_killed_between_commit_and_answer(
    start_service: Callable[..., ServiceProcess], database_url: str, relay: Relay
) -> None:
    """What was committed when the service was killed is what the next one answers the key with."""
    service = start_service(dsn=relay.dsn)
    ledger = Ledger(database_url)
    request, history = OrderRequest.keyed(LINE), list[Attempt]()
    held = relay.hold_answer(STORE)
    asking = asyncio.create_task(ask(service, request, history))
    await asyncio.to_thread(held.wait)
    service.kill()
    assert (await asking).outcome == "unknown"

    again = await ask(start_service(), request, history)
    assert again.acknowledged
    assert again.replayed
    ledger.assert_clean(history)
    assert [order.id for order in ledger.orders()] == [again.order_id]


@pytest.mark.parametrize("wanted", [OrderRequest.keyed(LINE), OrderRequest((LINE,))], ids=["keyed", "no key"])
async def test_own_retry_is_no_replay(
    start_service: Callable[..., ServiceProcess], database_url: str, relay: Relay, wanted: OrderRequest
) -> None:
    """Where the answer to a commit is lost the service finds its own order again, and answers as if nothing was."""
    service = start_service(dsn=relay.dsn)
    ledger = Ledger(database_url)
    stock = ledger.stock()[LINE[0]]
    history = list[Attempt]()
    lost = relay.cut_answer(STORE)
    attempt = await ask(service, wanted, history)
    lost.wait(0)  # it did happen
    assert attempt.acknowledged
    assert not attempt.replayed
    ledger.assert_clean(history)
    assert ledger.stock()[LINE[0]] == stock - LINE[1]
    assert orders_total(service, "success") == 1
    assert orders_total(service, "replayed") == 0
    assert service.metric("retries_total", operation="store_orders", outcome="success") == 1


async def test_unknown_when_every_answer_is_lost(
    start_service: Callable[..., ServiceProcess], database_url: str, relay: Relay
) -> None:
    """Where even the retries get no answer the client is told `unknown`, and its key tells the truth later."""
    service = start_service(dsn=relay.dsn, RETRY_MAX_ATTEMPTS=3, BREAKER_FAIL_MAX=10)
    ledger = Ledger(database_url)
    request, history = OrderRequest.keyed(LINE), list[Attempt]()
    lost = relay.cut_answer(STORE, times=3)
    attempt = await ask(service, request, history)
    for _ in range(3):
        lost.wait(0)
    assert (attempt.status, attempt.error_type, attempt.outcome) == (503, "database", "unknown")
    assert orders_total(service, "error", "database") == 1

    again = await ask(service, request, history)
    assert again.acknowledged
    assert again.replayed
    ledger.assert_clean(history)


async def test_unknown_is_not_taken_back_by_the_breaker(
    start_service: Callable[..., ServiceProcess], database_url: str, relay: Relay
) -> None:
    """An order that was sent and not answered stays `unknown` when the breaker refuses to send it again."""
    service = start_service(dsn=relay.dsn, BREAKER_FAIL_MAX=1, BREAKER_RESET_SECONDS=0.5)
    ledger = Ledger(database_url)
    requests, history = [OrderRequest.keyed(LINE), OrderRequest((LINE,))], list[Attempt]()
    for request in requests:
        relay.cut_answer(STORE)
        attempt = await ask(service, request, history)
        assert (attempt.status, attempt.error_type, attempt.outcome) == (503, "circuit_open", "unknown")
        await until_closed(service)
    ledger.assert_clean(history)
    stored = ledger.orders()
    assert len(stored) == len(requests)  # so `not_executed` would have been a lie

    again = await ask(service, requests[0], history)
    assert again.replayed
    assert again.order_id in {order.id for order in stored}


async def until_closed(service: ServiceProcess) -> None:
    while await asyncio.to_thread(service.metric, "circuit_breaker_state", breaker="postgres"):  # noqa: ASYNC110
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def supervised(postgres: EmbeddedPostgres) -> AsyncIterator[None]:
    """Restart the server whenever it dies."""
    supervising = asyncio.create_task(postgres.supervise())
    try:
        yield
    finally:
        supervising.cancel()
        await asyncio.wait([supervising])


async def order_until(stop: asyncio.Event, client: OrderClient, answers: asyncio.Queue[Attempt]) -> None:
    """Place one order after the other, each with a key of its own."""
    while not stop.is_set():
        attempt = await client.place(OrderRequest.keyed(LINE))
        answers.put_nowait(attempt)
        if not attempt.acknowledged:
            await asyncio.sleep(0.02)


async def ask_until_acknowledged(client: OrderClient, request: OrderRequest) -> None:
    async with asyncio.timeout(30):
        while not (await client.place(request)).acknowledged:  # noqa: ASYNC110  # as a customer would
            await asyncio.sleep(0.1)


def kill_postgres(postgres: EmbeddedPostgres, *, all_at_once: bool) -> None:
    """SIGKILL the main process, whose children may still end a commit; or all of them."""
    for pid in postgres.processes() if all_at_once else [postgres.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
async def test_postgres_killed_mid_batch(
    start_service: Callable[..., ServiceProcess], own_postgres: EmbeddedPostgres, kills: int
) -> None:
    """However often the database is killed: what was acknowledged is there, and every key is stored exactly once.

    At least *kills* times, and until a batch was hit: a kill between two leaves nobody in doubt.
    """
    service = start_service(dsn=own_postgres.dsn)
    ledger = Ledger(own_postgres.dsn)
    async with supervised(own_postgres), OrderClient(service.url) as client:
        for kill in itertools.count():
            stop, answers = asyncio.Event(), asyncio.Queue[Attempt]()
            customers = [asyncio.create_task(order_until(stop, client, answers)) for _ in range(20)]
            for _ in range(100 + 7 * kill):  # another moment of a batch each time
                assert (await answers.get()).acknowledged
            kill_postgres(own_postgres, all_at_once=kill % 2 == 1)
            while (await answers.get()).acknowledged:
                pass
            stop.set()
            await asyncio.gather(*customers)
            await ask_until_acknowledged(client, OrderRequest.keyed(LINE))
            has_hit_a_batch = any(attempt.outcome == "unknown" for attempt in client.history)
            if kill + 1 >= kills and has_hit_a_batch:
                break

        requests = {attempt.request for attempt in client.history}
        await asyncio.gather(*(ask_until_acknowledged(client, request) for request in requests))
        ledger.assert_clean(client.history)
        assert {order.customer_id for order in ledger.orders()} == {
            request.customer_id for request in requests
        }
