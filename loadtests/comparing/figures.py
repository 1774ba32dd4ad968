"""The figures that two builds are compared by."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from loadtests.run_record import RunRecord


@dataclass(frozen=True)
class Metric:
    """A figure of a run."""

    name: str
    title: str
    unit: str
    of: Callable[[RunRecord], float | None]
    more_is_better: bool = False


# Six, not more: complete separation of five runs from five has p = 2/252, which survives six comparisons at 5 %.
METRICS = (
    Metric(
        "orders_per_second", "Orders per second", "/s", lambda r: r.orders_per_second, more_is_better=True
    ),
    Metric("mean_ms", "Average response time", "ms", lambda r: r.acknowledged.mean_ms),
    Metric("p50_ms", "50th percentile", "ms", lambda r: r.acknowledged.p50_ms),
    Metric("p95_ms", "95th percentile", "ms", lambda r: r.acknowledged.p95_ms),
    Metric("p99_ms", "99th percentile", "ms", lambda r: r.acknowledged.p99_ms),
    Metric("cpu_us_per_order", "Service CPU per order", "µs", lambda r: r.server.cpu_us_per_order),
)


def values_of(metric: Metric, records: Iterable[RunRecord]) -> list[float]:
    """The metric of every run; none where one lacks it: the rest would be a selection."""
    values = [metric.of(record) for record in records]
    return [value for value in values if value] if all(values) else []
