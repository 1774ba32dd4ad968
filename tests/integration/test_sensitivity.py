"""The slower service that a sensitivity test compares with."""

import sys
import time
from pathlib import Path

import httpx
import pytest

from loadtests.machine import processes

ORDER = {"customer_id": "c-1", "items": [{"product_id": "SKU-0001", "quantity": 1}]}
SLOWER_BY_SECONDS = 0.2


def test_each_order_costs_more(tmp_path: Path, database_url: str) -> None:
    """An order is stored and costs so much more CPU, and nothing else does."""
    slower = (sys.executable, "-m", "loadtests.comparing.slower_service")
    settings = {"SLOWER_BY_US": str(SLOWER_BY_SECONDS * 1e6)}
    with (
        processes.service(database_url, tmp_path, command=slower, settings=settings) as service,
        httpx.Client(base_url=service.url) as client,
    ):
        before = cpu_seconds(client)
        assert client.post("/orders", json=ORDER).status_code == 201
        # The kernel counts in hundredths.
        assert cpu_seconds(client) - before >= SLOWER_BY_SECONDS - 0.02
        start = time.perf_counter()
        assert client.get("/products/SKU-0001").status_code == 200
        assert time.perf_counter() - start < SLOWER_BY_SECONDS


def cpu_seconds(client: httpx.Client) -> float:
    """The service's own figure."""
    for line in client.get("/metrics").text.splitlines():
        if line.startswith("process_cpu_seconds_total "):
            return float(line.split()[1])
    pytest.fail("the service tells no CPU time")
