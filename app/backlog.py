"""Orders about which payments is still to be asked, as the database keeps them: claimed, booked, counted."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import orjson

from app.db import Database

Verdict = Literal["authorised", "declined", "voided", "later"]

CLAIM = """
    SELECT principal, id, status, currency, total_cents
      FROM claim_payments_v1(%(places)s, %(lease_seconds)s * interval '1 s')
"""

BOOK = "SELECT book_payments_v1(%(results)s)"

# Counted up to a bound: among very many, how many matters no more.
COUNT = """
    SELECT count(*),
           coalesce(extract(epoch FROM now() - min(created_at) FILTER (WHERE status = 'pending')), 0)::float8
      FROM (SELECT created_at, status
              FROM orders
             WHERE payment_due < 'infinity'
             ORDER BY payment_due
             LIMIT 100000) due
"""


class Due(NamedTuple):
    """An order about which payments is to be asked: to authorise it, or to void it where it is cancelled."""

    principal: str
    order_id: str
    status: str
    currency: str
    total_cents: int


class Result(NamedTuple):
    """What payments said of an order; `later` where it said nothing definite, to be asked again in *seconds*."""

    due: Due
    verdict: Verdict
    seconds: float = 0


async def claim(db: Database, *, places: int, lease_seconds: float, timeout_seconds: float) -> list[Due]:
    """Take at most *places* orders, those that have been due longest; nobody else gets them for *lease_seconds*."""
    rows = await db.run(
        CLAIM, {"places": places, "lease_seconds": lease_seconds}, timeout_seconds=timeout_seconds
    )
    return [Due(row[0], str(row[1]), *row[2:]) for row in rows]


async def book(db: Database, results: Sequence[Result], *, timeout_seconds: float) -> None:
    """Move orders on by what payments said, in one commit, and give back the stock of those declined; repeatable."""
    rows = [(each.due.principal, each.due.order_id, each.verdict, each.seconds) for each in results]
    await db.run(BOOK, {"results": orjson.dumps(rows).decode()}, timeout_seconds=timeout_seconds)


async def count(db: Database) -> tuple[int, float]:
    """The orders that are due, at most 100,000, and the age in seconds of the oldest that is pending."""
    ((orders, seconds),) = await db.run(COUNT)
    return orders, seconds
