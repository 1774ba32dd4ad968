"""The database in the service's words: one function per query, the SQL beside it."""

from collections.abc import Sequence
from typing import Any

import orjson

from app.db import Database
from app.domain import IncomingOrder, Order, OrderQuery, PlacedOrder, Product, statuses_that_may_become
from app.errors import (
    DatabaseError,
    IdempotencyMismatch,
    InternalError,
    LockTimeout,
    OutOfStock,
    ServiceError,
    StatementRejected,
    UnknownProduct,
)
from app.timestamp import from_postgres

STORE_ORDERS = """
    SELECT n, verdict, id::text, currency, total_cents, lines::text, (created_at AT TIME ZONE 'UTC')::text
      FROM store_orders_v1(%(batch)s, %(wanted)s, %(one_by_one)s, %(pays)s)
"""

CANCEL_ORDER = """
    SELECT id::text, customer_id, status, currency, total_cents, lines::text,
           (created_at AT TIME ZONE 'UTC')::text
      FROM cancel_order_v1(%(principal)s, %(id)s, %(cancellable)s)
"""

# A commit that leaves nothing behind, and fails for whatever fails a batch:
# - a read-only server refuses the UPDATE (25006), which needs no more than the service's own rights;
# - a full disk has no room for the 1.4 MB that do not fit in work_mem (53100);
# - the message makes the commit write WAL, flush it, and wait for the standbys it has to wait for. A commit whose
#   standby is away cannot be ended from here, neither by a timeout nor by closing its connection: while one of
#   ours hangs so, there is no second one.
PROVE_WRITES = """
    SET LOCAL work_mem = '64kB';
    SELECT count(*) FROM generate_series(1, 100000);
    UPDATE orders SET status = status WHERE false;
    SELECT pg_logical_emit_message(true, 'order-service', '')
     WHERE NOT EXISTS (SELECT FROM pg_stat_activity
                        WHERE usename = current_user AND wait_event = 'SyncRep'
                          AND clock_timestamp() - query_start > current_setting('statement_timeout')::interval)
"""

# LIMIT keeps a plan that is made for small tables from reading them whole.
SELECT_ORDERS_BY_ID = """
    SELECT asked.n, o.id, o.customer_id, o.status, o.currency, o.total_cents, o.lines, o.created_at
      FROM unnest(%(principals)s::text[], %(ids)s::uuid[]) WITH ORDINALITY AS asked (principal, id, n)
     CROSS JOIN LATERAL (SELECT id::text, customer_id, status, currency, total_cents, lines::text,
                                (created_at AT TIME ZONE 'UTC')::text AS created_at
                           FROM orders
                          WHERE orders.principal = asked.principal AND orders.id = asked.id
                          LIMIT 1) o
"""

LIST_ORDERS = """
    SELECT n, id::text, customer_id, status, currency, total_cents, lines::text,
           (created_at AT TIME ZONE 'UTC')::text
      FROM jsonb_array_elements(%(queries)s::jsonb) WITH ORDINALITY AS asked (query, n)
     CROSS JOIN LATERAL list_orders_v1(query ->> 0, query ->> 1, query ->> 2, (query ->> 3)::uuid, (query -> 4)::int)
"""

SELECT_PRODUCTS_BY_ID = """
    SELECT id, name, price_cents, currency
      FROM products
     WHERE id = ANY (%(ids)s)
"""

SELECT_PRODUCTS = """
    SELECT id, name, price_cents, currency
      FROM products
     WHERE id > %(after)s
     ORDER BY id
     LIMIT %(limit)s
"""

SELECT_LOCKED_PRODUCTS = """
      WITH free AS (
           SELECT id
             FROM products
            WHERE id = ANY (%(ids)s)
              FOR NO KEY UPDATE SKIP LOCKED
           )
    SELECT id
      FROM products
     WHERE id = ANY (%(ids)s)
       AND NOT EXISTS (SELECT FROM free WHERE free.id = products.id)
"""

# The verdicts that name products.
_REFUSALS: dict[str, type[UnknownProduct | OutOfStock | LockTimeout]] = {
    "unknown_product": UnknownProduct,
    "out_of_stock": OutOfStock,
    "locked": LockTimeout,
}


async def store_orders(
    db: Database, batch: Sequence[IncomingOrder], *, one_by_one: bool, timeout_seconds: float
) -> list[PlacedOrder | ServiceError | None]:
    """Store *batch* in one round trip and one commit.

    Args:
        db: the pool.
        batch: priced orders in order of arrival, all of one status; no (principal, idempotency key) twice.
        one_by_one: decide each for itself at once, where a common attempt is likely to be undone.
        timeout_seconds: bound on the round trip.

    Returns:
        For each order, in order: placed; why it was refused (nothing of it is stored); or None where it gave way to an
        order that turned out to be stored already (nothing of it is stored: ask again).

    Raises:
        LockTimeout: another transaction holds the idempotency key of one of them; nothing is stored.
        StatementRejected: an order of the batch cannot be written or stored, and none was.
        ServiceError: as of `Database.run`.
    """
    try:
        orders = [_priced(incoming) for incoming in batch]
        parameters = {
            **_batch_parameters(batch, orders),
            "one_by_one": one_by_one,
            "pays": orders[0].status == "pending",
        }
    except Exception as exc:  # whatever it is: nothing was sent, and it is one order's
        raise StatementRejected from exc
    rows = await db.run(STORE_ORDERS, parameters, timeout_seconds=timeout_seconds)
    if len(rows) == 1 and rows[0][0] is None:
        return [PlacedOrder(order, replayed=False) for order in orders]
    if len(rows) != len(orders):
        raise InternalError("the database answered for another number of orders", outcome="unknown")
    results: list[PlacedOrder | ServiceError | None] = [None] * len(orders)
    for n, verdict, original, currency, total_cents, lines, created_at in rows:
        order = orders[n - 1]
        if verdict == "stored":
            results[n - 1] = PlacedOrder(order, replayed=False)
        elif verdict in ("replayed", "replayed_pending"):
            results[n - 1] = PlacedOrder(
                order._replace(
                    id=original,
                    status="confirmed" if verdict == "replayed" else "pending",
                    currency=currency,
                    total_cents=total_cents,
                    lines=orjson.loads(lines),
                    created_at=from_postgres(created_at),
                ),
                replayed=True,
            )
        elif verdict == "mismatch":
            results[n - 1] = IdempotencyMismatch()
        elif verdict in _REFUSALS:
            results[n - 1] = _REFUSALS[verdict](product_ids=orjson.loads(lines))
    return results


async def prove_writes(db: Database) -> None:
    """Prove that orders can be stored; raises what keeps them from it."""
    if not await db.run(PROVE_WRITES):
        raise DatabaseError("commits wait for a standby that is away")


def _priced(incoming: IncomingOrder) -> Order:
    if incoming.order is None:
        raise InternalError("an order reached the database without a price")
    return incoming.order


def _batch_parameters(batch: Sequence[IncomingOrder], orders: Sequence[Order]) -> dict[str, str]:
    rows = []
    wanted: dict[str, int] = {}
    for incoming, order in zip(batch, orders, strict=True):
        rows.append(
            (
                incoming.principal,
                order.id,
                order.customer_id,
                order.currency,
                order.total_cents,
                order.lines,
                order.created_at,
                incoming.idempotency_key,
                incoming.fingerprint(),
            )
        )
        for product_id, quantity in incoming.items:
            wanted[product_id] = wanted.get(product_id, 0) + quantity
    # As JSON: psycopg2 adapts an array value by value, which costs the client ten times as much.
    return {"batch": orjson.dumps(rows).decode(), "wanted": orjson.dumps(wanted).decode()}


async def select_orders_by_id(db: Database, asked: Sequence[tuple[str, str]]) -> list[Order | None]:
    """The orders *asked* for as (principal, id), in that order; None where there is none, or another principal's."""
    principals, ids = zip(*asked, strict=True)
    # As one text each: neither a principal nor an id holds what an array's text would have to quote.
    parameters = {"principals": f"{{{','.join(principals)}}}", "ids": f"{{{','.join(ids)}}}"}
    found: list[Order | None] = [None] * len(asked)
    for n, *row in await db.run(SELECT_ORDERS_BY_ID, parameters):
        found[n - 1] = _order(row)
    return found


async def list_orders(db: Database, queries: Sequence[OrderQuery]) -> list[list[Order]]:
    """The pages that *queries* ask for, in their order."""
    pages: list[list[Order]] = [[] for _ in queries]
    for n, *row in await db.run(LIST_ORDERS, {"queries": orjson.dumps(list(map(tuple, queries))).decode()}):
        pages[n - 1].append(_order(row))
    return pages


async def cancel_order(
    db: Database, principal: str, order_id: str, *, timeout_seconds: float
) -> Order | None:
    """Cancel the order if its status allows it; the order as it then is, or None where there is no such order."""
    rows = await db.run(
        CANCEL_ORDER,
        {"principal": principal, "id": order_id, "cancellable": statuses_that_may_become("cancelled")},
        timeout_seconds=timeout_seconds,
    )
    return _order(rows[0]) if rows else None


async def select_products_by_id(db: Database, ids: Sequence[str]) -> dict[str, Product]:
    """The products among *ids* that exist, by id."""
    rows = await db.run(SELECT_PRODUCTS_BY_ID, {"ids": list(ids)})
    return {row[0]: Product(*row) for row in rows}


async def select_locked_products(db: Database, ids: Sequence[str]) -> set[str]:
    """The products among *ids* that another transaction holds now."""
    return {row[0] for row in await db.run(SELECT_LOCKED_PRODUCTS, {"ids": list(ids)})}


async def select_products(db: Database, *, after: str, limit: int) -> list[Product]:
    """At most *limit* products by id, all behind the id *after* ("" for the first page)."""
    return [Product(*row) for row in await db.run(SELECT_PRODUCTS, {"after": after, "limit": limit})]


def _order(row: Sequence[Any]) -> Order:
    """An order from a row with its id, lines and time (in UTC) as text: the driver takes longer for values."""
    order_id, customer_id, status, currency, total_cents, lines, created_at = row
    return Order(
        order_id, customer_id, status, currency, total_cents, orjson.loads(lines), from_postgres(created_at)
    )
