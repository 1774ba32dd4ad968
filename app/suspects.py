"""Orders that are likely to fail a common attempt, and so to make a whole batch be undone and done again."""

import time

from app.domain import IncomingOrder, PlacedOrder
from app.errors import OutOfStock, ServiceError

_MOST_KEYS = 20_000  # of each of two generations: about 3 MB in all
_SOLD_OUT_SECONDS = 1.0


class Suspects:
    """The idempotency keys of orders stored lately, and the products that were short a moment ago.

    A wrong guess costs little: the order is stored beside the others, in a batch of its own kind.
    """

    def __init__(self) -> None:
        self._keys: set[int] = set()
        self._older_keys: set[int] = set()
        self._sold_out_until: dict[str, float] = {}

    def include(self, incoming: IncomingOrder) -> bool:
        """Tell whether *incoming* looks like a repeat, or asks for what is not there."""
        if incoming.idempotency_key is not None:
            key = hash((incoming.principal, incoming.idempotency_key))
            if key in self._keys or key in self._older_keys:
                return True
        if self._sold_out_until:
            now = time.monotonic()
            return any(self._sold_out_until.get(product_id, 0.0) > now for product_id, _ in incoming.items)
        return False

    def learn(self, incoming: IncomingOrder, result: PlacedOrder | ServiceError) -> None:
        """Take note of what became of *incoming*."""
        if isinstance(result, PlacedOrder):
            self.add_key(incoming)
        elif isinstance(result, OutOfStock):
            now = time.monotonic()
            self._sold_out_until = {id_: until for id_, until in self._sold_out_until.items() if until > now}
            self._sold_out_until.update(dict.fromkeys(result.product_ids, now + _SOLD_OUT_SECONDS))

    def add_key(self, incoming: IncomingOrder) -> None:
        """Expect the key of *incoming* again."""
        if incoming.idempotency_key is None:
            return
        if len(self._keys) >= _MOST_KEYS:
            self._keys, self._older_keys = set(), self._keys
        self._keys.add(hash((incoming.principal, incoming.idempotency_key)))
