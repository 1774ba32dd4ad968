"""Products that another transaction holds for long: their orders wait here, so that no batch waits with them."""

import asyncio
import contextlib
import contextvars
from collections.abc import Awaitable, Callable, Iterable

from app.domain import IncomingOrder
from app.errors import LockTimeout, ServiceError

_LOOK_SECONDS = 0.05


class LockedProducts:
    """The products found locked, looked at again by one query at a time until they are free.

    One per event loop; empty it costs an order one look at an empty dict.
    """

    def __init__(
        self, find_locked: Callable[[list[str]], Awaitable[set[str]]], *, max_wait_seconds: float
    ) -> None:
        """Start empty.

        Args:
            find_locked: of these product ids, the ones that are locked now.
            max_wait_seconds: how long an order waits for its products.
        """
        self._find_locked = find_locked
        self._max_wait_seconds = max_wait_seconds
        self._freed: dict[str, asyncio.Event] = {}
        self._watcher: asyncio.Task[None] | None = None
        self.waiting = 0

    def concern(self, incoming: IncomingOrder) -> bool:
        """Tell whether a product of *incoming* is known to be locked."""
        return bool(self._freed) and any(product_id in self._freed for product_id, _ in incoming.items)

    def add(self, product_ids: Iterable[str]) -> None:
        """Hold back the orders for *product_ids* from now on, until they are free."""
        for product_id in product_ids:
            self._freed.setdefault(product_id, asyncio.Event())
        if self._freed and self._watcher is None:
            # An empty context: it must not log or trace as the one request that happened to start it.
            self._watcher = asyncio.create_task(self._watch(), context=contextvars.Context())

    async def until_free(self, incoming: IncomingOrder) -> None:
        """Wait until no product of *incoming* is known to be locked.

        Raises:
            LockTimeout: they were not free in time.
        """
        self.waiting += 1
        try:
            async with asyncio.timeout(self._max_wait_seconds):
                for product_id, _ in incoming.items:
                    if product_id in self._freed:
                        await self._freed[product_id].wait()
        except TimeoutError:
            locked = [product_id for product_id, _ in incoming.items if product_id in self._freed]
            raise LockTimeout(product_ids=locked) from None
        finally:
            self.waiting -= 1

    async def close(self) -> None:
        """End the watch; what waits is let go."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher

    async def _watch(self) -> None:
        try:
            while self._freed:
                await asyncio.sleep(_LOOK_SECONDS)
                asked = sorted(self._freed)
                try:
                    locked = await self._find_locked(asked)
                except ServiceError:
                    # The orders themselves will find out what is wrong with the database.
                    locked = set()
                self._let_go(set(asked) - locked)
        finally:
            self._watcher = None
            self._let_go(list(self._freed))

    def _let_go(self, product_ids: Iterable[str]) -> None:
        for product_id in product_ids:
            self._freed.pop(product_id).set()
