"""The function that stores a batch, beside a plainer one that decides alike: store_orders_oracle.sql."""

import asyncio
import contextlib
import functools
import json
import random
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import make_dsn

from app.migrations import migrations
from tests.support import locks
from tests.support.ledger import Ledger
from tests.support.order_api import execute
from tests.support.order_client import OrderClient, OrderRequest
from tests.support.service_process import ServiceProcess

FIELDS = ("principal", "id", "customer_id", "currency", "total_cents", "lines", "created_at", "key", "hash")
VERDICTS = {"stored", "replayed", "mismatch", "unknown_product", "out_of_stock"}
STORE = "SELECT * FROM store_orders_v1(%s, %s, %s)"
ORACLE = Path(__file__).with_name("store_orders_oracle.sql")
ASK_ORACLE = "SELECT * FROM store_orders_oracle(%s, %s, %s)"

Order = dict[str, Any]
Rows = list[tuple[Any, ...]]


class Store:
    """The schema alone, in a PostgreSQL schema of its own."""

    def __init__(self, dsn: str, name: str) -> None:
        execute(dsn, f"CREATE SCHEMA {name}")
        self.connection = psycopg2.connect(make_dsn(dsn, options=f"-c search_path={name}"))
        self.connection.autocommit = True
        self._cursor = self.connection.cursor()
        for _, path in migrations():
            self._cursor.execute(path.read_text())
        self._cursor.execute(ORACLE.read_text())

    def run(self, sql: str, *parameters: Any) -> Rows:
        """Run one statement."""
        self._cursor.execute(sql, parameters)
        return self._cursor.fetchall() if self._cursor.description else []

    def new_products(self, stock: dict[str, int]) -> None:
        """Insert products, in this order."""
        for product_id, pieces in stock.items():
            self.run("INSERT INTO products VALUES (%s, 'A product', 100, 'EUR', %s)", product_id, pieces)

    def stock(self) -> dict[str, int]:
        """The pieces left, by product."""
        return dict(self.run("SELECT id, stock FROM products"))

    def orders(self) -> Rows:
        """All that is stored."""
        return self.run("SELECT * FROM orders ORDER BY id")

    def store(self, batch: Sequence[Order], *, one_by_one: bool = False) -> Rows:
        """One row per order, by its place in the batch, from 0, whatever the form of the answer."""
        rows = [[order[field] for field in FIELDS] for order in batch]
        answer = self.run(STORE, json.dumps(rows), json.dumps(wanted_by(batch)), one_by_one)
        if [row[0] for row in answer] == [None]:
            return [(n, *answer[0][1:]) for n in range(len(batch))]
        return sorted((n - 1, *rest) for n, *rest in answer)

    def store_plainly(self, batch: Sequence[Order]) -> Rows:
        """The same as `store`, by the oracle."""
        rows = [{"n": n, **order} for n, order in enumerate(batch)]
        wanted = wanted_by(batch)
        return sorted(self.run(ASK_ORACLE, json.dumps(rows), list(wanted), list(wanted.values())))

    def settle(self, store: Callable[[Sequence[Order]], Rows], batch: Sequence[Order]) -> tuple[Rows, int]:
        """Ask again for what is undecided until nothing is; the last answer for each order, and the passes."""
        answers: dict[int, tuple[Any, ...]] = {}
        passes = 0
        while asked := [n for n in range(len(batch)) if answers.get(n, (0, "undecided"))[1] == "undecided"]:
            passes += 1
            for n, *rest in store([batch[n] for n in asked]):
                answers[asked[n]] = (asked[n], *rest)
        return [answers[n] for n in sorted(answers)], passes


@pytest.fixture
def new_store(database_url: str) -> Iterator[Callable[[str], Store]]:
    """Make stores in the test's database."""
    with contextlib.ExitStack() as stack:

        def new(name: str) -> Store:
            store = Store(database_url, name)
            stack.callback(store.connection.close)
            return store

        yield new


def without_products(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """A row as the oracle gives it: it does not name the products that led to a refusal."""
    return (*row[:5], None, *row[6:]) if row[1] in {"unknown_product", "out_of_stock"} else row


def wanted_by(batch: Sequence[Order]) -> Counter[str]:
    wanted: Counter[str] = Counter()
    for order in batch:
        for product_id, quantity, _ in order["lines"]:
            wanted[product_id] += quantity
    return wanted


def new_order(*lines: tuple[str, int], key: str | None = None, customer: str = "c-1") -> Order:
    return {
        "principal": "anonymous",
        "id": str(uuid.uuid4()),
        "customer_id": customer,
        "currency": "EUR",
        "total_cents": sum(100 * quantity for _, quantity in lines),
        "lines": [[product_id, quantity, 100] for product_id, quantity in lines],
        "created_at": "2026-11-22T10:00:00.123456Z",
        "key": key,
        "hash": f"{customer}{lines}",
    }


@pytest.mark.parametrize("one_by_one", [False, True], ids=["together", "one by one"])
def test_it_decides_as_the_oracle(new_store: Callable[[str], Store], *, one_by_one: bool) -> None:
    """Whatever a batch holds, answers, rows and stock are those of the oracle."""
    plain, store = new_store("plain"), new_store("store")
    chance = random.Random(7)  # noqa: S311
    stock = {f"P-{n}": chance.randint(0, 60) for n in range(30)} | {"P-many": 10_000}
    shelf = [*stock, *["P-many"] * 40]
    for each in (plain, store):
        each.new_products(stock)
    sent: list[Order] = []
    verdicts: Counter[str] = Counter()
    whole = 0
    for _ in range(300):
        batch = []
        wanted_by_all = chance.choice(shelf)
        for number in range(chance.randint(1, 6)):
            products = {wanted_by_all, chance.choice(shelf)}
            lines = tuple((product_id, chance.choice([1, 2, 3, 8])) for product_id in sorted(products))
            if chance.random() < 0.03:
                lines += (("unknown", 1),)
            key = f"k-{len(sent)}-{number}" if chance.random() < 0.7 else None
            batch.append(new_order(*lines, key=key, customer=f"c-{chance.randint(1, 9)}"))
        sent.extend(batch)
        for again in chance.sample(sent, chance.choice([0, 0, 0, 1, 2])):
            if any(order["id"] == again["id"] or again["key"] in {None, order["key"]} for order in batch):
                continue
            own_attempt: Order = {}
            replay = {"id": str(uuid.uuid4())}
            mismatch = replay | {"hash": "of another order"}
            batch.append(again | chance.choice([own_attempt, replay, mismatch]))
        expected, _ = plain.settle(plain.store_plainly, batch)
        answers, passes = store.settle(functools.partial(store.store, one_by_one=one_by_one), batch)
        assert [without_products(row) for row in answers] == expected
        assert passes <= 2
        assert store.stock() == plain.stock()
        verdicts.update(row[1] for row in expected)
        whole += {row[1] for row in expected} == {"stored"}
    assert store.orders() == plain.orders()
    assert set(verdicts) == VERDICTS
    assert 50 < whole < 250


def test_a_replay_gives_back_what_its_batch_took(new_store: Callable[[str], Store]) -> None:
    """A batch of new orders and a replay takes stock for the new orders alone."""
    store = new_store("one")
    store.new_products({"P-1": 10, "P-2": 10})
    first = new_order(("P-1", 2), key="k")
    assert store.store([first])[0][1] == "stored"
    replay = first | {"id": str(uuid.uuid4())}
    answers = store.store([new_order(("P-1", 3)), replay, new_order(("P-2", 1), ("P-1", 1))])
    assert [row[1] for row in answers] == ["stored", "replayed", "stored"]
    assert answers[1][2] == first["id"]
    assert store.stock() == {"P-1": 4, "P-2": 9}
    assert len(store.orders()) == 3


def test_stock_for_some_products_only(new_store: Callable[[str], Store]) -> None:
    """Nothing of the other products is taken where one is short, but for the orders that are stored."""
    store = new_store("one")
    store.new_products({"P-1": 10, "P-2": 1, "P-3": 10})
    answers = store.store(
        [new_order(("P-1", 1), ("P-2", 2)), new_order(("P-3", 4)), new_order(("P-1", 1), ("missing", 1))]
    )
    assert [row[1] for row in answers] == ["out_of_stock", "stored", "unknown_product"]
    assert store.stock() == {"P-1": 10, "P-2": 1, "P-3": 6}


def test_stock_to_the_last_piece(new_store: Callable[[str], Store]) -> None:
    """A batch may take all there is, and the next gets none."""
    store = new_store("one")
    store.new_products({"P-1": 5})
    verdicts = [row[1] for row in store.store([new_order(("P-1", 3)), new_order(("P-1", 2))])]
    assert verdicts == ["stored", "stored"]
    assert store.stock() == {"P-1": 0}
    assert [row[1] for row in store.store([new_order(("P-1", 1))])] == ["out_of_stock"]
    assert store.stock() == {"P-1": 0}


@pytest.mark.parametrize("analysed", [False, True], ids=["fresh", "analysed"])
def test_plans_made_for_small_tables(new_store: Callable[[str], Store], *, analysed: bool) -> None:
    """A connection keeps its plans: made while the tables are small they find each row by its whole key."""
    store = new_store("one")
    store.new_products({"P-1": 100, "P-2": 0})
    if analysed:
        store.store([new_order(("P-1", 1), key=f"k-{n}", customer=f"c-{n}") for n in range(60)])
        store.run("ANALYZE products, orders")
    for setting in (
        "LOAD 'auto_explain'",
        "SET auto_explain.log_min_duration = 0",
        "SET auto_explain.log_nested_statements = on",
        "SET client_min_messages = log",
    ):
        store.run(setting)
    store.connection.notices.clear()
    assert [row[1] for row in store.store([new_order(("P-1", 1), key="m")])] == ["stored"]
    assert [row[1] for row in store.store([new_order(("P-1", 1)), new_order(("P-2", 1))])] == [
        "stored",
        "out_of_stock",
    ]
    plans = "".join(store.connection.notices)
    scans = re.findall(r"Scan using (\w+) on \w+.*\n *(.*)", plans)
    assert {index for index, _ in scans} >= {"products_pkey", "orders_idempotency_key"}
    for index, condition in scans:
        columns = {
            "products_pkey": {"id"},
            "orders_pkey": {"principal", "id"},
            "orders_idempotency_key": {"principal", "idempotency_key"},
            "orders_by_customer": {"principal", "customer_id", "id"},
        }[index]
        assert condition.startswith("Index Cond: ")
        assert set(re.findall(r"\((\w+) = ", condition)) == columns
    for other in (
        "Seq Scan",
        "Backward",
        "Bitmap",
        "Hash Join",
        "Merge Join",
        "Function Scan on orders_of_batch",
    ):
        assert other not in plans


def test_faults_functions_compile_nothing(new_store: Callable[[str], Store]) -> None:
    """Every function that plans statements has the compiler off: up to PostgreSQL 18 it is on by default."""
    store = new_store("one")
    settings = store.run(
        "SELECT proname, proconfig FROM pg_proc WHERE pronamespace = 'one'::regnamespace"
        " AND prolang = (SELECT oid FROM pg_language WHERE lanname = 'plpgsql') AND proname NOT LIKE '%%oracle%%'"
    )
    assert {name for name, _ in settings} == {
        "store_orders_v1",
        "cancel_order_v1",
        "list_orders_v1",
        "claim_payments_v1",
        "book_payments_v1",
    }
    assert all("jit=off" in config for _, config in settings)


@pytest.mark.parametrize("first_of_all", [10, 0], ids=["at once", "one by one"])
async def test_products_are_locked_by_id(
    start_service: Callable[..., ServiceProcess], database_url: str, first_of_all: int
) -> None:
    """A batch that waits for a product holds those before it by id, and none behind it, in whatever order it asks."""
    service = start_service()
    # As text SKU-A10 comes first; as JSON keys the short ones do; in the table and in the order SKU-A9 does.
    for product_id, pieces in (("SKU-A9", 10), ("SKU-A5", 10), ("SKU-A10", first_of_all)):
        execute(
            database_url,
            "INSERT INTO products VALUES (%(id)s, 'A product', 100, 'EUR', %(pieces)s)",
            {"id": product_id, "pieces": pieces},
        )
    ledger = Ledger(database_url)
    async with OrderClient(service.url) as client:
        with locks.holding(database_url, "SELECT FROM products WHERE id = 'SKU-A5' FOR UPDATE"):
            storing = asyncio.create_task(
                client.place_batch(
                    [OrderRequest.keyed(("SKU-A9", 1), ("SKU-A5", 1)), OrderRequest.keyed(("SKU-A10", 1))]
                )
            )
            await locks.until_waiting(database_url)
            free = execute(
                database_url, "SELECT id FROM products WHERE id LIKE 'SKU-A%' FOR UPDATE SKIP LOCKED"
            )
        attempts = await storing
    assert free == [("SKU-A9",)]
    assert [attempt.status for attempt in attempts] == [201, 201 if first_of_all else 409]
    ledger.assert_clean(client.history)
