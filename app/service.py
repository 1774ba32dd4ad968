"""An order's life, top to bottom: price it, queue it, store it with its neighbours, answer.

The order of protection, outermost first: the deadline of each order; admission (before an order gets here); then, for
a whole batch at once, retry, breaker, and the time limit of one attempt (`resilience.Guard` composes those three).
"""

import asyncio
import time
from collections.abc import Sequence

import structlog

from app import repository
from app.batching import batch_processor
from app.catalogue import Catalogue, Priced
from app.db import Database
from app.deadlines import Deadlines
from app.domain import IncomingOrder, Order, OrderIds, OrderQuery, OrderStatus, PlacedOrder
from app.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidState,
    LockTimeout,
    NotFound,
    ServiceError,
    StatementRejected,
    UnknownProduct,
)
from app.locked_products import LockedProducts
from app.metrics import ORDER_BATCH_SIZE
from app.resilience import Guard
from app.settlement import Settlement
from app.suspects import Suspects
from app.timestamp import timestamp

_LEAST_SHARE_OF_DEADLINE = 0.05
# In one query: a thousand orders, which hold up the event loop for a few milliseconds.
_MOST_PAGES = 10
_log = structlog.get_logger("app.service")


class OrderService:
    """Takes orders, and answers for them."""

    def __init__(
        self,
        db: Database,
        catalogue: Catalogue,
        *,
        writes: Guard,
        reads: Guard,
        batch_max_size: int,
        batch_max_wait_seconds: float,
        request_deadline_seconds: float,
        first_status: OrderStatus = "confirmed",
    ) -> None:
        """Build the order path over *db*; nothing is opened here, and `drain` is all there is to close.

        An order is stored with *first_status*: `pending` where payments is asked about it afterwards (`cashier.py`).
        Reads have a guard of their own, and so go on where only writes fail.
        """
        self._db = db
        self._writes = writes
        self._reads = reads
        self._catalogue = catalogue
        self._deadline_seconds = request_deadline_seconds
        self._first_status = first_status
        self._ids = OrderIds()

        # One writer: batches grow by themselves while it commits; two would wait for each other's product rows.
        @batch_processor(max_size=batch_max_size, max_wait=batch_max_wait_seconds, writers=1)
        async def process_orders(orders: list[IncomingOrder]) -> Sequence[PlacedOrder | BaseException]:
            return await self._store(orders, one_by_one=False)

        # Orders that would make such a batch be undone: they have batches of their own, decided one by one.
        @batch_processor(max_size=batch_max_size, max_wait=batch_max_wait_seconds, writers=1)
        async def process_suspects(orders: list[IncomingOrder]) -> Sequence[PlacedOrder | BaseException]:
            return await self._store(orders, one_by_one=True)

        # Orders that are read at the same time share a round trip, and so do pages.
        @batch_processor(max_size=batch_max_size, max_wait=batch_max_wait_seconds, writers=2)
        async def get_order(asked: list[tuple[str, str]]) -> Sequence[Order | None]:
            return await reads.read(
                "get_order",
                lambda: repository.select_orders_by_id(db, asked),
                deadline=time.monotonic() + request_deadline_seconds,
            )

        @batch_processor(max_size=_MOST_PAGES, max_wait=batch_max_wait_seconds, writers=2)
        async def list_orders(queries: list[OrderQuery]) -> Sequence[list[Order]]:
            return await self._read_pages(queries)

        self._get_order = get_order
        self._list_orders = list_orders
        self._process_orders = process_orders
        self._process_suspects = process_suspects
        self._suspects = Suspects()
        self._locked = LockedProducts(
            lambda ids: repository.select_locked_products(db, ids), max_wait_seconds=batch_max_wait_seconds
        )
        self._deadlines = Deadlines()

    @property
    def queue_depth(self) -> int:
        """Orders waiting for their batch to start."""
        return len(self._process_orders) + len(self._process_suspects) + self._locked.waiting

    async def place(self, incoming: IncomingOrder) -> PlacedOrder:
        """Take one order from its parsed form to its commit.

        Raises:
            UnknownProduct, OutOfStock, IdempotencyMismatch: nothing was stored.
            Unavailable: its `outcome` says whether the order may be stored.
        """
        self._identify(incoming, await self._price(incoming))
        return await self._submit(incoming)

    async def place_all(
        self, batch: Sequence[IncomingOrder | ServiceError]
    ) -> list[PlacedOrder | ServiceError]:
        """Take the orders of one request, each for itself; those refused already keep their refusal.

        Returns:
            One result per order, in the same order; whatever went wrong with it is its own.
        """
        orders = [incoming for incoming in batch if isinstance(incoming, IncomingOrder)]
        # All are priced before the first is queued: who came first must not depend on what is in the cache.
        found = await self._price_all(orders)
        ready = []
        for incoming, priced in zip(orders, found, strict=True):
            if not isinstance(priced, BaseException):
                self._identify(incoming, priced)
                ready.append(incoming)
        stored = iter(await self._submit_all(ready))
        results = iter([priced if isinstance(priced, BaseException) else next(stored) for priced in found])
        return [
            incoming if isinstance(incoming, ServiceError) else _answer(next(results)) for incoming in batch
        ]

    async def _price(self, incoming: IncomingOrder) -> Priced:
        """Price the order."""
        self._writes.require_closed()
        return await self._catalogue.price(incoming.items, deadline=incoming.deadline)

    async def _price_all(self, orders: Sequence[IncomingOrder]) -> list[Priced | BaseException]:
        """As `_price` for each, without a task for an order whose products are cached."""
        found: list[Priced | BaseException | None] = [self._price_now(incoming) for incoming in orders]
        missing = [n for n, priced in enumerate(found) if priced is None]
        read = await asyncio.gather(*(self._price(orders[n]) for n in missing), return_exceptions=True)
        for n, priced in zip(missing, read, strict=True):
            found[n] = priced
        return [priced for priced in found if priced is not None]

    def _price_now(self, incoming: IncomingOrder) -> Priced | ServiceError | None:
        try:
            self._writes.require_closed()
            return self._catalogue.price_from_cache(incoming.items)
        except ServiceError as refusal:
            return refusal

    def _identify(self, incoming: IncomingOrder, priced: Priced) -> None:
        """Give the order its id, the moment before it is queued: ids rise as orders are queued, and so stored."""
        order_id, created_ns = self._ids.next()
        incoming.order = Order(
            order_id,
            incoming.customer_id,
            self._first_status,
            priced.currency,
            priced.total_cents,
            priced.lines,
            timestamp(created_ns),
        )
        incoming.priced_at = time.monotonic()

    async def _submit(self, incoming: IncomingOrder) -> PlacedOrder:
        """Queue the order, again where it came upon a lock, and wait for its result."""
        is_suspect = self._suspects.include(incoming)
        while True:
            if self._locked.concern(incoming):
                await self._locked.until_free(incoming)
            try:
                return await self._queue(incoming, is_suspect=is_suspect)
            except LockTimeout as refusal:
                is_known = bool(refusal.product_ids)
                if (is_suspect and not is_known) or time.monotonic() >= incoming.deadline:
                    raise
                is_suspect = is_suspect or not is_known
            incoming.started_at = 0.0

    async def _submit_all(self, orders: Sequence[IncomingOrder]) -> list[PlacedOrder | BaseException]:
        """As `_submit` for each, without a task for an order that comes upon no lock."""
        queued = [
            asyncio.ensure_future(self._submit(incoming))
            if self._locked.concern(incoming)
            else self._queue(incoming, is_suspect=self._suspects.include(incoming))
            for incoming in orders
        ]
        results = await asyncio.gather(*queued, return_exceptions=True)
        again = [
            n
            for n, result in enumerate(results)
            if isinstance(result, LockTimeout) and not isinstance(queued[n], asyncio.Task)
        ]
        if again:
            repeated = await asyncio.gather(*(self._submit(orders[n]) for n in again), return_exceptions=True)
            for n, result in zip(again, repeated, strict=True):
                results[n] = result
        return results

    def _queue(self, incoming: IncomingOrder, *, is_suspect: bool) -> asyncio.Future[PlacedOrder]:
        process = self._process_suspects if is_suspect else self._process_orders
        return self._deadlines.watch(incoming, process.submit(incoming))

    async def _store(
        self, batch: list[IncomingOrder], *, one_by_one: bool
    ) -> Sequence[PlacedOrder | BaseException]:
        """Store a batch: one attempt is one round trip and one commit, and one call of the breaker."""
        started_at = time.monotonic()
        for incoming in batch:
            incoming.started_at = started_at
        settlement = Settlement(batch)
        # What has next to no time left is not sent: nobody would wait for it.
        least = started_at + _LEAST_SHARE_OF_DEADLINE * self._deadline_seconds
        for incoming in batch:
            if incoming.deadline < least:
                settlement.settle(incoming, DeadlineExceeded())
        deadlines = [incoming.deadline for incoming in batch if incoming.deadline >= least]
        if not deadlines:
            return settlement.in_order()
        try:
            await self._writes.run(
                "store_orders",
                lambda remaining: self._settle(settlement, remaining, one_by_one=one_by_one),
                # The others are answered at their own deadlines, whatever the batch is doing then.
                deadline=max(deadlines),
            )
        except ServiceError as failure:
            settlement.fail_the_rest(failure)
        except Exception:  # noqa: BLE001 - logged; every caller must get an answer
            _log.exception("store_orders_failed", orders=len(batch))
            settlement.fail_the_rest(InternalError(outcome="unknown"))
        stored_at = time.monotonic()
        results = settlement.in_order()
        for incoming, result in zip(batch, results, strict=True):
            # The others were not sent.
            if incoming.deadline >= least:
                incoming.stored_at = stored_at
            self._learn(incoming, result)
        return results

    async def _settle(self, settlement: Settlement, remaining_seconds: float, *, one_by_one: bool) -> None:
        """Send what is not settled yet, until all of it is; usually once."""
        ends_at = time.monotonic() + remaining_seconds
        while orders := settlement.next_pass():
            await self._store_or_split(settlement, orders, ends_at, one_by_one=one_by_one)

    async def _store_or_split(
        self, settlement: Settlement, orders: list[IncomingOrder], ends_at: float, *, one_by_one: bool
    ) -> None:
        """Store *orders*; where one of them fails the batch, find it and spare its neighbours.

        A value that the database refuses is looked for at once; a lock is looked for among the suspects, where nobody
        else has to wait for it meanwhile.
        """
        remaining = ends_at - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded
        ORDER_BATCH_SIZE.observe(len(orders))
        try:
            answers = await repository.store_orders(
                self._db, orders, one_by_one=one_by_one, timeout_seconds=remaining
            )
        except (StatementRejected, LockTimeout) as refusal:
            if len(orders) == 1 or (isinstance(refusal, LockTimeout) and not one_by_one):
                for incoming in orders:
                    settlement.settle(incoming, refusal)
                return
            middle = len(orders) // 2
            await self._store_or_split(settlement, orders[:middle], ends_at, one_by_one=one_by_one)
            await self._store_or_split(settlement, orders[middle:], ends_at, one_by_one=one_by_one)
        except ServiceError as failure:
            if failure.outcome == "unknown":
                settlement.doubt(orders, failure)
            raise
        else:
            for incoming, answer in zip(orders, answers, strict=True):
                if answer is not None:
                    settlement.settle(incoming, answer)

    def _learn(self, incoming: IncomingOrder, result: PlacedOrder | ServiceError) -> None:
        """Take note of what a result says of the orders to come."""
        self._suspects.learn(incoming, result)
        if isinstance(result, LockTimeout):
            self._locked.add(result.product_ids)
        elif isinstance(result, UnknownProduct):
            self._catalogue.forget(result.product_ids)

    async def order(self, principal: str, order_id: str) -> Order:
        """One of *principal*'s orders.

        Raises:
            NotFound: it does not exist, or is another principal's.
        """
        order = await self._get_order((principal, order_id))
        if order is None:
            raise NotFound(f"there is no order {order_id}")
        return order

    async def orders(self, query: OrderQuery) -> list[Order]:
        """The page of orders that *query* asks for; one that may take long is read alone."""
        if query.goes_by_index:
            return await self._list_orders(query)
        return (await self._read_pages([query]))[0]

    async def _read_pages(self, queries: Sequence[OrderQuery]) -> list[list[Order]]:
        return await self._reads.read(
            "list_orders",
            lambda: repository.list_orders(self._db, queries),
            deadline=time.monotonic() + self._deadline_seconds,
        )

    async def cancel(self, principal: str, order_id: str) -> Order:
        """Cancel an order and give its stock back; repeatable.

        Raises:
            NotFound: there is no such order.
            InvalidState: its status does not lead to `cancelled`.
        """
        self._writes.require_closed()
        order = await self._writes.run(
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

    async def drain(self) -> None:
        """Wait until every order that was taken is answered."""
        await self._process_orders.drain()
        await self._process_suspects.drain()
        await self._locked.close()


def _answer(result: PlacedOrder | BaseException) -> PlacedOrder | ServiceError:
    """What one order of several is told; a defect is logged and told as such."""
    if isinstance(result, PlacedOrder | ServiceError):
        return result
    if not isinstance(result, Exception):
        raise result
    _log.error("place_failed", exc_info=result)
    return InternalError(outcome="unknown")
