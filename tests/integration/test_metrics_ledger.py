"""The service's own books: they agree with what its clients counted, and no client can make them grow."""

import asyncio
import itertools
import random
import string
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
import structlog
from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.types import Message

from app import metrics, middleware
from app.auth import new_key
from app.embedded_postgres import EmbeddedPostgres
from app.main import create_app
from app.settings import Settings
from tests.support.occupation import PATIENT, occupied
from tests.support.order_api import Shop, check_problem, check_refusal, new_order
from tests.support.service_process import ServiceProcess

_TOKEN, _ENTRY = new_key("alice")
_MAX_IN_FLIGHT = 100

# What the contract allows, written out: the service must show exactly these.
COMBINATIONS = {
    ("success", ""),
    ("replayed", ""),
    ("rejected", "validation"),
    ("rejected", "unauthorized"),
    ("rejected", "too_large"),
    ("rejected", "unknown_product"),
    ("rejected", "out_of_stock"),
    ("rejected", "idempotency_mismatch"),
    ("error", "overloaded"),
    ("error", "circuit_open"),
    ("error", "database"),
    ("error", "timeout"),
    ("error", "internal"),
}


class Books:
    """The orders as a client counted them, one by one."""

    def __init__(self) -> None:
        self.orders: Counter[tuple[str, str]] = Counter()
        self.shed = 0

    def note(self, answer: httpx.Response) -> None:
        """One answer of `POST /orders`, or of a batch that was not read."""
        if answer.status_code == 201:
            replayed = "idempotency-replayed" in answer.headers
            self.orders["replayed" if replayed else "success", ""] += 1
        else:
            self._note_problem(answer.json())

    def note_results(self, results: Sequence[dict[str, Any]]) -> None:
        """The results of a batch."""
        for result in results:
            if result["status"] == 201:
                self.orders["replayed" if result["replayed"] else "success", ""] += 1
            else:
                self._note_problem(result["error"])

    def _note_problem(self, problem: dict[str, Any]) -> None:
        error_type = problem["error_type"]
        check_problem(problem, problem["status"], error_type, problem["outcome"])
        self.orders["error" if problem["status"] >= 500 else "rejected", error_type] += 1
        self.shed += error_type == "overloaded"

    def check(self, service: ServiceProcess) -> None:
        """Hold the service's metrics to it."""
        samples = service.metrics()
        counted = {
            (dict(labels)["status"], dict(labels)["error_type"]): value
            for (name, labels), value in samples.items()
            if name == "orders_total"
        }
        assert set(counted) == COMBINATIONS
        assert counted == {combination: self.orders[combination] for combination in COMBINATIONS}

        shed = samples["requests_shed_total", (("reason", "admission"),)]
        refused = sum(counted["rejected", kind] for kind in ("validation", "unauthorized", "too_large"))
        taken = sum(counted.values()) - refused - shed
        assert samples["order_processing_seconds_count", ()] == taken
        assert samples["order_processing_seconds_bucket", (("le", "+Inf"),)] == taken
        assert samples["order_stage_seconds_count", (("stage", "parse"),)] == taken
        assert samples["requests_in_flight", ()] == 0
        assert samples["order_batch_queue_depth", ()] == 0


def test_every_combination_of_labels_is_there_from_the_start(service: ServiceProcess) -> None:
    """At 0, before the first order: all that can come, and nothing else."""
    Books().check(service)
    samples = service.metrics()
    for reason in ("admission", "queue", "pool"):
        assert samples["requests_shed_total", (("reason", reason),)] == 0
    for stage in ("parse", "price", "queue", "store", "respond"):
        assert samples["order_stage_seconds_count", (("stage", stage),)] == 0
    for outcome in ("opened", "failed"):
        assert ("db_connections_total", (("outcome", outcome),)) in samples
    assert not [name for name, _ in samples if name.endswith("_created")]


def test_the_books_agree_with_the_clients(
    start_service: Callable[..., ServiceProcess], database_url: str
) -> None:
    """Every order of every kind, alone and in batches, is counted once, as what its client was told."""
    service = start_service(
        **PATIENT, API_KEYS=_ENTRY, MAX_IN_FLIGHT=_MAX_IN_FLIGHT, MAX_IN_FLIGHT_SHARE_PER_PRINCIPAL=1
    )
    shop, books = Shop(service, database_url, _TOKEN), Books()
    shop.sql("ALTER TABLE orders ADD CONSTRAINT no_bad_customer CHECK (customer_id <> 'banned')")
    scarce = shop.new_product(stock=3)
    good, unknown = new_order(("SKU-0001", 1)), new_order(("SKU-none", 1))
    short, banned = new_order((scarce, 4)), new_order(("SKU-0001", 1), customer_id="banned")
    mismatch = new_order(("SKU-0001", 2))

    for order, key in [
        (good, None),
        (good, "k-1"),
        (good, "k-1"),
        (mismatch, "k-1"),
        (unknown, None),
        (short, None),
        (banned, None),
        ({}, None),
        (good, "k" * 256),
        ("x" * 70_000, None),
    ]:
        books.note(shop.place(order, key))
    json_type = {"Content-Type": "application/json"}
    books.note(shop.http.post("/orders", content=b"{", headers=json_type))
    books.note(shop.http.post("/orders", content=b"{}"))
    for route in ("/orders", "/orders/batch"):
        books.note(shop.http.post(route, json=good, headers={"Authorization": "Bearer wrong"}))
    for body in (b"{", b"{}", b'{"orders": []}', b" " * 2_000_000):
        books.note(shop.http.post("/orders/batch", content=body, headers=json_type))
    books.note(shop.http.post("/orders/batch", json={"orders": [good]}, headers={"Idempotency-Key": "k"}))
    books.note_results(
        shop.place_batch(
            [
                good,
                {**good, "idempotency_key": "k-1"},
                {**mismatch, "idempotency_key": "k-1"},
                {**good, "idempotency_key": "k-2"},
                {**good, "idempotency_key": "k-2"},
                unknown,
                short,
                banned,
                {},
                0,
                good,
            ]
        )
    )
    assert set(books.orders) == COMBINATIONS - {
        ("error", kind) for kind in ("overloaded", "circuit_open", "database", "timeout")
    }
    books.check(service)

    # Known but too many at once: each order of it counts, and a malformed one as what it is.
    with occupied(service, database_url, 50, books, _TOKEN):
        answer = shop.http.post("/orders/batch", json={"orders": [good] * 60 + [{}]})
        check_refusal(answer, 503, "overloaded")
        books.orders["error", "overloaded"] += 60
        books.orders["rejected", "validation"] += 1
    books.check(service)

    # Not read for want of a place: one, whatever it would have held.
    with occupied(service, database_url, _MAX_IN_FLIGHT, books, _TOKEN):
        for _ in range(3):
            answer = shop.http.post("/orders/batch", json={"orders": [good] * 5})
            check_refusal(answer, 503, "overloaded")
            books.note(answer)
            books.note(shop.place(good))
        assert shop.http.get("/orders").status_code == 503  # not an order: not counted
    books.check(service)
    shop.http.close()


async def test_the_books_agree_under_overload(
    start_service: Callable[..., ServiceProcess], database_url: str
) -> None:
    """1,500 orders of 300 clients at once against 100 places: each is counted once, as what its client was told."""
    service = await asyncio.to_thread(
        start_service, API_KEYS=_ENTRY, MAX_IN_FLIGHT=_MAX_IN_FLIGHT, MAX_IN_FLIGHT_SHARE_PER_PRINCIPAL=1
    )
    shop, books = Shop(service, database_url, _TOKEN), Books()
    scarce = shop.new_product(stock=30)
    choose = random.Random(1)  # noqa: S311
    async with shop.async_client(300) as client:

        async def buy() -> None:
            for _ in range(5):
                product = choose.choice(["SKU-0001", "SKU-0002", scarce, "SKU-none"])
                key = choose.choice(["", str(uuid.uuid4()), f"shared-{choose.randrange(20)}"])
                quantity = choose.choice([0, 1, 1, 1, 2])
                headers = {"Idempotency-Key": key} if key else {}
                order = new_order((product, quantity))
                books.note(await client.post("/orders", json=order, headers=headers))

        await asyncio.gather(*(buy() for _ in range(300)))
    assert sum(books.orders.values()) == 1500
    assert books.orders["error", "overloaded"]
    assert books.orders["success", ""]
    assert shop.service.metric("requests_shed_total", reason="admission") == books.shed
    books.check(service)
    [(stored,)] = shop.sql("SELECT count(*) FROM orders")
    assert stored == books.orders["success", ""]
    shop.http.close()


def test_the_books_agree_while_the_database_is_away(
    start_service: Callable[..., ServiceProcess], own_postgres: EmbeddedPostgres
) -> None:
    """Refused alone and in a batch, which is still answered with 200: each order is counted as its own error."""
    service = start_service(dsn=own_postgres.dsn)
    shop, books = Shop(service, own_postgres.dsn), Books()
    order = new_order(("SKU-0001", 1))
    books.note(shop.place(order))
    own_postgres.stop()
    for _ in range(5):
        answer = shop.place(order)
        assert (answer.status_code == 503) == ("retry-after" in answer.headers)
        books.note(answer)
    books.note_results(shop.place_batch([order, {}, order]))
    assert books.orders["error", "circuit_open"]
    assert sum(books.orders.values()) == 9
    books.check(service)
    shop.http.close()


# --- what a client can add to the metrics -----------------------------------------------------------------------

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW")
_SHAPES = (
    "/{word}",
    "/{word}/{word}",
    "/{word}/{uuid}",
    "/orders/{word}",
    "/orders/{word}/cancel",
    "/orders/{uuid}/{word}",
    "/orders/batch/{word}",
    "/products/{word}/{word}",
    "/docs/{word}",
    "/docs/assets/{word}",
    "/metrics/{word}",
    "/livez{word}",
)


@pytest.mark.parametrize("requests", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
async def test_random_paths_and_methods_add_no_series(
    database_url: str, monkeypatch: pytest.MonkeyPatch, requests: int
) -> None:
    """Once each shape of a request was seen, no path, id or method makes a new one."""
    silent = structlog.make_filtering_bound_logger("critical")
    monkeypatch.setattr(middleware, "_log", structlog.wrap_logger(None, wrapper_class=silent))
    app = create_app(Settings.load(database_url=database_url, db_pool_min_size=1, catalog_size=1))
    choose = random.Random(7)  # noqa: S311
    letters = string.ascii_letters + string.digits + "-._~%é\x00 "

    def fill(shape: str) -> str:
        word = "".join(choose.choices(letters, k=choose.randint(1, 30)))
        return shape.format(word=word, uuid=uuid.UUID(int=choose.getrandbits(128)))

    async with app.router.lifespan_context(app) as state:
        for method, shape in itertools.product(_METHODS, _SHAPES):
            for _ in range(3):
                await _request(app, dict(state or {}), method, fill(shape))
        before = _series()
        for _ in range(requests):
            method = choose.choice(_METHODS)
            if method == "BREW":
                method = "".join(choose.choices(string.ascii_uppercase, k=12))
            await _request(app, dict(state or {}), method, fill(choose.choice(_SHAPES)))
        assert _series() == before
    routes = {dict(labels)["route"] for name, labels in before if name == "http_requests_total"}
    templates = {getattr(route, "path_format", "") for route in app.routes} | {"unmatched"}
    assert routes <= templates


async def _request(app: FastAPI, state: dict[str, Any], method: str, path: str) -> None:
    """One request through the whole application, without a socket."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [],
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
        "state": state,
    }
    statuses: list[int] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(scope, receive, send)
    assert len(statuses) == 1
    assert 200 <= statuses[0] < 500, (method, path, statuses)


def _series() -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in REGISTRY.collect()
        for sample in family.samples
    }


def test_the_outcomes_in_the_source_are_the_contracts() -> None:
    """The service counts the combinations that the contract names."""
    assert {
        (status, kind) for status, kinds in metrics.ORDER_OUTCOMES.items() for kind in kinds
    } == COMBINATIONS
