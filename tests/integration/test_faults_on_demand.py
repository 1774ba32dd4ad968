"""Faults on demand: who may ask, what each does and to whom, that it ends, and nothing without a token."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.fault_routes import OngoingFault, OngoingFaults
from app.faults import FaultyRequests
from app.main import create_app
from app.settings import Settings
from tests.support.order_api import Shop, check_refusal, new_order, open_shop
from tests.support.order_client import OrderClient, OrderRequest
from tests.support.payments_process import PaymentsProcess
from tests.support.service_process import ServiceProcess

TOKEN = "let-it-break"  # noqa: S105
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def timeline_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("timeline") / "faults.jsonl"


@pytest.fixture(scope="module")
def shop(postgres: Any, tmp_path_factory: pytest.TempPathFactory, timeline_path: Path) -> Iterator[Shop]:
    directory = tmp_path_factory.mktemp("faulty")
    with open_shop(postgres, directory, FAULTS_TOKEN=TOKEN, FAULTS_TIMELINE=timeline_path) as running:
        yield running


@pytest.fixture(autouse=True)
def _end_all(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "shop" in request.fixturenames:
        shop: Shop = request.getfixturevalue("shop")
        for fault in faults(shop):
            shop.http.delete(f"/faults/{fault['id']}", headers=HEADERS)


def begin(shop: Shop, **fault: object) -> dict[str, Any]:
    response = shop.http.post("/faults", json=fault, headers=HEADERS)
    assert response.status_code == 201, response.text
    document: dict[str, Any] = response.json()
    return document


def faults(shop: Shop) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = shop.http.get("/faults", headers=HEADERS).json()["items"]
    return items


def timeline(path: Path, fault_id: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["id"] == fault_id]


def active(shop: Shop, kind: str) -> float:
    return shop.service.metric("fault_injection_active", fault=kind)


def hits(shop: Shop, kind: str) -> float:
    return shop.service.metric("fault_injection_hits_total", fault=kind)


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.05)


def test_without_a_token_there_is_nothing(service: ServiceProcess) -> None:
    """No route, nothing in the documentation, no metric, and no middleware."""
    with service.client() as http:
        for method, path in (("POST", "/faults"), ("GET", "/faults"), ("DELETE", "/faults/f-1")):
            check_refusal(http.request(method, path, headers=HEADERS), 404, "not_found")
        assert "/faults" not in http.get("/openapi.json").text
        assert "fault_injection" not in http.get("/metrics").text
    app: Any = create_app(Settings.load())
    # Free while it is off: what observes a request calls what answers it, as ever.
    assert app._observed._app == app._dispatch
    with_faults: Any = create_app(Settings.load(faults_token=TOKEN))
    assert isinstance(with_faults._observed._app, FaultyRequests)


def test_the_documentation_is_exact(shop: Shop) -> None:
    """The routes and the way to be let in are documented, and what is answered is of the documented form."""
    document = shop.http.get("/openapi.json").json()
    assert {"/faults", "/faults/{fault_id}"} <= set(document["paths"])
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    named = {name for each in operations for scheme in each.get("security", ()) for name in scheme}
    assert "FaultsToken" in named
    assert named <= set(document["components"]["securitySchemes"])
    OngoingFault.model_validate(begin(shop, kind="latency", latency_ms=1))
    OngoingFaults.model_validate({"items": faults(shop)})


def test_whoever_has_no_token_is_refused_first(shop: Shop) -> None:
    """401 whatever else is wrong."""
    for headers in ({}, {"Authorization": "Bearer wrong-token"}, {"Authorization": f"Basic {TOKEN}"}):
        check_refusal(shop.http.post("/faults", content=b"{", headers=headers), 401, "unauthorized")
        check_refusal(shop.http.get("/faults", headers=headers), 401, "unauthorized")
        check_refusal(shop.http.delete("/faults/f-1", headers=headers), 401, "unauthorized")


@pytest.mark.parametrize(
    "fault",
    [
        {},
        {"kind": "earthquake"},
        {"kind": "latency", "latency_ms": 60_000},
        {"kind": "latency", "ttl_seconds": 601},
        {"kind": "latency", "share": 0},
        {"kind": "latency", "share": 1.5},
        {"kind": "latency", "route": "/metrics"},
        {"kind": "latency", "route": "/faults"},
        {"kind": "latency", "route": "/nowhere"},
        {"kind": "latency", "megabytes": 1},
        {"kind": "error", "status": 201},
        {"kind": "eat_memory", "megabytes": 100_000},
        {"kind": "burn_cpu", "cpu_share": 2},
        {"kind": "block_loop", "block_ms": 10_000},
        {"kind": "hold_connections", "connections": 0},
        {"kind": "abort", "seed": -1},
    ],
    ids=str,
)
def test_what_is_not_a_bounded_fault_is_refused(shop: Shop, fault: dict[str, object]) -> None:
    """422, and nothing begins."""
    check_refusal(shop.http.post("/faults", json=fault, headers=HEADERS), 422, "validation")
    assert faults(shop) == []


def test_there_are_never_many(shop: Shop) -> None:
    """At most 20 at once, and one of each kind that hits the whole process."""
    begin(shop, kind="eat_memory", megabytes=1)
    again = shop.http.post("/faults", json={"kind": "eat_memory", "megabytes": 1}, headers=HEADERS)
    check_refusal(again, 409, "invalid_state")
    for _ in range(19):
        begin(shop, kind="latency", latency_ms=1)
    check_refusal(shop.http.post("/faults", json={"kind": "abort"}, headers=HEADERS), 409, "invalid_state")
    assert active(shop, "latency") == 19


def test_latency(shop: Shop, timeline_path: Path) -> None:
    """Requests of one route wait; others do not, nor probes; each that was hit is in the timeline by its id."""
    shop.http.get("/products/SKU-0001")
    before = hits(shop, "latency")
    fault = begin(shop, kind="latency", latency_ms=300, route="/products/{product_id}")
    slow = shop.http.get("/products/SKU-0001", headers={"X-Request-ID": "the-slow-one"})
    assert slow.status_code == 200
    assert slow.elapsed.total_seconds() >= 0.3
    for path in ("/orders", "/livez", "/readyz", "/metrics", "/faults", "/products"):
        assert shop.http.get(path, headers=HEADERS).elapsed.total_seconds() < 0.3
    assert shop.http.head("/products/SKU-0001").elapsed.total_seconds() >= 0.3
    assert (active(shop, "latency"), hits(shop, "latency") - before) == (1, 2)
    assert faults(shop)[0]["hits"] == 2
    assert shop.http.delete(f"/faults/{fault['id']}", headers=HEADERS).json()["hits"] == 2
    check_refusal(shop.http.delete(f"/faults/{fault['id']}", headers=HEADERS), 404, "not_found")
    assert active(shop, "latency") == 0
    lines = timeline(timeline_path, fault["id"])
    assert [line["event"] for line in lines] == ["begun", "hit", "hit", "ended"]
    assert lines[0]["ends_at"] == fault["ends_at"]
    assert lines[1]["request_id"] == "the-slow-one"
    assert lines[1]["route"] == "/products/{product_id}"
    assert lines[-1]["why"] == "deleted"
    access = [json.loads(line) for line in shop.service.log_path.read_text().splitlines()]
    assert [line["faults"] for line in access if line.get("request_id") == "the-slow-one"] == [["latency"]]


@pytest.mark.parametrize("status", [500, 503, 504])
def test_error(shop: Shop, status: int) -> None:
    """An order is refused as a problem, truthfully: it is not stored."""
    begin(shop, kind="error", status=status, route="/orders")
    customer = f"c-error-{status}"
    refused = shop.place(new_order(("SKU-0001", 1), customer_id=customer))
    error_type = "timeout" if status == 504 else "internal"
    check_refusal(refused, status, error_type, "not_executed")
    assert shop.orders_stored(customer) == 0
    assert shop.http.get("/products/SKU-0001").status_code == 200


def test_abort(shop: Shop) -> None:
    """The connection is cut, nothing is stored; the request is counted as one without an answer."""
    fault = begin(shop, kind="abort", route="/orders")
    customer = "c-abort"
    with pytest.raises(httpx.TransportError):
        httpx.post(f"{shop.service.url}/orders", json=new_order(("SKU-0001", 1), customer_id=customer))
    shop.http.delete(f"/faults/{fault['id']}", headers=HEADERS)
    assert shop.orders_stored(customer) == 0
    assert shop.service.metric("http_requests_total", method="POST", route="/orders", status="0") >= 1
    assert shop.place(new_order(("SKU-0001", 1), customer_id=customer)).status_code == 201
    assert "application_failed" not in shop.service.log_path.read_text()


def test_the_seed_chooses_whom_it_hits(shop: Shop) -> None:
    """The same seed and share hit the same of the requests, another seed others; about as many as the share."""

    def run(seed: int) -> list[int]:
        fault = begin(shop, kind="error", route="/products", share=0.3, seed=seed)
        statuses = [shop.http.get("/products").status_code for _ in range(60)]
        shop.http.delete(f"/faults/{fault['id']}", headers=HEADERS)
        return statuses

    first = run(7)
    assert run(7) == first
    assert run(8) != first
    assert 8 <= first.count(503) <= 30


def test_it_ends_by_itself(shop: Shop, timeline_path: Path) -> None:
    """When its time is up nobody has to come."""
    fault = begin(shop, kind="error", ttl_seconds=0.5)
    assert shop.http.get("/products").status_code == 503
    until(lambda: faults(shop) == [])
    assert shop.http.get("/products").status_code == 200
    assert active(shop, "error") == 0
    assert timeline(timeline_path, fault["id"])[-1]["why"] == "ttl"


def test_hold_connections(shop: Shop) -> None:
    """The pool is used up, orders are refused by it; when the fault ends all is as before."""
    most = int(shop.service.metric("db_pool_max"))
    fault = begin(shop, kind="hold_connections", connections=10_000)
    until(lambda: shop.service.metric("db_pool_in_use") == most)
    check_refusal(shop.place(new_order(("SKU-0001", 1))), 503, "overloaded", "not_executed")
    assert shop.http.get("/livez").status_code == 200
    shop.http.delete(f"/faults/{fault['id']}", headers=HEADERS)
    until(lambda: shop.service.metric("db_pool_in_use") == 0)
    assert shop.place(new_order(("SKU-0001", 1))).status_code == 201


def test_block_loop(shop: Shop) -> None:
    """The event loop's lag tells it."""
    begin(shop, kind="block_loop", block_ms=400, pause_ms=200)
    until(lambda: shop.service.metric("event_loop_lag_seconds") > 0.1)
    assert hits(shop, "block_loop") >= 1


def test_burn_cpu(shop: Shop) -> None:
    """The process takes about the share of a CPU that was asked for, and stops when it ends."""

    def cpu_seconds(during: float) -> float:
        before = shop.service.metric("process_cpu_seconds_total")
        time.sleep(during)
        return shop.service.metric("process_cpu_seconds_total") - before

    fault = begin(shop, kind="burn_cpu", cpu_share=0.6)
    burning = cpu_seconds(2)  # 1.2, where the machine has as much to spare
    shop.http.delete(f"/faults/{fault['id']}", headers=HEADERS)
    time.sleep(0.2)
    assert burning > cpu_seconds(2) + 0.2


def test_eat_memory(shop: Shop) -> None:
    """Memory is really taken, and given back."""

    def resident() -> float:
        return shop.service.metric("process_resident_memory_bytes")

    before = resident()
    fault = begin(shop, kind="eat_memory", megabytes=128)
    until(lambda: resident() > before + 120e6)
    shop.http.delete(f"/faults/{fault['id']}", headers=HEADERS)
    until(lambda: resident() < before + 40e6)


async def test_slow_payments(
    payments: PaymentsProcess, start_service: Callable[..., ServiceProcess], tmp_path: Path
) -> None:
    """Attempts take longer, up to their own limit; orders do not notice, and are settled when it ends."""
    path = tmp_path / "faults.jsonl"
    service = start_service(PAYMENTS_URL=payments.url, FAULTS_TOKEN=TOKEN, FAULTS_TIMELINE=path)
    async with OrderClient(service.url, headers=HEADERS) as client:
        fault = {"kind": "slow_payments", "latency_ms": 900, "ttl_seconds": 2}
        begun = await client.send("POST", "/faults", fault)
        assert begun.status == 201
        placed = await client.place(OrderRequest.keyed(("SKU-0001", 1)))
        assert placed.seconds < 0.9
        started_at = time.monotonic()
        async with asyncio.timeout(10):
            while not payments.entry(placed.order_id).charges:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert time.monotonic() - started_at > 0.8
    struck = [line for line in timeline(path, begun.json()["id"]) if line["event"] == "hit"]
    assert [line["order_id"] for line in struck] == [placed.order_id]


def test_a_timeline_that_cannot_be_written_stops_the_start(
    start_service: Callable[..., ServiceProcess], tmp_path: Path
) -> None:
    """One line that names the setting."""
    with pytest.raises(RuntimeError, match="FAULTS_TIMELINE: cannot be written"):
        start_service(FAULTS_TOKEN=TOKEN, FAULTS_TIMELINE=tmp_path / "no" / "such" / "file")


def test_faults_end_with_the_service(start_service: Callable[..., ServiceProcess], tmp_path: Path) -> None:
    """SIGTERM with faults of every kind on: exit 0, and the timeline says that they ended."""
    path = tmp_path / "faults.jsonl"
    service = start_service(FAULTS_TOKEN=TOKEN, FAULTS_TIMELINE=path)
    kinds = ("hold_connections", "burn_cpu", "eat_memory", "block_loop", "latency", "abort", "slow_payments")
    with service.client(headers=HEADERS) as http:
        for kind in kinds:
            assert http.post("/faults", json={"kind": kind}).status_code == 201
    assert service.terminate() == 0
    ended = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["kind"] for line in ended if line["event"] == "ended"} == set(kinds)
