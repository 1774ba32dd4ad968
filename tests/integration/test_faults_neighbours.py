"""What is wrong with one order is that order's alone, and any text can be stored."""

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg2.extensions import make_dsn

from app import migrations
from app.catalogue import Catalogue
from app.db import Database, is_database_failure
from app.domain import IncomingOrder, Order, OrderIds, PlacedOrder
from app.embedded_postgres import EmbeddedPostgres
from app.errors import InternalError, ServiceError, StatementRejected
from app.resilience import CircuitBreaker, Guard, RetryBudget
from app.service import OrderService
from app.timestamp import timestamp
from tests.support.order_api import Shop, execute, new_customer, new_order
from tests.support.service_process import ServiceProcess

_TEXTS = ["日本", "à", "🛒", "\\", "'", '"', "%s", "%(batch)s", "\\u0041", "a\nb", "$$", "?"]


@pytest.mark.parametrize(
    "settings",
    [
        {"PGCLIENTENCODING": "LATIN1"},
        {"PGCLIENTENCODING": "SQL_ASCII"},
        {"PGOPTIONS": "-c client_encoding=LATIN1"},
        {"in the DSN": "client_encoding=LATIN1"},
        {"in the DSN": "options='-c client_encoding=SQL_ASCII'"},
        {"of the database": "LATIN1"},
    ],
    ids=str,
)
def test_every_text_is_stored_whatever_the_client_encoding(
    start_service: Callable[..., ServiceProcess], database_url: str, settings: dict[str, str]
) -> None:
    """`日本` in one order made the whole batch `unknown`, though nothing was sent."""
    dsn = f"{database_url} {settings.pop('in the DSN', '')}"
    if encoding := settings.pop("of the database", ""):
        [(name,)] = execute(database_url, "SELECT current_database()")
        execute(database_url, f"ALTER DATABASE {name} SET client_encoding = '{encoding}'")
    shop = Shop(start_service(dsn=dsn, **settings), database_url)
    customers = [f"{new_customer()}{text}" for text in _TEXTS]
    results = shop.place_batch([new_order(("SKU-0001", 1), customer_id=name) for name in customers])
    assert [result.get("order", {}).get("customer_id") for result in results] == customers
    for result in results:
        assert shop.http.get(f"/orders/{result['order']['id']}").json() == result["order"]
    stored = execute(make_dsn(database_url, client_encoding="UTF8"), "SELECT customer_id FROM orders")
    assert sorted(customers) == sorted(name for (name,) in stored)
    shop.http.close()


@pytest.fixture(params=["LATIN1", "SQL_ASCII", "EUC_JP"])
def other_database(postgres: EmbeddedPostgres, request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    name = f"test_{request.param.lower()}"
    execute(
        postgres.dsn,
        f"CREATE DATABASE {name} ENCODING '{request.param}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'",
    )
    yield request.param, make_dsn(postgres.dsn, dbname=name)
    execute(postgres.dsn, f"DROP DATABASE {name} WITH (FORCE)")


def test_a_database_that_is_not_utf8_is_refused_at_the_start(
    tmp_path: Path, other_database: tuple[str, str]
) -> None:
    """One line that names DATABASE_URL and the encoding; nothing is made in it."""
    encoding, dsn = other_database
    with pytest.raises(RuntimeError, match=f"DATABASE_URL: the database's encoding is {encoding}") as refused:
        ServiceProcess(tmp_path, dsn).start()
    assert len(str(refused.value).strip().splitlines()) == 1
    assert execute(dsn, "SELECT to_regclass('orders')") == [(None,)]


# --- what cannot be written -------------------------------------------------------------------------------------


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    db = await Database.connect(
        database_url,
        pool_min_size=1,
        pool_max_size=1,
        pool_timeout_seconds=30,
        acquire_timeout_seconds=5,
        connect_timeout_seconds=5,
        statement_timeout_seconds=5,
    )
    await migrations.migrate(db)
    await migrations.seed_catalogue(db, size=10, stock=1000)
    yield db
    await db.close(5)


def _service(db: Database) -> OrderService:
    breaker = CircuitBreaker("test", fail_max=1, reset_seconds=60, is_failure=is_database_failure)
    guard = Guard(breaker, RetryBudget(), max_attempts=3)
    catalogue = Catalogue(db, guard, cache_ttl_seconds=300, cache_max_size=10, request_deadline_seconds=5)
    return OrderService(
        db,
        catalogue,
        writes=guard,
        reads=guard,
        batch_max_size=100,
        batch_max_wait_seconds=0.5,
        request_deadline_seconds=5,
    )


_IDS = OrderIds()


def _incoming(customer_id: str = "c", *, quantity: int = 1, key: str | None = None) -> IncomingOrder:
    now = time.monotonic()
    order_id, created_ns = _IDS.next()
    lines = [("SKU-0001", quantity, 100)]
    order = Order(order_id, customer_id, "confirmed", "EUR", 100 * quantity, lines, timestamp(created_ns))
    return IncomingOrder(
        principal="p",
        customer_id=customer_id,
        items=[("SKU-0001", quantity)],
        idempotency_key=key,
        arrived_at=now,
        parsed_at=now,
        deadline=now + 5,
        order=order,
    )


def _unpriced() -> IncomingOrder:
    incoming = _incoming()
    incoming.order = None
    return incoming


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(lambda: _incoming("lone \ud800 surrogate"), id="surrogate"),
        pytest.param(lambda: _incoming("lone \ud800 surrogate", key="k"), id="surrogate with a key"),
        pytest.param(lambda: _incoming("NUL \x00"), id="NUL"),
        pytest.param(lambda: _incoming(quantity=2**70), id="no bigint"),
        pytest.param(lambda: _incoming(quantity=2**62), id="no bigint with its neighbours"),
        pytest.param(_unpriced, id="unpriced"),
    ],
)
async def test_an_order_that_cannot_be_written_fails_alone(
    db: Database, bad: Callable[[], IncomingOrder]
) -> None:
    """`not_executed`, and its neighbours are stored; whether psycopg2, orjson or the server does not take it."""
    batch = [_incoming(), bad(), _incoming(), _incoming(key="other"), bad()]
    results = await _service(db)._store(batch, one_by_one=False)
    for n, result in enumerate(results):
        if n in (1, 4):
            assert isinstance(result, ServiceError), result
            assert result.outcome == "not_executed"
        else:
            assert isinstance(result, PlacedOrder), result
    assert await db.run("SELECT count(*) FROM orders") == [(3,)]
    assert await db.run("SELECT stock FROM products WHERE id = 'SKU-0001'") == [(997,)]


@pytest.mark.parametrize(
    "value",
    [object(), "NUL \x00", "lone \ud800 surrogate", {"a"}],
    ids=["object", "NUL", "surrogate", "set"],
)
async def test_a_value_the_driver_cannot_write_was_not_sent(db: Database, value: object) -> None:
    """Whatever the driver raises it is a refused value: nothing was sent, and the connection serves on."""
    pid = await db.run("SELECT pg_backend_pid()")
    with pytest.raises(StatementRejected) as refusal:
        await db.run("SELECT %(value)s", {"value": value})
    assert refusal.value.outcome == "not_executed"
    assert isinstance(refusal.value, InternalError)
    assert not is_database_failure(refusal.value)
    assert await db.run("SELECT pg_backend_pid()") == pid


async def test_a_connection_that_was_closed_is_no_value_that_cannot_be_written(db: Database) -> None:
    """What the driver says of it is a lost connection, as before."""
    conn: Any = await db._pool.acquire()
    conn.raw.close()
    with pytest.raises(Exception, match="closed"):
        await conn.run("SELECT %(value)s", {"value": 1}, 1.0)
    with contextlib.suppress(Exception):
        db._pool.release(conn)
    assert await db.run("SELECT 1") == [(1,)]
