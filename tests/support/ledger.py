"""What clients were told, held against what the database holds."""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import psycopg2

from tests.support.order_client import Attempt, OrderRequest

_SELECT_ORDERS = """
    SELECT id::text, customer_id, status, currency, total_cents, idempotency_key, xmin::text, lines
      FROM orders
"""


@dataclass(frozen=True, slots=True)
class StoredOrder:
    """A row of `orders`."""

    id: str
    customer_id: str
    status: str
    currency: str
    total_cents: int
    key: str | None
    commit: str  # the transaction that wrote this version of the row
    lines: list[list[Any]]  # product_id, quantity, unit_price_cents


@dataclass(slots=True)
class Findings:
    """What does not agree, one sentence each; all empty in a clean ledger."""

    lost: list[str] = field(default_factory=list)  # acknowledged, and not there or not the same
    unexpected: list[str] = field(default_factory=list)  # there, and nobody asked or it was refused for good
    doubled: list[str] = field(default_factory=list)  # more than one row for one order or one key
    stock: list[str] = field(default_factory=list)  # not conserved, or negative
    sums: list[str] = field(default_factory=list)  # a total that is not the sum of its lines


class Ledger:
    """Opened before the orders are sent; it keeps what there was at that moment."""

    def __init__(self, dsn: str) -> None:
        """Note the stock and the orders *dsn* holds now; the schema must be there (a service has started)."""
        self._dsn = dsn
        orders = self.orders()
        self._known = {order.id for order in orders}
        self._pieces = Counter(self.stock()) + _sold(orders)

    def moved_to(self, dsn: str) -> None:
        """Look from now on at the server that took the place of the first one."""
        self._dsn = dsn

    def stock(self) -> dict[str, int]:
        """The stock now, by product."""
        return dict(self._query("SELECT id, stock FROM products"))

    def orders(self) -> list[StoredOrder]:
        """Every order now."""
        return [StoredOrder(*row) for row in self._query(_SELECT_ORDERS)]

    def check(self, history: Iterable[Attempt]) -> Findings:
        """Hold *history* against the database; all attempts must have ended, and nothing else may have ordered."""
        found = Findings()
        attempts: dict[str, list[Attempt]] = defaultdict(list)
        for attempt in history:
            attempts[attempt.request.customer_id].append(attempt)
        orders = self.orders()
        new = [order for order in orders if order.id not in self._known]
        self._check_acknowledged(found, attempts, {order.id: order for order in new})
        self._check_stored(found, attempts, new)
        self._check_stock(found, orders)
        return found

    def assert_clean(self, history: Iterable[Attempt]) -> None:
        """Raise AssertionError with every finding."""
        found = self.check(history)
        assert found == Findings(), found

    def _check_acknowledged(
        self, found: Findings, attempts: dict[str, list[Attempt]], stored: dict[str, StoredOrder]
    ) -> None:
        for customer_id, of_one in attempts.items():
            ids = {attempt.order_id for attempt in of_one if attempt.acknowledged}
            if len(ids) > 1:
                found.doubled.append(f"{customer_id} was told the ids {sorted(ids)}")
            for attempt in of_one:
                if not attempt.acknowledged:
                    continue
                order = stored.get(attempt.order_id)
                if order is None:
                    found.lost.append(f"{customer_id}: {attempt.order_id} is not stored")
                elif _as_answered(order) != _essence(attempt.document):
                    found.lost.append(f"{customer_id}: stored {order}, acknowledged {attempt.document}")

    def _check_stored(
        self, found: Findings, attempts: dict[str, list[Attempt]], stored: list[StoredOrder]
    ) -> None:
        for customer_id, count in Counter(order.customer_id for order in stored).items():
            if count > 1:
                found.doubled.append(f"{customer_id} has {count} orders")
        for key, count in Counter(order.key for order in stored if order.key is not None).items():
            if count > 1:
                found.doubled.append(f"the key {key} has {count} orders")
        for order in stored:
            of_one = attempts.get(order.customer_id, [])
            if not of_one:
                found.unexpected.append(f"nobody asked for {order}")
            elif all(attempt.outcome == "not_executed" for attempt in of_one):
                found.unexpected.append(
                    f"{order.customer_id} was refused ({of_one[-1].error_type}) as not_executed: {order}"
                )
            elif not any(_is_of(order, attempt.request) for attempt in of_one):
                found.unexpected.append(f"not what was asked for: {order}")

    def _check_stock(self, found: Findings, stored: list[StoredOrder]) -> None:
        sold = _sold(stored)
        found.sums += [
            f"{order}"
            for order in stored
            if order.total_cents != sum(quantity * price for _, quantity, price in order.lines)
        ]
        for product_id, stock in self.stock().items():
            pieces = self._pieces[product_id]
            if stock < 0 or stock + sold[product_id] != pieces:
                found.stock.append(
                    f"{product_id}: {stock} left and {sold[product_id]} sold, of {pieces} at the start"
                )

    def _query(self, sql: str) -> list[tuple[Any, ...]]:
        with contextlib.closing(psycopg2.connect(self._dsn)) as connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall())


def _sold(orders: Iterable[StoredOrder]) -> Counter[str]:
    """The pieces that orders hold, by product; a cancelled or declined one gave them back."""
    sold: Counter[str] = Counter()
    for order in orders:
        if order.status in {"pending", "confirmed"}:
            for product_id, quantity, _ in order.lines:
                sold[product_id] += quantity
    return sold


def _is_of(order: StoredOrder, request: OrderRequest) -> bool:
    return order.key == request.key and [(line[0], line[1]) for line in order.lines] == list(request.items)


def _as_answered(order: StoredOrder) -> tuple[Any, ...]:
    return order.id, order.customer_id, order.currency, order.total_cents, order.lines


def _essence(document: dict[str, Any]) -> tuple[Any, ...]:
    """What of an answer never changes (the status may since have)."""
    lines = [[item["product_id"], item["quantity"], item["unit_price_cents"]] for item in document["items"]]
    return document["id"], document["customer_id"], document["currency"], document["total_cents"], lines
