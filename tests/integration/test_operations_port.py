"""OPS_PORT: probes and metrics on a port of their own, there until the service's last step."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import pytest

from app.embedded_postgres import EmbeddedPostgres
from tests.support import locks
from tests.support.ledger import Ledger
from tests.support.order_api import new_order
from tests.support.order_client import OrderClient, OrderRequest
from tests.support.service_process import ServiceProcess
from tests.support.traffic import Traffic, acknowledged

StartService = Callable[..., ServiceProcess]
OPERATIONS = ("/livez", "/readyz", "/metrics")


def test_each_port_answers_its_own_routes(start_service: StartService) -> None:
    """Probes and metrics are 404 on the API's port, and all else is on the other; both ports are told at the start."""
    service = start_service(OPS_PORT=0)
    assert service.operations_url != service.url
    assert urlsplit(service.operations_url).hostname == urlsplit(service.url).hostname
    with service.client() as api, httpx.Client(base_url=service.operations_url) as operations:
        for path in OPERATIONS:
            refused = api.get(path)
            assert (refused.status_code, refused.json()["error_type"]) == (404, "not_found")
            assert operations.get(path).status_code == operations.head(path).status_code == 200
        for path in ("/products/SKU-0001", "/openapi.json", "/docs"):
            assert api.get(path).status_code == 200
            assert operations.get(path).status_code == 404
        assert api.post("/orders", json=new_order(("SKU-0001", 1))).status_code == 201
        assert operations.post("/orders", json=new_order(("SKU-0001", 1))).status_code == 404
        assert not set(OPERATIONS) & set(api.get("/openapi.json").json()["paths"])
    assert service.metric("orders_total", status="success", error_type="") == 1
    assert service.metric("http_requests_total", method="GET", route="/livez", status="200") == 1
    assert service.terminate() == 0


def test_one_port_serves_all(service: ServiceProcess) -> None:
    """Where OPS_PORT is unset nothing else listens, and the document has every route."""
    assert "operations" not in service.stderr_path.read_text()
    with service.client() as api:
        assert {api.get(path).status_code for path in OPERATIONS} == {200}
        assert set(OPERATIONS) <= set(api.get("/openapi.json").json()["paths"])


async def test_it_answers_while_customers_are_served_to_the_end(
    own_postgres: EmbeddedPostgres, start_service: StartService
) -> None:
    """SIGTERM under load: unready at once on the operations port, and no order is lost on the other."""
    service = start_service(dsn=own_postgres.dsn, DRAIN_DELAY_SECONDS=1, OPS_PORT=0)
    ledger = Ledger(own_postgres.dsn)
    probing = Traffic(service.operations_url, orders_per_second=0, reads_per_second=0, probes_per_second=50)
    async with Traffic(service.url, orders_per_second=100, probes_per_second=0) as traffic, probing:
        await traffic.until(lambda: len(acknowledged(traffic.orders)) >= 50, 30)
        signalled_at = time.monotonic()
        service.process.terminate()
        await traffic.until(lambda: service.process.poll() is not None, 30)
    assert service.process.returncode == 0
    assert {(order.status, order.error_type) for order in traffic.orders} <= {
        (201, ""),
        (0, "unreachable"),
    }
    ledger.assert_clean(traffic.orders)
    late = [probe for probe in probing.probes if probe.started_at > signalled_at + 0.2 and probe.answer]
    assert {(probe.path, probe.answer.status) for probe in late if probe.answer} == {
        ("/livez", 200),
        ("/readyz", 503),
    }
    assert {probe.answer.headers["connection"] for probe in late if probe.answer} == {"close"}


async def test_it_outlives_the_port_of_the_api(
    own_postgres: EmbeddedPostgres, start_service: StartService
) -> None:
    """While accepted orders are stored behind a closed port, probes and metrics are answered; then both are gone."""
    service = start_service(
        dsn=own_postgres.dsn,
        OPS_PORT=0,
        **dict.fromkeys(
            ("BATCH_MAX_WAIT_SECONDS", "DB_STATEMENT_TIMEOUT_SECONDS", "REQUEST_DEADLINE_SECONDS"), 30
        ),
    )
    address = urlsplit(service.url)
    async with OrderClient(service.url) as client, httpx.AsyncClient(base_url=service.operations_url) as ops:
        with locks.holding_commits(own_postgres.dsn):
            waiting = asyncio.create_task(client.place(OrderRequest.keyed(("SKU-0001", 1))))
            while service.metric("requests_in_flight") < 1:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            service.process.terminate()
            with contextlib.suppress(ConnectionRefusedError):
                while True:
                    _, writer = await asyncio.open_connection(address.hostname, address.port)
                    writer.close()
                    await asyncio.sleep(0.02)
            statuses = {path: (await ops.get(path)).status_code for path in OPERATIONS}
            assert service.process.poll() is None
        assert (await waiting).status == 201
    assert statuses == {"/livez": 200, "/readyz": 503, "/metrics": 200}
    assert await asyncio.to_thread(service.process.wait, 30) == 0
    async with httpx.AsyncClient(base_url=service.operations_url) as ops:
        with pytest.raises(httpx.ConnectError):
            await ops.get("/livez")
