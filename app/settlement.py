"""What became of each order of a batch, so far."""

import copy
from collections.abc import Sequence

from app.domain import IncomingOrder, PlacedOrder
from app.errors import IdempotencyMismatch, ServiceError


class Settlement:
    """The results of a batch as they come in, over several passes and attempts where it takes them.

    Of the orders that share an idempotency key only the first is sent; the others are settled by its result, or take
    their turn when it was refused (a refusal leaves the key free).
    """

    def __init__(self, batch: Sequence[IncomingOrder]) -> None:
        self._batch = batch
        self._results: dict[IncomingOrder, PlacedOrder | ServiceError] = {}
        self._placed: dict[tuple[str, str], tuple[IncomingOrder, PlacedOrder]] = {}
        self._doubts: dict[IncomingOrder, ServiceError] = {}

    def next_pass(self) -> list[IncomingOrder]:
        """The orders to send now, in order of arrival; empty when all are settled."""
        orders: list[IncomingOrder] = []
        keys: set[tuple[str, str]] = set()
        for incoming in self._batch:
            if incoming in self._results:
                continue
            if incoming.idempotency_key is not None:
                key = (incoming.principal, incoming.idempotency_key)
                if key in self._placed:
                    self._results[incoming] = self._repeat(incoming, *self._placed[key])
                    continue
                if key in keys:
                    continue
                keys.add(key)
            orders.append(incoming)
        return orders

    def doubt(self, orders: Sequence[IncomingOrder], failure: ServiceError) -> None:
        """Note that *orders* were sent and not answered: each may be stored, now or later."""
        for incoming in orders:
            self._doubts.setdefault(incoming, failure)

    def settle(self, incoming: IncomingOrder, result: PlacedOrder | ServiceError) -> None:
        """Note what became of one order that was sent.

        A refusal does not end a doubt: what was sent before may be carried out after it. But where another order holds
        the key, it cannot be.
        """
        refused = isinstance(result, ServiceError) and not isinstance(result, IdempotencyMismatch)
        if refused and incoming in self._doubts:
            result = self._doubts[incoming]
        self._results[incoming] = result
        if incoming.idempotency_key is not None and isinstance(result, PlacedOrder):
            self._placed[incoming.principal, incoming.idempotency_key] = (incoming, result)

    def fail_the_rest(self, failure: ServiceError) -> None:
        """Give *failure* to every order that is not settled; its outcome is each order's own."""
        for incoming in self._batch:
            if incoming not in self._results:
                # Callers that share one exception write into each other's traceback.
                own = copy.copy(failure)
                own.outcome = "unknown" if incoming in self._doubts else "not_executed"
                self._results[incoming] = own

    def in_order(self) -> list[PlacedOrder | ServiceError]:
        """The results in the batch's order; call it when all are settled."""
        return [self._results[incoming] for incoming in self._batch]

    @staticmethod
    def _repeat(
        incoming: IncomingOrder, first: IncomingOrder, placed: PlacedOrder
    ) -> PlacedOrder | ServiceError:
        if incoming.fingerprint() != first.fingerprint():
            return IdempotencyMismatch()
        return PlacedOrder(placed.order, replayed=True)
