"""What the service does at its limits: it refuses early, says what became of the order, and comes back."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx

from tests.support import locks
from tests.support.order_api import execute
from tests.support.service_process import ServiceProcess

StartService = Callable[..., ServiceProcess]

# Far above what is waited for in any test here: what ends sooner was refused, not timed out.
PATIENT = {"DB_STATEMENT_TIMEOUT_SECONDS": 40, "REQUEST_DEADLINE_SECONDS": 40, "BATCH_MAX_WAIT_SECONDS": 40}
SOON_SECONDS = 10

SLOW_INSERTS = """
    CREATE FUNCTION sleep() RETURNS trigger LANGUAGE plpgsql
        AS 'BEGIN PERFORM pg_sleep(30); RETURN NEW; END';
    CREATE TRIGGER slow BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION sleep()
"""


def order(customer_id: str = "c-1", product_id: str = "SKU-0001", quantity: int = 1) -> dict[str, Any]:
    return {"customer_id": customer_id, "items": [{"product_id": product_id, "quantity": quantity}]}


def stored_customers(dsn: str) -> list[str]:
    return [row[0] for row in execute(dsn, "SELECT customer_id FROM orders ORDER BY customer_id")]


@contextlib.asynccontextmanager
async def client_of(service: ServiceProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=service.url, timeout=60, limits=httpx.Limits(max_connections=200)
    ) as client:
        yield client


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110  # it is another process that changes
            await asyncio.sleep(0.02)


async def metric_of(client: httpx.AsyncClient, sample: str) -> float:
    """One sample of `/metrics`, named as it is written there."""
    for line in (await client.get("/metrics")).text.splitlines():
        if line.startswith(f"{sample} "):
            return float(line.rpartition(" ")[2])
    return 0.0


async def until_metric(client: httpx.AsyncClient, sample: str, value: float) -> None:
    async def reached() -> bool:
        return await metric_of(client, sample) == value

    await until(reached)


def assert_overloaded(answer: httpx.Response) -> None:
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) >= 1
    problem = answer.json()
    assert (problem["error_type"], problem["outcome"]) == ("overloaded", "not_executed")


# Admission, queue, pool


async def test_full_service_refuses_at_once_and_finishes_what_it_took(
    start_service: StartService, database_url: str
) -> None:
    """Past MAX_IN_FLIGHT orders are refused at once, each is counted, and those before them are stored."""
    service = start_service(**PATIENT, MAX_IN_FLIGHT=100)
    async with client_of(service) as client:
        with locks.holding_commits(database_url):
            held = {"orders": [order(f"held-{n:02}") for n in range(95)]}
            batched = asyncio.create_task(client.post("/orders/batch", json=held))
            taken = [asyncio.create_task(client.post("/orders", json=order(f"taken-{n}"))) for n in range(4)]
            await until_metric(client, "requests_in_flight", 99)

            async with asyncio.timeout(SOON_SECONDS):
                batch = await client.post(
                    "/orders/batch", json={"orders": [order(f"b-{n}") for n in range(3)]}
                )
            assert_overloaded(batch)
            assert await metric_of(client, 'requests_shed_total{reason="admission"}') == 3

            taken.append(asyncio.create_task(client.post("/orders", json=order("taken-4"))))
            await until_metric(client, "requests_in_flight", 100)
            async with asyncio.timeout(SOON_SECONDS):
                refused = [await client.post("/orders", json=order(f"refused-{n}")) for n in range(3)]
                read = await client.get("/products/SKU-0001")
                alive = await client.get("/livez")
            for answer in (*refused, read):
                assert_overloaded(answer)
            assert alive.status_code == 200
            assert (
                await metric_of(client, "requests_in_flight") == 100
            )  # a refusal takes no place, and gives none back
        assert [(await answer).status_code for answer in taken] == [201] * 5
        assert [result["status"] for result in (await batched).json()["results"]] == [201] * 95
        assert (await client.post("/orders", json=order("taken-5"))).status_code == 201
        assert await metric_of(client, 'orders_total{error_type="overloaded",status="error"}') == 6
        # Refused before it was taken into processing: not observed.
        assert await metric_of(client, "order_processing_seconds_count") == 101
    stored = [f"held-{n:02}" for n in range(95)] + [f"taken-{n}" for n in range(6)]
    assert stored_customers(database_url) == stored


async def test_order_that_waited_too_long_is_refused_and_never_stored(
    start_service: StartService, database_url: str
) -> None:
    """An order whose batch cannot start within BATCH_MAX_WAIT_SECONDS is refused, and stays out of the database."""
    service = start_service(**PATIENT | {"BATCH_MAX_WAIT_SECONDS": 0.3})
    async with client_of(service) as client:
        with locks.holding_commits(database_url):
            first = asyncio.create_task(client.post("/orders", json=order("first")))
            await locks.until_waiting(database_url)
            async with asyncio.timeout(SOON_SECONDS):
                waited = await asyncio.gather(
                    *(client.post("/orders", json=order(f"waited-{n}")) for n in range(5)),
                    client.post("/orders/batch", json={"orders": [order("waited-5"), order("waited-6")]}),
                )
            *single, batch = waited
            for answer in single:
                assert_overloaded(answer)
            assert batch.status_code == 200
            for result in batch.json()["results"]:
                assert (result["status"], result["error"]["error_type"]) == (503, "overloaded")
                assert result["error"]["outcome"] == "not_executed"
            assert not first.done()
            assert await metric_of(client, "order_batch_queue_depth") == 0
        assert (await first).status_code == 201
        assert await metric_of(client, 'requests_shed_total{reason="queue"}') == 7
        assert (await client.post("/orders", json=order("later"))).status_code == 201
    assert stored_customers(database_url) == ["first", "later"]


async def test_exhausted_pool_refuses_and_recovers(start_service: StartService, database_url: str) -> None:
    """With every connection in use reads and orders are refused as overloaded, until one comes back."""
    service = start_service(
        **PATIENT, DB_POOL_MIN_SIZE=2, DB_POOL_MAX_SIZE=2, DB_ACQUIRE_TIMEOUT_SECONDS=0.3, BREAKER_FAIL_MAX=1
    )
    async with client_of(service) as client:
        stored = (await client.post("/orders", json=order("first"))).headers["location"]
        with locks.holding(database_url, locks.ORDERS):
            held = []
            for connections in (1, 2):
                held.append(asyncio.create_task(client.get(stored)))
                await locks.until_waiting(database_url, connections)
            async with asyncio.timeout(SOON_SECONDS):
                refused = await asyncio.gather(
                    *(client.get("/orders") for _ in range(5)),
                    client.post(f"{stored}/cancel"),
                    client.post("/orders", json=order("refused")),
                )
            for answer in refused:
                assert_overloaded(answer)
            assert await metric_of(client, "db_pool_in_use") == await metric_of(client, "db_pool_max") == 2
            assert (
                await metric_of(client, 'requests_shed_total{reason="pool"}') == 1
            )  # it counts orders, not reads
        assert [(await answer).status_code for answer in held] == [200, 200]
        assert (await client.get(stored)).status_code == 200
        assert (await client.post("/orders", json=order("later"))).status_code == 201
        assert await metric_of(client, "db_pool_in_use") == 0
        assert await metric_of(client, 'circuit_breaker_transitions_total{breaker="postgres",to="open"}') == 0
    assert stored_customers(database_url) == ["first", "later"]


async def test_faults_reads_wait_for_their_turn_within_bounds(
    start_service: StartService, database_url: str
) -> None:
    """Orders that are read share round trips; one that cannot begin in time is refused as overloaded."""
    service = start_service(DB_STATEMENT_TIMEOUT_SECONDS=4, BATCH_MAX_WAIT_SECONDS=0.3)
    async with client_of(service) as client:
        stored = (await client.post("/orders", json=order("first"))).headers["location"]
        with locks.holding(database_url, locks.ORDERS):
            held = []
            for connections in (1, 2):
                held.append(asyncio.create_task(client.get(stored)))
                await locks.until_waiting(database_url, connections)
            async with asyncio.timeout(SOON_SECONDS):
                refused = await asyncio.gather(*(client.get(stored) for _ in range(20)))
        for answer in refused:
            assert_overloaded(answer)
        assert [(await answer).status_code for answer in held] == [200, 200]
        answers = await asyncio.gather(
            *(client.get(stored) for _ in range(20)), client.get("/orders/" + stored[8:-4] + "0000")
        )
    assert [answer.status_code for answer in answers] == [200] * 20 + [404]


# Timeouts


async def test_statement_over_its_time_is_a_timeout(start_service: StartService, database_url: str) -> None:
    """An order whose statement the server gives up is answered 504 and not stored; some in a row open the breaker."""
    service = start_service(DB_STATEMENT_TIMEOUT_SECONDS=0.5, BREAKER_FAIL_MAX=3)
    execute(database_url, SLOW_INSERTS)
    async with client_of(service) as client:
        for n in range(3):
            answer = await client.post("/orders", json=order(f"slow-{n}"))
            assert answer.status_code == 504
            problem = answer.json()
            assert (problem["error_type"], problem["outcome"]) == ("timeout", "not_executed")
        answer = await client.post("/orders", json=order("refused"))
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert (answer.json()["error_type"], answer.json()["outcome"]) == ("circuit_open", "not_executed")
        assert (await client.get("/readyz")).json() == {"status": "degraded"}
        assert await metric_of(client, 'orders_total{error_type="timeout",status="error"}') == 3
        assert await metric_of(client, 'orders_total{error_type="circuit_open",status="error"}') == 1

        execute(database_url, "DROP TRIGGER slow ON orders")

        async def stored() -> bool:
            return (await client.post("/orders", json=order("later"))).status_code == 201

        await until(stored, seconds=10)
        assert (await client.get("/readyz")).json() == {"status": "ok"}
    assert stored_customers(database_url) == ["later"]


async def test_faults_order_that_cannot_get_its_lock_is_not_stored(
    start_service: StartService, database_url: str
) -> None:
    """A product held for too long refuses its order, and says nothing of the database's health."""
    service = start_service(BREAKER_FAIL_MAX=1)
    async with client_of(service) as client:
        with locks.holding(database_url, "SELECT FROM products FOR UPDATE"):
            answer = await client.post("/orders", json=order("locked out"))
        assert answer.status_code == 503
        assert (answer.json()["error_type"], answer.json()["outcome"]) == ("database", "not_executed")
        assert await metric_of(client, 'circuit_breaker_transitions_total{breaker="postgres",to="open"}') == 0
        assert (await client.post("/orders", json=order("later"))).status_code == 201
    assert stored_customers(database_url) == ["later"]


# What is no failure of the database


async def test_clients_that_go_away_open_no_breaker(start_service: StartService, database_url: str) -> None:
    """Clients that hang up while their orders are stored or read open no breaker, and take no place with them."""
    service = start_service(**PATIENT, BREAKER_FAIL_MAX=1)
    async with client_of(service) as client:
        stored = (await client.post("/orders", json=order("first"))).headers["location"]
        with locks.holding(database_url, locks.ORDERS):
            async with client_of(service) as impatient:
                requests = [
                    *(
                        asyncio.create_task(impatient.post("/orders", json=order(f"gone-{n}")))
                        for n in range(10)
                    ),
                    *(asyncio.create_task(impatient.get(stored)) for _ in range(10)),
                ]
                await until_metric(client, "requests_in_flight", 20)
                for request in requests:
                    request.cancel()
                await asyncio.gather(*requests, return_exceptions=True)
        await until_metric(client, "requests_in_flight", 0)
        assert await metric_of(client, 'circuit_breaker_transitions_total{breaker="postgres",to="open"}') == 0
        assert await metric_of(client, "db_pool_in_use") == 0
        assert (await client.post("/orders", json=order("later"))).status_code == 201
    # A caller that goes away cancels nothing: what was queued is stored.
    assert stored_customers(database_url) == ["first", *(f"gone-{n}" for n in range(10)), "later"]


async def test_refusals_open_no_breaker(start_service: StartService, database_url: str) -> None:
    """Whatever a client asks wrongly, and whatever a constraint refuses, the breaker counts none of it."""
    service = start_service(BREAKER_FAIL_MAX=1, CATALOG_STOCK=5)
    execute(
        database_url, "ALTER TABLE orders ADD CONSTRAINT no_such_customer CHECK (customer_id <> 'refused')"
    )
    async with client_of(service) as client:
        stored = await client.post("/orders", json=order("first"), headers={"Idempotency-Key": "k"})
        answers = [
            await client.post("/orders", content=b"{", headers={"Content-Type": "application/json"}),
            await client.post("/orders", json=order("c", quantity=0)),
            await client.post("/orders", json=order("c", product_id="nothing")),
            await client.post("/orders", json=order("c", quantity=6)),
            await client.post("/orders", json=order("c"), headers={"Idempotency-Key": "k"}),
            await client.post(
                "/orders", content=b"x" * 1_000_000, headers={"Content-Type": "application/json"}
            ),
            await client.get("/orders/00000000-0000-0000-0000-000000000000"),
            await client.post("/orders/00000000-0000-0000-0000-000000000000/cancel"),
            await client.get("/products/nothing"),
            await client.post("/orders", json=order("refused")),
        ]
        assert [answer.status_code for answer in answers] == [
            400,
            422,
            422,
            409,
            422,
            413,
            404,
            404,
            404,
            500,
        ]
        batch = await client.post(
            "/orders/batch", json={"orders": [order("a"), order("refused"), order("b")]}
        )
        assert [result["status"] for result in batch.json()["results"]] == [201, 500, 201]
        assert batch.json()["results"][1]["error"]["outcome"] == "not_executed"
        assert await metric_of(client, 'circuit_breaker_transitions_total{breaker="postgres",to="open"}') == 0
        assert (await client.get(stored.headers["location"])).status_code == 200
        assert (await client.get("/readyz")).json() == {"status": "ok"}
    assert stored_customers(database_url) == ["a", "b", "first"]
    assert execute(database_url, "SELECT stock FROM products WHERE id = 'SKU-0001'") == [(2,)]
