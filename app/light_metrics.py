"""prometheus_client's Counter and Histogram for values that one thread alone changes: the event loop's.

Theirs take a lock for every value and look through the bounds one by one, at 1.0 us an increment and 2.2 us an
observation; an order is counted twelve times on its way. Everything but the counting is theirs.
"""

from bisect import bisect_left

import prometheus_client
from typing_extensions import override


class _Value:
    """A number, as prometheus_client's metrics keep it, without a lock."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0.0

    def get(self) -> float:
        return self.number

    def set(self, number: float) -> None:
        self.number = number

    def get_exemplar(self) -> None:
        return None


class Counter(prometheus_client.Counter):
    """A counter without exemplars, for one thread."""

    @override
    def _metric_init(self) -> None:
        super()._metric_init()
        self._value = _Value()

    @override
    def inc(self, amount: float = 1, exemplar: dict[str, str] | None = None) -> None:
        if amount < 0:
            raise ValueError("a counter only rises")
        self._value.number += amount


class Histogram(prometheus_client.Histogram):
    """A histogram without exemplars, for one thread."""

    @override
    def _metric_init(self) -> None:
        super()._metric_init()
        self._buckets = [_Value() for _ in self._upper_bounds]
        self._sum = _Value()

    @override
    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        self._sum.number += amount
        self._buckets[bisect_left(self._upper_bounds, amount)].number += 1
