"""The order path on both ends of the supported PostgreSQL versions."""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.embedded_postgres import EmbeddedPostgres
from tests.support.order_api import execute
from tests.support.service_process import ServiceProcess

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture
def postgres_15(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    if not DEBIAN_15.exists():
        pytest.skip("PostgreSQL 15 is not installed here (Debian: postgresql-15)")
    with EmbeddedPostgres(tmp_path / "postgres", bin_dir=DEBIAN_15) as server:
        yield server


def order(customer_id: str, *lines: tuple[str, int]) -> dict[str, Any]:
    return {
        "customer_id": customer_id,
        "items": [{"product_id": product_id, "quantity": quantity} for product_id, quantity in lines],
    }


async def test_order_path_on_the_newest(
    database_url: str, start_service: Callable[..., ServiceProcess]
) -> None:
    """The order path holds on the PostgreSQL of the wheel, version 18."""
    if "TEST_POSTGRES_BIN_DIR" not in os.environ:
        assert server_major(database_url) == 18
    await check_order_path(database_url, start_service(dsn=database_url, CATALOG_STOCK=100))


@pytest.mark.slow
async def test_order_path_on_the_oldest(
    postgres_15: EmbeddedPostgres, start_service: Callable[..., ServiceProcess]
) -> None:
    """The order path holds on PostgreSQL 15."""
    assert server_major(postgres_15.dsn) == 15
    await check_order_path(postgres_15.dsn, start_service(dsn=postgres_15.dsn, CATALOG_STOCK=100))


def server_major(dsn: str) -> int:
    return int(execute(dsn, "SHOW server_version_num")[0][0]) // 10000


async def check_order_path(dsn: str, service: ServiceProcess) -> None:
    """Orders are stored once, priced, replayed, refused, listed and cancelled, and stock is conserved."""
    async with httpx.AsyncClient(base_url=service.url, timeout=30) as client:
        price = (await client.get("/products/SKU-0001")).json()["price_cents"]
        one = order("c-1", ("SKU-0002", 1), ("SKU-0001", 2))

        # The same key twenty times at once: one execution, one answer.
        together = await asyncio.gather(
            *(client.post("/orders", json=one, headers={"Idempotency-Key": "k-1"}) for _ in range(20))
        )
        assert {answer.status_code for answer in together} == {201}
        assert len({answer.content for answer in together}) == 1
        assert sum("idempotency-replayed" not in answer.headers for answer in together) == 1
        first = together[0].json()
        assert first["items"][1] == {"product_id": "SKU-0001", "quantity": 2, "unit_price_cents": price}

        other = await client.post(
            "/orders", json=order("c-1", ("SKU-0001", 3)), headers={"Idempotency-Key": "k-1"}
        )
        assert (other.status_code, other.json()["error_type"]) == (422, "idempotency_mismatch")

        # A bad item fails alone; what is served is served in order of arrival.
        batch = await client.post(
            "/orders/batch",
            json={
                "orders": [
                    order("c-2", ("SKU-0003", 60)),
                    order("c-2", ("SKU-0003", 101)),
                    order("c-2", ("nothing", 1)),
                    order("c-2", ("SKU-0003", 41)),
                    order("c-2", ("SKU-0003", 40)),
                    {**one, "idempotency_key": "k-1"},
                ]
            },
        )
        results = batch.json()["results"]
        assert [result["status"] for result in results] == [201, 409, 422, 409, 201, 201]
        assert results[5]["replayed"]
        assert results[5]["order"] == first

        assert (await client.get(f"/orders/{first['id']}")).json() == first
        page = (await client.get("/orders", params={"customer_id": "c-2", "limit": 1})).json()
        rest = (
            await client.get("/orders", params={"customer_id": "c-2", "cursor": page["next_cursor"]})
        ).json()
        newest_first = sorted((results[n]["order"]["id"] for n in (0, 4)), reverse=True)
        assert [item["id"] for item in page["items"] + rest["items"]] == newest_first

        for _ in range(2):  # repeatable
            cancelled = await client.post(f"/orders/{first['id']}/cancel")
            assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
        listed = (await client.get("/orders", params={"status": "cancelled"})).json()
        assert [item["id"] for item in listed["items"]] == [first["id"]]

        # Every connection is cut at once; the next orders are stored all the same.
        execute(
            dsn,
            """
            SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name = 'order-service'
            """,
        )
        answers = await asyncio.gather(
            *(client.post("/orders", json=order(f"c-{n}", ("SKU-0004", 1))) for n in range(3, 13))
        )
        assert {answer.status_code for answer in answers} == {201}
        assert [dict(labels)["postgres"] for name, labels in service.metrics() if name == "build_info"] == [
            execute(dsn, "SELECT split_part(version(), ' ', 2)")[0][0]
        ]
    stock = execute(dsn, "SELECT id, stock FROM products WHERE stock <> 100 ORDER BY id")
    assert stock == [("SKU-0003", 0), ("SKU-0004", 90)]
    assert execute(dsn, "SELECT count(*) FROM orders") == [(13,)]
    assert service.terminate() == 0
