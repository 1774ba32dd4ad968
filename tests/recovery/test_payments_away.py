"""Payments is slow, hangs, fails or is gone, or a replica dies: orders are taken all the same, each charged once."""

import asyncio
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.ledger import Ledger
from tests.support.order_api import execute
from tests.support.order_client import OrderClient, OrderRequest
from tests.support.payments_process import PaymentsProcess, audit, due, until_settled
from tests.support.relay import Relay
from tests.support.service_process import ServiceProcess
from tests.support.traffic import PRODUCTS, Traffic

StartService = Callable[..., ServiceProcess]

SLOWEST_ORDER_SECONDS = 1.0  # usually 0.01: far below the 2 s for which an attempt at payments waits

# Pending orders as a service stores them, two lines each.
INSERT_BACKLOG = """
      WITH taken AS (
           UPDATE products SET stock = stock - 3 * %(orders)s WHERE id IN ('SKU-0001', 'SKU-0002')
           )
    INSERT INTO orders (principal, id, customer_id, status, currency, total_cents, lines, created_at, request_hash,
                        payment_due)
    SELECT 'anonymous', gen_random_uuid(), 'c-' || n, 'pending', 'EUR', 300 + 3 * n,
           jsonb_build_array(jsonb_build_array('SKU-0001', 3, 100), jsonb_build_array('SKU-0002', 3, n)), now(), 'h',
           now()
      FROM generate_series(1, %(orders)s) AS n
"""


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # another process works on it
            await asyncio.sleep(0.02)


async def test_killed_between_authorisation_and_booking(
    database_url: str, payments: PaymentsProcess, start_service: StartService
) -> None:
    """kill -9 after payments has charged, before the service knows: another replica books it, charged once."""
    payments.behave(latency_ms=3000, latency_spread=0)  # it is carried out after half of that
    settings = {"PAYMENTS_URL": payments.url, "PAYMENTS_DEADLINE_SECONDS": 4, "PAYMENTS_TIMEOUT_SECONDS": 4}
    service = start_service(**settings)
    ledger = Ledger(database_url)
    async with OrderClient(service.url) as client:
        placed = await client.place(OrderRequest.keyed(("SKU-0001", 1)))
        await until(lambda: payments.entry(placed.order_id).charges == 1)
        service.kill()
        assert [order.status for order in ledger.orders()] == ["pending"]
    payments.behave(latency_ms=1)
    start_service(**settings)
    await until_settled(database_url)
    assert [order.status for order in ledger.orders()] == ["confirmed"]
    assert payments.entry(placed.order_id).asked == 2
    assert audit(ledger.orders(), payments.book()) == []


@pytest.mark.parametrize("then", ["cut", "kill"])
async def test_a_booking_that_is_committed_and_not_answered(
    database_url: str, payments: PaymentsProcess, start_service: StartService, then: str
) -> None:
    """The answer to a booking's commit is lost, or its service killed before it comes: stock comes back once."""
    payments.behave(decline_rate=1)
    with Relay(database_url) as relay:
        service = start_service(dsn=relay.dsn, PAYMENTS_URL=payments.url, PAYMENTS_DEADLINE_SECONDS=1)
        ledger = Ledger(database_url)
        intercept = relay.hold_answer if then == "kill" else relay.cut_answer
        interception = intercept(b"book_payments_v1")
        async with OrderClient(service.url) as client:
            await asyncio.gather(*(client.place(OrderRequest.keyed((PRODUCTS[n], 2))) for n in range(5)))
            await asyncio.to_thread(interception.wait)
            if then == "kill":
                service.kill()
                start_service(PAYMENTS_URL=payments.url)
            await until_settled(database_url)
        assert {order.status for order in ledger.orders()} == {"declined"}
        ledger.assert_clean(client.history)
        assert audit(ledger.orders(), payments.book()) == []
        service.kill()


def is_hanging(payments: PaymentsProcess) -> None:
    payments.freeze()


def is_gone(payments: PaymentsProcess) -> None:
    payments.kill()


def fails(payments: PaymentsProcess) -> None:
    payments.behave(error_rate=1)


def is_slow(payments: PaymentsProcess) -> None:
    payments.behave(latency_ms=5000, latency_spread=0)


def flaps(payments: PaymentsProcess) -> None:
    payments.behave(flap_seconds=1)


def is_unreliable(payments: PaymentsProcess) -> None:
    payments.behave(error_rate=0.2, reset_rate=0.1, hang_rate=0.05, lost_answer_rate=0.1)


def is_well(payments: PaymentsProcess) -> None:
    payments.thaw()
    payments.kill()  # what it was asked while it hung is forgotten, and must be asked again
    payments.start()


@pytest.mark.parametrize("goes_wrong", [is_hanging, is_gone, fails, is_slow, flaps, is_unreliable])
async def test_orders_are_taken_at_full_speed_and_the_backlog_drains(
    database_url: str,
    payments: PaymentsProcess,
    start_service: StartService,
    goes_wrong: Callable[[PaymentsProcess], None],
) -> None:
    """Every order is acknowledged, and as fast as ever; what is due is told, and settled when payments is back."""
    service = start_service(
        PAYMENTS_URL=payments.url, PAYMENTS_DEADLINE_SECONDS=1.5, PAYMENTS_TIMEOUT_SECONDS=1
    )
    ledger = Ledger(database_url)
    async with Traffic(
        service.url, orders_per_second=60, reads_per_second=1, probes_per_second=10
    ) as traffic:
        await traffic.until(lambda: len(traffic.orders) >= 30, 20)
        goes_wrong(payments)
        wrong_from = time.monotonic()
        await traffic.until(lambda: time.monotonic() > wrong_from + 4, 10)
        if goes_wrong not in (flaps, is_unreliable):
            await traffic.until(lambda: service.metric("payments_pending") > 100, 10)
        oldest_seconds = service.metric("payments_oldest_pending_seconds")
        state = service.metric("circuit_breaker_state", breaker="payments")
        is_well(payments)
    if goes_wrong not in (flaps, is_unreliable):
        assert 1 < oldest_seconds < 20
        assert state > 0
    assert all(attempt.acknowledged for attempt in traffic.orders)
    assert max(attempt.seconds for attempt in traffic.orders) < SLOWEST_ORDER_SECONDS
    # Payments is no reason to send requests elsewhere.
    assert {probe.answer and probe.answer.body for probe in traffic.probes} == {b'{"status":"ok"}'}
    await until_settled(database_url)
    ledger.assert_clean(traffic.orders)
    assert {order.status for order in ledger.orders()} == {"confirmed"}
    assert audit(ledger.orders(), payments.book()) == []
    await until(lambda: service.metric("payments_pending") == 0)
    assert service.metric("payments_oldest_pending_seconds") == 0
    assert service.metric("circuit_breaker_state", breaker="payments") == 0
    assert service.terminate() == 0


async def test_an_open_breaker_lets_one_trial_per_interval_through(
    payments: PaymentsProcess, start_service: StartService
) -> None:
    """While payments fails with orders coming it is hardly asked: no retry storm, at most 1.1 requests an order."""
    payments.behave(error_rate=1)
    service = start_service(PAYMENTS_URL=payments.url, BREAKER_RESET_SECONDS=1)
    async with Traffic(service.url, orders_per_second=40, reads_per_second=1) as traffic:
        await traffic.until(
            lambda: (
                service.metric("circuit_breaker_state", breaker="payments") == 2 and len(traffic.orders) > 40
            ),
            20,
        )
        before, started_at = payments.attempts(), time.monotonic()
        await traffic.until(lambda: time.monotonic() > started_at + 6, 10)
        seconds, attempts = time.monotonic() - started_at, payments.attempts() - before
        all_attempts, orders = payments.attempts(), len(traffic.orders)
    assert 3 <= attempts <= seconds / 1 + 1
    assert all_attempts <= 1.1 * orders


async def test_retries_are_a_tenth_of_the_calls(
    database_url: str, payments: PaymentsProcess, start_service: StartService
) -> None:
    """Without a breaker, too, payments that is down is asked at most 1.1 times for each time there is an occasion."""
    payments.behave(error_rate=1)
    service = start_service(PAYMENTS_URL=payments.url, BREAKER_FAIL_MAX=10_000)
    execute(database_url, INSERT_BACKLOG, {"orders": 400})
    await until(lambda: service.metric("payments_total", outcome="failed") >= 600)
    retries = sum(
        service.metric("retries_total", operation="authorise_payment", outcome=outcome)
        for outcome in ("success", "failure")
    )
    attempts = service.metric("payment_seconds_count")
    assert 10 <= retries <= 10 + 0.1 * attempts
    assert service.metric("retries_total", operation="authorise_payment", outcome="budget_exhausted") > 0


@pytest.mark.parametrize(
    ("orders", "seconds_between_kills"),
    [
        pytest.param(1000, 2, id="1000"),
        pytest.param(10_000, 5, id="10000", marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
    ],
)
async def test_three_replicas_share_one_backlog_and_die(
    database_url: str,
    payments: PaymentsProcess,
    start_service: StartService,
    tmp_path: Path,
    orders: int,
    seconds_between_kills: float,
) -> None:
    """One is killed again and again, and replaced: each order is settled, charged once or declined, none is stuck."""
    payments.behave(latency_ms=100, decline_rate=0.1, lost_answer_rate=0.02)
    settings = {
        "PAYMENTS_URL": payments.url,
        "PAYMENTS_DEADLINE_SECONDS": 1,
        "PAYMENTS_MAX_IN_FLIGHT": 6 + orders // 1000,
    }
    start_service().kill()  # the schema
    execute(database_url, INSERT_BACKLOG, {"orders": orders})
    ledger = Ledger(database_url)
    replicas = [start_service(**settings) for _ in range(3)]
    kills = 0
    for turn in itertools.count():
        await asyncio.sleep(seconds_between_kills)
        if not due(database_url):
            break
        if turn == 0:  # each has its share
            assert all(replica.metric("payment_seconds_count") > 0 for replica in replicas)
        replicas[turn % 3].kill()
        kills += 1
        replicas[turn % 3].start()
    assert kills >= 2
    await until_settled(database_url, 10)
    assert audit(ledger.orders(), payments.book()) == []
    ledger.assert_clean([])
    declined = sum(order.status == "declined" for order in ledger.orders())
    assert 0.05 * orders < declined < 0.15 * orders
