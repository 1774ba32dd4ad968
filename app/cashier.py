"""The cashier: asks payments about the orders that are due, many at a time, and books what it says.

It works beside the order path, which knows nothing of it: payments may be slow or away, orders are stored all the same.
Several replicas share one backlog, since each order is leased to one of them at a time. Whatever dies when, the lease
ends and another replica asks again: payments answers the same question alike, and a booking that came first stands.
"""

import asyncio
import contextlib
import random
import time

import structlog

from app import backlog
from app.backlog import Due, Result, Verdict
from app.batching import batch_processor
from app.db import Database
from app.errors import CircuitOpen, DeadlineExceeded, ServiceError
from app.metrics import PAYMENTS, PAYMENTS_OLDEST_PENDING_SECONDS, PAYMENTS_PENDING
from app.payments import Payments, PaymentsAway, PaymentsRefused
from app.resilience import Guard

_POLL_SECONDS = 0.2  # how often an empty backlog is looked at
_COUNT_SECONDS = 1.0  # how often the backlog is counted, at most
_COUNT_SHARE = 0.05  # of the time: counting a long backlog must not cost what is missing to work it off
_BOOK_SIZE = 100
# An order without an answer is asked about again between these: replicas that failed together do not return together.
_AGAIN_SECONDS = (1.0, 5.0)
_REFUSED_SECONDS = 60.0  # a defect does not go away soon
_log = structlog.get_logger("app.cashier")


class Cashier:
    """Settles what is due; `work` and `watch` are the steps of two lasting tasks."""

    def __init__(
        self,
        db: Database,
        payments: Payments,
        *,
        writes: Guard,
        asks: Guard,
        max_in_flight: int,
        deadline_seconds: float,
    ) -> None:
        """Build it over *db*; nothing is opened here.

        Args:
            db: where the backlog is.
            payments: whom to ask.
            writes: guards the database, as it does for orders.
            asks: guards payments: its breaker, its retries and their budget.
            max_in_flight: orders being asked about at once.
            deadline_seconds: for all attempts at one order, from its claim. The lease is twice as long, so that no
                attempt outlives it.
        """
        self._db = db
        self._payments = payments
        self._writes = writes
        self._asks = asks
        self._max_in_flight = max_in_flight
        self._deadline_seconds = deadline_seconds
        self._working: set[asyncio.Task[None]] = set()
        self._one_is_done = asyncio.Event()

        @batch_processor(max_size=_BOOK_SIZE, max_wait=deadline_seconds, writers=1)
        async def book(results: list[Result]) -> list[None]:
            self._writes.require_closed()
            await self._writes.run(
                "book_payments",
                lambda remaining: backlog.book(db, results, timeout_seconds=remaining),
                deadline=time.monotonic() + deadline_seconds,
            )
            return [None] * len(results)

        self._book = book

    async def work(self) -> None:
        """Claim what there is room for, and start on it; wait where there is no room or nothing to do."""
        while len(self._working) > self._max_in_flight // 2:  # then half of the places are worth a claim
            self._one_is_done.clear()
            await self._one_is_done.wait()
        places = self._max_in_flight - len(self._working)
        breaker = self._asks.breaker
        if breaker.state != "closed":
            if (pause_seconds := breaker.retry_after_seconds) > 0:
                await asyncio.sleep(min(pause_seconds, 1.0))
                return
            places = 1  # the trial
        claimed_at = time.monotonic()  # before the database begins the lease
        try:
            self._writes.require_closed()
            claimed = await backlog.claim(
                self._db,
                places=places,
                lease_seconds=2 * self._deadline_seconds,
                timeout_seconds=self._deadline_seconds,
            )
        except ServiceError:  # the database is away, as the orders' own breaker and log tell
            await asyncio.sleep(1.0)
            return
        for due in claimed:
            task = asyncio.create_task(self._settle(due, claimed_at + self._deadline_seconds))
            self._working.add(task)
            task.add_done_callback(self._done)
        if not claimed:
            await asyncio.sleep(_POLL_SECONDS)

    async def watch(self) -> None:
        """Publish how much is due, once a second, or less often where that takes long."""
        started_at = time.monotonic()
        with contextlib.suppress(ServiceError):  # then the last figures stand
            orders, seconds = await backlog.count(self._db)
            PAYMENTS_PENDING.set(orders)
            PAYMENTS_OLDEST_PENDING_SECONDS.set(seconds)
        await asyncio.sleep(max(_COUNT_SECONDS, (time.monotonic() - started_at) / _COUNT_SHARE))

    async def finish(self, timeout_seconds: float) -> None:
        """Wait for the orders that were begun; those that take longer are left to another replica."""
        tasks = set(self._working)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=timeout_seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._book.drain()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._working.discard(task)
        self._one_is_done.set()
        if not task.cancelled() and (exc := task.exception()) is not None:
            _log.error("payment_failed", exc_info=exc)

    async def _settle(self, due: Due, deadline: float) -> None:
        """Ask about one order, and book the answer."""
        result, outcome = await self._ask(due, deadline)
        try:
            await self._book(result)
        except ServiceError:  # it is asked about again when its lease ends, and answered alike
            return
        if outcome:
            PAYMENTS.labels(outcome).inc()

    async def _ask(self, due: Due, deadline: float) -> tuple[Result, Verdict | str]:
        try:
            verdict = await self._asks.run(
                "void_payment" if due.status == "cancelled" else "authorise_payment",
                lambda remaining: self._attempt(due, remaining),
                deadline=deadline,
            )
        except CircuitOpen as refusal:
            return Result(due, "later", refusal.retry_after_seconds or 0), ""
        except (PaymentsAway, DeadlineExceeded):
            return Result(due, "later", random.uniform(*_AGAIN_SECONDS)), "failed"  # noqa: S311
        except PaymentsRefused as refusal:
            _log.error("payment_refused", order_id=due.order_id, detail=refusal.detail)
            return Result(due, "later", _REFUSED_SECONDS), "refused"
        return Result(due, verdict), verdict

    async def _attempt(self, due: Due, remaining_seconds: float) -> Verdict:
        if due.status == "cancelled":
            return await self._payments.void(due.order_id, timeout_seconds=remaining_seconds)
        answer = await self._payments.authorise(
            due.order_id, due.total_cents, due.currency, timeout_seconds=remaining_seconds
        )
        # Voided: somebody did so at payments itself, or the order was cancelled just now, which the booking sees.
        return "declined" if answer == "voided" else answer
