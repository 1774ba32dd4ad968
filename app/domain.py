"""What an order is, in the business's own words: no HTTP, no SQL, no metrics."""

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

OrderStatus = Literal["pending", "confirmed", "declined", "cancelled"]

# The state machine: from each status, the statuses an order may enter.
TRANSITIONS: dict[OrderStatus, frozenset[OrderStatus]] = {
    "pending": frozenset({"confirmed", "declined", "cancelled"}),
    "confirmed": frozenset({"cancelled"}),
    "declined": frozenset(),
    "cancelled": frozenset(),
}


def statuses_that_may_become(status: OrderStatus) -> list[OrderStatus]:
    """The statuses from which an order may enter *status*."""
    return [source for source, targets in TRANSITIONS.items() if status in targets]


class Product(NamedTuple):
    """A product as the catalogue knows it; its stock is the database's alone."""

    id: str
    name: str
    price_cents: int
    currency: str


# One line of an order, at the price it was sold for: (product_id, quantity, unit_price_cents).
Line = tuple[str, int, int]


class Order(NamedTuple):
    """A stored order. Money is integer cents; `created_at` is ISO 8601 in UTC with microseconds."""

    id: str
    customer_id: str
    status: OrderStatus
    currency: str
    total_cents: int
    lines: Sequence[Line]
    created_at: str


@dataclass(slots=True, eq=False)
class IncomingOrder:
    """An order on its way: what was asked for, and when it passed each stage (monotonic seconds)."""

    principal: str
    customer_id: str
    items: Sequence[tuple[str, int]]  # (product_id, quantity)
    idempotency_key: str | None
    arrived_at: float
    parsed_at: float
    deadline: float
    priced_at: float = 0.0
    started_at: float = 0.0  # its batch began
    stored_at: float = 0.0
    order: Order | None = field(default=None)  # what will be stored, once it is priced

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the parsed order: equal for equal orders, however they were spelled or sent."""
        parts = [self.customer_id, *(f"{product_id}\x00{quantity}" for product_id, quantity in self.items)]
        return hashlib.sha256("\x00\x00".join(parts).encode()).hexdigest()


class PlacedOrder(NamedTuple):
    """An acknowledged order; `replayed` when an earlier request had stored it."""

    order: Order
    replayed: bool


def new_order_id(now_ns: int | None = None) -> str:
    """A UUIDv7 (RFC 9562): 48 bits of Unix milliseconds, then 74 random bits; sorts by time."""
    milliseconds = (time.time_ns() if now_ns is None else now_ns) // 1_000_000
    digits = f"{milliseconds & 0xFFFFFFFFFFFF:012x}{os.urandom(10).hex()}"
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-7{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"
