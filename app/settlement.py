"""What became of each order of a batch, so far."""

from collections.abc import Sequence

from app.domain import PendingOrder, PlacedOrder
from app.errors import IdempotencyMismatch, ServiceError


class Settlement:
    """The results of a batch as they come in, over several passes and attempts where it takes them.

    Of the orders that share an idempotency key only the first is sent; the others are settled by its result, or take
    their turn when it was refused (a refusal leaves the key free).
    """

    def __init__(self, batch: Sequence[PendingOrder]) -> None:
        self._batch = batch
        self._results: dict[PendingOrder, PlacedOrder | ServiceError] = {}
        self._placed: dict[tuple[str, str], tuple[PendingOrder, PlacedOrder]] = {}

    def next_pass(self) -> list[PendingOrder]:
        """The orders to send now, in order of arrival; empty when all are settled."""
        orders: list[PendingOrder] = []
        keys: set[tuple[str, str]] = set()
        for pending in self._batch:
            if pending in self._results:
                continue
            if pending.idempotency_key is not None:
                key = (pending.principal, pending.idempotency_key)
                if key in self._placed:
                    self._results[pending] = self._repeat(pending, *self._placed[key])
                    continue
                if key in keys:
                    continue
                keys.add(key)
            orders.append(pending)
        return orders

    def settle(self, pending: PendingOrder, result: PlacedOrder | ServiceError) -> None:
        """Note what became of one order that was sent."""
        self._results[pending] = result
        if pending.idempotency_key is not None and isinstance(result, PlacedOrder):
            self._placed[pending.principal, pending.idempotency_key] = (pending, result)

    def fail_the_rest(self, failure: ServiceError) -> None:
        """Give *failure* to every order that is not settled."""
        for pending in self._batch:
            self._results.setdefault(pending, failure)

    def in_order(self) -> list[PlacedOrder | ServiceError]:
        """The results in the batch's order; call it when all are settled."""
        return [self._results[pending] for pending in self._batch]

    @staticmethod
    def _repeat(
        pending: PendingOrder, first: PendingOrder, placed: PlacedOrder
    ) -> PlacedOrder | ServiceError:
        if pending.fingerprint() != first.fingerprint():
            return IdempotencyMismatch()
        return PlacedOrder(placed.order, replayed=True)
