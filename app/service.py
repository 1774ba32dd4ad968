"""An order's life, top to bottom: price it, queue it, store it with its neighbours, answer.

The order of protection, outermost first: the deadline of each order; admission (before an order gets here); then, for
a whole batch at once, retry, breaker, and the time limit of one attempt (`resilience.Guard` composes those three).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import structlog

from app import repository
from app.batching import MicroBatcher
from app.cache import AsyncCache, Cached
from app.db import Database
from app.domain import Line, Order, OrderStatus, PendingOrder, PlacedOrder, Product, new_order_id
from app.errors import (
    CircuitOpen,
    DeadlineExceeded,
    InternalError,
    InvalidState,
    NotFound,
    ServiceError,
    StatementRejected,
    UnknownProduct,
)
from app.metrics import ORDER_BATCH_SIZE
from app.resilience import Guard
from app.settlement import Settlement
from app.timestamp import timestamp

_LEAST_SHARE_OF_DEADLINE = 0.05
_R = TypeVar("_R")
_log = structlog.get_logger("app.service")


class OrderService:
    """Takes orders, and answers for them."""

    def __init__(
        self,
        db: Database,
        guard: Guard,
        *,
        batch_max_size: int,
        batch_max_wait_seconds: float,
        cache_ttl_seconds: float,
        cache_max_size: int,
        request_deadline_seconds: float,
    ) -> None:
        """Build the order path over *db*; nothing is opened here, and `drain` is all there is to close."""
        self._db = db
        self._guard = guard
        self._deadline_seconds = request_deadline_seconds
        # One writer: batches grow by themselves while it commits; two would wait for each other's product rows.
        self._batcher: MicroBatcher[PendingOrder, PlacedOrder] = MicroBatcher(
            self._store, max_size=batch_max_size, max_wait=batch_max_wait_seconds, writers=1
        )
        self._product_loads: MicroBatcher[str, Product] = MicroBatcher(
            self._load_products, max_size=100, max_wait=request_deadline_seconds, writers=2
        )
        self.products: AsyncCache[str, Product] = AsyncCache(
            self._product_loads.submit, name="products", ttl=cache_ttl_seconds, maxsize=cache_max_size
        )
        self.product_pages: AsyncCache[tuple[str, int], Sequence[Product]] = AsyncCache(
            self._load_product_page, name="product_pages", ttl=cache_ttl_seconds, maxsize=1000
        )

    @property
    def queue_depth(self) -> int:
        """Orders waiting for their batch to start."""
        return len(self._batcher)

    async def place(self, pending: PendingOrder) -> PlacedOrder:
        """Take one order from its parsed form to its commit.

        Raises:
            UnknownProduct, OutOfStock, IdempotencyMismatch: nothing was stored.
            Unavailable: its `outcome` says whether the order may be stored.
        """
        await self._prepare(pending)
        return await self._batcher.submit(pending)

    async def place_all(
        self, batch: Sequence[PendingOrder | ServiceError]
    ) -> list[PlacedOrder | ServiceError]:
        """Take the orders of one request, each for itself; those refused already keep their refusal.

        Returns:
            One result per order, in the same order; whatever went wrong with it is its own.
        """
        orders = [pending for pending in batch if isinstance(pending, PendingOrder)]
        # All are priced before the first is queued: who came first must not depend on what is in the cache.
        failures = await asyncio.gather(*map(self._prepare, orders), return_exceptions=True)
        ready = [pending for pending, failure in zip(orders, failures, strict=True) if failure is None]
        stored = iter(await asyncio.gather(*map(self._batcher.submit, ready), return_exceptions=True))
        results = iter([failure or next(stored) for failure in failures])
        return [pending if isinstance(pending, ServiceError) else _answer(next(results)) for pending in batch]

    async def _prepare(self, pending: PendingOrder) -> None:
        """Price the order, so that it can be queued."""
        self._require_database()
        pending.order = self._price(pending) or await self._price_from_database(pending)
        pending.priced_at = time.monotonic()

    def _price(self, pending: PendingOrder) -> Order | None:
        """The order at the prices of the cached catalogue; None where a product is not cached."""
        lines: list[Line] = []
        total_cents, currency = 0, ""
        for product_id, quantity in pending.items:
            product = self.products.peek(product_id)
            if product is None:
                return None
            lines.append((product_id, quantity, product.price_cents))
            total_cents += quantity * product.price_cents
            currency = product.currency
        return Order(
            new_order_id(), pending.customer_id, "confirmed", currency, total_cents, lines, timestamp()
        )

    async def _price_from_database(self, pending: PendingOrder) -> Order:
        """As `_price`, after what is missing was read."""
        wanted = [product_id for product_id, _ in pending.items]
        try:
            async with asyncio.timeout(pending.deadline - time.monotonic()):
                found = await asyncio.gather(*map(self.products.get, wanted), return_exceptions=True)
        except TimeoutError as exc:
            raise DeadlineExceeded from exc
        for product_id, product in zip(wanted, found, strict=True):
            if isinstance(product, NotFound):
                raise UnknownProduct(f"there is no product {product_id!r}") from product
            if isinstance(product, BaseException):
                raise product
        products = [product for product in found if isinstance(product, Product)]
        lines: list[Line] = [
            (product.id, quantity, product.price_cents)
            for product, (_, quantity) in zip(products, pending.items, strict=True)
        ]
        total_cents = sum(quantity * unit_price_cents for _, quantity, unit_price_cents in lines)
        return Order(
            new_order_id(),
            pending.customer_id,
            "confirmed",
            products[0].currency,
            total_cents,
            lines,
            timestamp(),
        )

    async def _store(self, batch: list[PendingOrder]) -> Sequence[PlacedOrder | BaseException]:
        """Store a batch: one attempt is one round trip and one commit, and one call of the breaker."""
        started_at = time.monotonic()
        for pending in batch:
            pending.started_at = started_at
        settlement = Settlement(batch)
        # What has next to no time left is not sent: it would cut its neighbours' time short, too.
        least = started_at + _LEAST_SHARE_OF_DEADLINE * self._deadline_seconds
        for pending in batch:
            if pending.deadline < least:
                settlement.settle(pending, DeadlineExceeded())
        deadlines = [pending.deadline for pending in batch if pending.deadline >= least]
        if not deadlines:
            return settlement.in_order()
        try:
            await self._guard.run(
                "store_orders", lambda remaining: self._settle(settlement, remaining), deadline=min(deadlines)
            )
        except ServiceError as failure:
            settlement.fail_the_rest(failure)
        except Exception:  # noqa: BLE001 - logged; every caller must get an answer
            _log.exception("store_orders_failed", orders=len(batch))
            settlement.fail_the_rest(InternalError(outcome="unknown"))
        stored_at = time.monotonic()
        for pending in batch:
            pending.stored_at = stored_at
        return settlement.in_order()

    async def _settle(self, settlement: Settlement, remaining_seconds: float) -> None:
        """Send what is not settled yet, until all of it is; usually once."""
        ends_at = time.monotonic() + remaining_seconds
        while orders := settlement.next_pass():
            await self._store_or_split(settlement, orders, ends_at)

    async def _store_or_split(
        self, settlement: Settlement, orders: list[PendingOrder], ends_at: float
    ) -> None:
        """Store *orders*; where the database refuses a value, find the order and spare its neighbours."""
        remaining = ends_at - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded
        ORDER_BATCH_SIZE.observe(len(orders))
        try:
            answers = await repository.store_orders(self._db, orders, timeout_seconds=remaining)
        except StatementRejected as refusal:
            if len(orders) == 1:
                settlement.settle(orders[0], refusal)
                return
            middle = len(orders) // 2
            await self._store_or_split(settlement, orders[:middle], ends_at)
            await self._store_or_split(settlement, orders[middle:], ends_at)
        else:
            for pending, answer in zip(orders, answers, strict=True):
                if answer is not None:
                    settlement.settle(pending, answer)

    async def order(self, principal: str, order_id: str) -> Order:
        """One of *principal*'s orders.

        Raises:
            NotFound: it does not exist, or is another principal's.
        """
        order = await self._read("get_order", lambda: repository.select_order(self._db, principal, order_id))
        if order is None:
            raise NotFound(f"there is no order {order_id}")
        return order

    async def orders(
        self,
        principal: str,
        *,
        customer_id: str | None,
        status: OrderStatus | None,
        before: str | None,
        limit: int,
    ) -> list[Order]:
        """*principal*'s orders, newest first, older than the order id *before*."""
        return await self._read(
            "list_orders",
            lambda: repository.select_orders(
                self._db, principal, customer_id=customer_id, status=status, before=before, limit=limit
            ),
        )

    async def cancel(self, principal: str, order_id: str) -> Order:
        """Cancel an order and give its stock back; repeatable.

        Raises:
            NotFound: there is no such order.
            InvalidState: its status does not lead to `cancelled`.
        """
        self._require_database()
        order = await self._guard.run(
            "cancel_order",
            lambda remaining: repository.cancel_order(
                self._db, principal, order_id, timeout_seconds=remaining
            ),
            deadline=time.monotonic() + self._deadline_seconds,
        )
        if order is None:
            raise NotFound(f"there is no order {order_id}")
        if order.status != "cancelled":
            raise InvalidState(f"an order that is {order.status} cannot be cancelled")
        return order

    async def product(self, product_id: str) -> Cached[Product]:
        """A product from the cache, stale while the database is away.

        Raises:
            NotFound: there is no such product.
        """
        return await self.products.lookup(product_id)

    async def product_page(self, *, after: str, limit: int) -> Cached[Sequence[Product]]:
        """Products by id behind *after*, from the cache, stale while the database is away."""
        return await self.product_pages.lookup((after, limit))

    async def drain(self) -> None:
        """Wait until every order that was taken is answered."""
        await self._batcher.drain()

    async def _load_products(self, ids: list[str]) -> Sequence[Product | BaseException]:
        found = await self._read("get_products", lambda: repository.select_products_by_id(self._db, ids))
        return [
            found.get(product_id) or NotFound(f"there is no product {product_id!r}") for product_id in ids
        ]

    async def _load_product_page(self, key: tuple[str, int]) -> Sequence[Product]:
        after, limit = key
        return await self._read(
            "list_products", lambda: repository.select_products(self._db, after=after, limit=limit)
        )

    async def _read(self, operation: str, query: Callable[[], Awaitable[_R]]) -> _R:
        self._require_database()
        return await self._guard.run(
            operation, lambda _: query(), deadline=time.monotonic() + self._deadline_seconds
        )

    def _require_database(self) -> None:
        """Refuse at once while the database is known to be away; whether it is back is not tried on a customer."""
        breaker = self._guard.breaker
        if breaker.state != "closed":
            raise CircuitOpen(retry_after_seconds=breaker.retry_after_seconds)


def _answer(result: PlacedOrder | BaseException) -> PlacedOrder | ServiceError:
    """What one order of several is told; a defect is logged and told as such."""
    if isinstance(result, PlacedOrder | ServiceError):
        return result
    if not isinstance(result, Exception):
        raise result
    _log.error("place_failed", exc_info=result)
    return InternalError(outcome="unknown")
