"""What became of each order of a batch, so far."""

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

    def settle(self, incoming: IncomingOrder, result: PlacedOrder | ServiceError) -> None:
        """Note what became of one order that was sent."""
        self._results[incoming] = result
        if incoming.idempotency_key is not None and isinstance(result, PlacedOrder):
            self._placed[incoming.principal, incoming.idempotency_key] = (incoming, result)

    def fail_the_rest(self, failure: ServiceError) -> None:
        """Give *failure* to every order that is not settled."""
        for incoming in self._batch:
            self._results.setdefault(incoming, failure)

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
