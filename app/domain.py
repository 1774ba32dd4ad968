"""What an order is, in the business's own words: no HTTP, no SQL, no metrics."""

import hashlib
import random
import time
from collections.abc import Callable, Sequence
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
    """An order on its way: what was asked for, and when it passed each stage (monotonic seconds; 0.0: not yet)."""

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
        return hashlib.sha256("\x00\x00".join(parts).encode(errors="surrogatepass")).hexdigest()


class OrderQuery(NamedTuple):
    """A page of a principal's orders: at most *limit*, newest first, older than the order id *before*."""

    principal: str
    customer_id: str | None
    status: OrderStatus | None
    before: str | None
    limit: int

    @property
    def goes_by_index(self) -> bool:
        """True where an index leads to the page's rows and no others: however many orders there are, it is cheap."""
        return self.status is None or (self.status != "confirmed" and self.customer_id is None)


class PlacedOrder(NamedTuple):
    """An acknowledged order; `replayed` when an earlier request had stored it."""

    order: Order
    replayed: bool


class OrderIds:
    """The ids of new orders: UUIDv7 (RFC 9562), each greater than the one before, as text and as a number.

    48 bits of Unix milliseconds, then random ones; within a millisecond the last 48 count up in random steps (6.2,
    method 2). A clock that is set back is not followed: time stands still until it has caught up.
    """

    __slots__ = ("_clock", "_head", "_milliseconds", "_now_ns", "_random_bits", "_tail")

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        """Read the time from *clock*, in nanoseconds since 1970."""
        self._clock = clock
        # Seeded by the system, which would take a system call for each: an id is no secret, and must only be unique.
        self._random_bits = random.Random().getrandbits  # noqa: S311
        self._now_ns = 0
        self._milliseconds = -1
        self._head = ""
        self._tail = 0

    def next(self) -> tuple[str, int]:
        """A new id, and the time it was made at, in nanoseconds; neither is ever below the one before."""
        self._now_ns = now_ns = max(self._clock(), self._now_ns)
        milliseconds = now_ns // 1_000_000
        self._tail += 1 + self._random_bits(24)
        if milliseconds > self._milliseconds:
            self._begin(milliseconds)
        elif self._tail >> 48:
            self._begin(self._milliseconds + 1)
        return f"{self._head}{self._tail:012x}", now_ns

    def _begin(self, milliseconds: int) -> None:
        self._milliseconds = milliseconds
        bits = self._random_bits(74)
        variant = 0x8000 | bits >> 48 & 0x3FFF
        time_digits = f"{milliseconds & 0xFFFFFFFFFFFF:012x}"
        self._head = f"{time_digits[:8]}-{time_digits[8:]}-7{bits >> 62:03x}-{variant:04x}-"
        self._tail = bits & 0x7FFFFFFFFFFF  # half of the range is left to count up
