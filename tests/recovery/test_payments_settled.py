"""Orders and payments agree: pending, then confirmed or declined; charged once, and a cancelled one not at all."""

import asyncio
import signal
import time
from collections.abc import Callable

from tests.support.ledger import Ledger
from tests.support.order_api import execute
from tests.support.order_client import OrderClient, OrderRequest
from tests.support.payments_process import PaymentsProcess, audit, due, until_settled
from tests.support.service_process import ServiceProcess

StartService = Callable[..., ServiceProcess]

PRODUCTS = [f"SKU-{n:04}" for n in range(1, 11)]


async def status_of(client: OrderClient, order_id: str) -> str:
    return str((await client.send("GET", f"/orders/{order_id}")).json()["status"])


async def until_status(client: OrderClient, order_id: str, status: str) -> None:
    async with asyncio.timeout(10):
        while await status_of(client, order_id) != status:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_an_order_is_pending_then_confirmed_and_a_replay_gets_the_first_answer(
    payments: PaymentsProcess, start_service: StartService
) -> None:
    """It is answered as pending, confirmed soon after, charged once; a replay is the first answer, byte for byte."""
    service = start_service(PAYMENTS_URL=payments.url)
    async with OrderClient(service.url) as client:
        first = await client.place(OrderRequest.keyed(("SKU-0001", 2)))
        assert first.document["status"] == "pending"
        await until_status(client, first.order_id, "confirmed")
        again = await client.place(first.request)
        assert again.replayed
        assert again.body == first.body
    entry = payments.entry(first.order_id)
    assert (entry.charges, entry.charged_cents) == (1, first.document["total_cents"])
    assert service.metric("payments_total", outcome="authorised") == 1
    assert service.metric("payment_seconds_count") == 1


async def test_a_replay_tells_how_the_order_began_whatever_is_set_now(
    payments: PaymentsProcess, start_service: StartService
) -> None:
    """An order that was confirmed at once is so in a replay with payments; one that was pending, without."""
    without = start_service()
    with_payments = start_service(PAYMENTS_URL=payments.url)
    async with OrderClient(without.url) as plain, OrderClient(with_payments.url) as paid:
        confirmed = await plain.place(OrderRequest.keyed(("SKU-0001", 1)))
        assert confirmed.document["status"] == "confirmed"
        pending = await paid.place(OrderRequest.keyed(("SKU-0001", 1)))
        assert (await paid.place(confirmed.request)).body == confirmed.body
        assert (await plain.place(pending.request)).body == pending.body
        # A confirmed order of before has nothing to do with payments, when it is cancelled too.
        await paid.cancel(confirmed.order_id)
    assert payments.entry(confirmed.order_id).asked == 0


async def test_without_payments_nothing_is_owed_and_nothing_exported(
    database_url: str, service: ServiceProcess
) -> None:
    """Orders are confirmed at once, their rows owe nothing, and there are no metrics of payments."""
    async with OrderClient(service.url) as client:
        placed = await client.place(OrderRequest.keyed(("SKU-0001", 1)))
        assert placed.document["status"] == "confirmed"
    assert execute(database_url, "SELECT status, payment_due FROM orders") == [("confirmed", None)]
    assert not [name for name, _ in service.metrics() if name.startswith(("payment", "fault_injection"))]


async def test_a_declined_order_gives_its_stock_back_once(
    database_url: str, payments: PaymentsProcess, start_service: StartService
) -> None:
    """Half of the orders are declined, several of one product together: the stock is as if they had never been."""
    payments.behave(decline_rate=0.5)
    service = start_service(PAYMENTS_URL=payments.url)
    ledger = Ledger(database_url)
    async with OrderClient(service.url) as client:
        requests = [
            OrderRequest.keyed((PRODUCTS[n % 10], 1 + n % 3), (PRODUCTS[(n + 3) % 10], 2)) for n in range(200)
        ]
        await asyncio.gather(*(client.place(request) for request in requests))
        await until_settled(database_url)
        declined = [order for order in ledger.orders() if order.status == "declined"]
        assert 50 < len(declined) < 150
        refused = await client.cancel(declined[0].id)  # or its stock would come back twice
        assert (refused.status, refused.json()["error_type"]) == (409, "invalid_state")
    ledger.assert_clean(client.history)
    assert audit(ledger.orders(), payments.book()) == []
    assert service.metric("payments_total", outcome="declined") == len(declined)


async def test_a_result_is_booked_once(database_url: str, start_service: StartService) -> None:
    """A booking that comes again, or after another, changes nothing: stock comes back once."""
    start_service().kill()  # the schema
    ledger = Ledger(database_url)
    execute(
        database_url,
        "INSERT INTO orders SELECT 'anonymous', gen_random_uuid(), 'c', 'pending', 'EUR', 1, "
        """'[["SKU-0001", 3, 1]]', now(), NULL, 'h', now() FROM generate_series(1, 2)""",
    )
    book = (
        "SELECT book_payments_v1((SELECT jsonb_agg(jsonb_build_array(principal, id, '{}', 0)) FROM orders))"
    )
    for verdict in ("declined", "declined", "authorised", "later"):
        execute(database_url, book.format(verdict))
        assert {order.status for order in ledger.orders()} == {"declined"}
        assert due(database_url) == 0
        assert ledger.stock()["SKU-0001"] == 1_000_000_006


async def test_a_confirmed_order_that_is_cancelled_is_voided(
    database_url: str, payments: PaymentsProcess, start_service: StartService
) -> None:
    """Its charge is undone; its stock is back."""
    service = start_service(PAYMENTS_URL=payments.url)
    ledger = Ledger(database_url)
    async with OrderClient(service.url) as client:
        placed = await client.place(OrderRequest.keyed(("SKU-0001", 2)))
        await until_status(client, placed.order_id, "confirmed")
        assert payments.entry(placed.order_id).charges == 1
        assert (await client.cancel(placed.order_id)).json()["status"] == "cancelled"
        await until_settled(database_url)
    assert payments.entry(placed.order_id).status == "voided"
    assert audit(ledger.orders(), payments.book()) == []
    ledger.assert_clean(client.history)


async def test_cancelling_races_with_the_authorisation(
    database_url: str, payments: PaymentsProcess, start_service: StartService
) -> None:
    """Orders are cancelled before, while and after payments is asked: each cancelled one ends uncharged."""
    payments.behave(latency_ms=60, latency_spread=0.8, lost_answer_rate=0.1)
    service = start_service(PAYMENTS_URL=payments.url, PAYMENTS_DEADLINE_SECONDS=1)
    ledger = Ledger(database_url)

    async def place_and_cancel(n: int) -> None:
        placed = await client.place(OrderRequest.keyed((PRODUCTS[n % 10], 1)))
        await asyncio.sleep(n % 20 * 0.02)
        if n % 4:
            assert (await client.cancel(placed.order_id)).status == 200

    async with OrderClient(service.url) as client:
        await asyncio.gather(*(place_and_cancel(n) for n in range(200)))
        await until_settled(database_url)
    orders, book = ledger.orders(), payments.book()
    assert audit(orders, book) == []
    ledger.assert_clean(client.history)
    cancelled = {order.id for order in orders if order.status == "cancelled"}
    # The race took place, both ways.
    assert any(entry.authorised for order_id, entry in book.items() if order_id in cancelled)
    assert any(not entry.authorised for order_id, entry in book.items() if order_id in cancelled)


async def test_an_authorisation_that_arrives_after_the_void_charges_nobody(
    database_url: str, payments: PaymentsProcess, start_service: StartService
) -> None:
    """A replica stands still past its lease; its order is voided meanwhile, and what it had sent comes after that."""
    payments.behave(latency_ms=10_000, latency_spread=0)  # it is carried out after half of that
    settings = {"PAYMENTS_URL": payments.url, "PAYMENTS_DEADLINE_SECONDS": 1, "PAYMENTS_TIMEOUT_SECONDS": 1}
    desk = start_service()
    voider = start_service(**settings)
    voider.process.send_signal(signal.SIGSTOP)
    sender = start_service(**settings)
    ledger = Ledger(database_url)
    try:
        async with OrderClient(sender.url) as client, OrderClient(desk.url) as other:
            placed = await client.place(OrderRequest.keyed(("SKU-0001", 1)))
            async with asyncio.timeout(10):
                while not payments.attempts():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            carried_out_at = time.monotonic() + 5
            sender.process.send_signal(signal.SIGSTOP)
            assert (await other.cancel(placed.order_id)).status == 200
            payments.behave(latency_ms=1)
            voider.process.send_signal(signal.SIGCONT)
            await until_settled(database_url)
            assert time.monotonic() < carried_out_at
            assert payments.entry(placed.order_id).status == "voided"
            await asyncio.sleep(carried_out_at + 0.5 - time.monotonic())
    finally:
        sender.process.send_signal(signal.SIGCONT)
    entry = payments.entry(placed.order_id)
    assert (entry.charges, entry.authorised, entry.asked) == (0, 0, 2)
    assert audit(ledger.orders(), payments.book()) == []


async def test_the_auditor_finds_what_is_wrong(
    database_url: str, payments: PaymentsProcess, start_service: StartService
) -> None:
    """An order charged twice, a cancelled one charged, a pending one never settled, a charge without an order."""
    service = start_service(PAYMENTS_URL=payments.url)
    ledger = Ledger(database_url)
    async with OrderClient(service.url) as client:
        placed = [await client.place(OrderRequest.keyed(("SKU-0001", 1))) for _ in range(4)]
        await until_settled(database_url)
        assert audit(ledger.orders(), payments.book()) == []
        twice, cancelled, pending, _ = (attempt.order_id for attempt in placed)
        async with OrderClient(payments.url) as bank:
            document = {"amount_cents": 1, "currency": "EUR"}
            for order_id in (twice, "no-such-order"):
                await bank.send(
                    "POST",
                    "/authorisations",
                    {"order_id": order_id, **document},
                    headers={"Idempotency-Key": "x" + order_id},
                )
    execute(database_url, "UPDATE orders SET status = 'cancelled' WHERE id = %(id)s", {"id": cancelled})
    execute(database_url, "UPDATE orders SET status = 'pending' WHERE id = %(id)s", {"id": pending})
    found = audit(ledger.orders(), payments.book())
    for order_id in (twice, cancelled, pending, "no-such-order"):
        assert any(order_id in sentence for sentence in found), order_id


async def test_the_simulator_forgets_nothing(payments: PaymentsProcess) -> None:
    """kill -9 between the answers: what was authorised or voided before stands after the restart."""
    async with OrderClient(payments.url) as bank:
        document = {"amount_cents": 7, "currency": "EUR"}
        for order_id in ("a", "b"):
            headers = {"Idempotency-Key": order_id}
            answer = await bank.send(
                "POST", "/authorisations", {"order_id": order_id, **document}, headers=headers
            )
            assert answer.json()["status"] == "authorised"
        assert (await bank.send("POST", "/voids", {"order_id": "b"})).json()["status"] == "voided"
    payments.kill()
    payments.start()
    assert {order_id: entry.charged_cents for order_id, entry in payments.book().items()} == {"a": 7, "b": 0}
    started_at = time.monotonic()
    async with OrderClient(payments.url) as bank:
        answer = await bank.send("POST", "/authorisations", {"order_id": "b", **document}, headers=headers)
        assert answer.json()["status"] == "voided"
        bad = await bank.send("PATCH", "/behaviour", {"error_rate": 2})
        assert bad.status == 422
    assert time.monotonic() - started_at < 5
