"""What the tests of the API share: a service on a database of its own, orders to send, answers to check."""

import contextlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psycopg2
from psycopg2.extensions import make_dsn

from app.embedded_postgres import EmbeddedPostgres
from app.schemas import Problem
from tests.support.service_process import ServiceProcess


@contextlib.contextmanager
def new_database(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The DSN of an empty database, dropped at the end."""
    name = f"test_{uuid.uuid4().hex}"
    execute(postgres.dsn, f"CREATE DATABASE {name}")
    yield make_dsn(postgres.dsn, dbname=name)
    execute(postgres.dsn, f"DROP DATABASE {name} WITH (FORCE)")


class Shop:
    """A running service and the database behind it."""

    def __init__(self, service: ServiceProcess, dsn: str, token: str | None = None) -> None:
        self.service = service
        self.dsn = dsn
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.http = service.client(headers=self.headers)

    def async_client(self, connections: int = 100) -> httpx.AsyncClient:
        """A client for many requests at once."""
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        return httpx.AsyncClient(base_url=self.service.url, headers=self.headers, timeout=30, limits=limits)

    def sql(self, statement: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Run a statement behind the service's back."""
        return execute(self.dsn, statement, parameters)

    def new_product(self, stock: int = 1_000_000) -> str:
        """The id of a product that no other test knows; it costs 100 cents."""
        product_id = f"P-{uuid.uuid4().hex[:12]}"
        self.sql(
            "INSERT INTO products (id, name, price_cents, currency, stock)"
            " VALUES (%(id)s, 'A product of a test', 100, 'EUR', %(stock)s)",
            {"id": product_id, "stock": stock},
        )
        return product_id

    def stock(self, product_id: str) -> int:
        """What is left of a product."""
        return int(self.sql("SELECT stock FROM products WHERE id = %(id)s", {"id": product_id})[0][0])

    def orders_stored(self, customer_id: str) -> int:
        """How many orders of a customer there are, whatever their status."""
        rows = self.sql("SELECT count(*) FROM orders WHERE customer_id = %(id)s", {"id": customer_id})
        return int(rows[0][0])

    def place(self, order: object, key: str | None = None) -> httpx.Response:
        """POST /orders."""
        return self.http.post("/orders", json=order, headers={"Idempotency-Key": key} if key else {})

    def place_batch(self, orders: Sequence[object]) -> list[dict[str, Any]]:
        """POST /orders/batch, and its results."""
        response = self.http.post("/orders/batch", json={"orders": orders})
        assert response.status_code == 200, response.text
        results: list[dict[str, Any]] = response.json()["results"]
        assert len(results) == len(orders)
        return results


@contextlib.contextmanager
def open_shop(
    postgres: EmbeddedPostgres, directory: Path, *, token: str | None = None, **settings: object
) -> Iterator[Shop]:
    """A service on a database of its own."""
    with new_database(postgres) as dsn:
        service = ServiceProcess(directory, dsn, settings).start()
        shop = Shop(service, dsn, token)
        try:
            yield shop
        finally:
            shop.http.close()
            service.kill()


def execute(dsn: str, statement: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
    """Run one statement in a transaction of its own."""
    with contextlib.closing(psycopg2.connect(dsn)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []


def new_order(*lines: tuple[str, int], customer_id: str = "c-1") -> dict[str, Any]:
    """The body of an order: `new_order(("SKU-0001", 2))`."""
    items = [{"product_id": product_id, "quantity": quantity} for product_id, quantity in lines]
    return {"customer_id": customer_id, "items": items}


def new_customer() -> str:
    """A customer that no other test knows."""
    return f"c-{uuid.uuid4().hex[:12]}"


def check_problem(problem: object, status: int, error_type: str, outcome: str = "not_executed") -> Problem:
    """Check a problem against the contract."""
    found = Problem.model_validate(problem)
    assert (found.status, found.error_type, found.outcome) == (status, error_type, outcome), problem
    assert found.type.startswith("urn:")
    assert found.title
    assert found.detail
    return found


def check_refusal(
    response: httpx.Response, status: int, error_type: str, outcome: str = "not_executed"
) -> Problem:
    """Check a refusal and the headers that its status demands."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"]
    assert (status == 503) == ("retry-after" in response.headers)
    assert status != 503 or int(response.headers["retry-after"]) >= 1
    assert (status == 401) == response.headers.get("www-authenticate", "").startswith("Bearer")
    assert (status == 405) == ("allow" in response.headers)
    return check_problem(response.json(), status, error_type, outcome)
