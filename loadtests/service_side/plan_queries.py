"""The queries to a Prometheus, in PromQL: section 2 of the performance test plan, and a little more."""

import math
from dataclasses import dataclass

_MINUTE = 60


@dataclass(frozen=True)
class PlanQuery:
    """A query of the plan's, word for word."""

    promql: str
    unit: str
    # Whose value it is, in acceptance.toml; empty: the client measures that one, or nobody judges it.
    criterion: str = ""

    def over(self, seconds: int) -> str:
        """The same over a range of *seconds*."""
        return self.promql.replace("[1m]", f"[{_duration(seconds)}]")

    @property
    def has_range(self) -> bool:
        """True where it looks back; a gauge does not."""
        return "[1m]" in self.promql


CPU = PlanQuery("rate(process_cpu_seconds_total[1m])", "cores", "cpu")
MEMORY = PlanQuery("process_resident_memory_bytes", "bytes", "memory")
PLAN_QUERIES = (
    PlanQuery("histogram_quantile(0.95, rate(order_processing_seconds_bucket[1m]))", "s"),
    PlanQuery("histogram_quantile(0.99, rate(order_processing_seconds_bucket[1m]))", "s"),
    PlanQuery("rate(order_processing_seconds_sum[1m]) / rate(order_processing_seconds_count[1m])", "s"),
    PlanQuery('sum(rate(orders_total{status="error"}[1m])) / sum(rate(orders_total[1m])) * 100', "%"),
    PlanQuery('sum(rate(orders_total{status="error"}[1m])) by (error_type)', "orders/s"),
    CPU,
    MEMORY,
    PlanQuery("rate(db_connections_total[1m])", "connections/s"),
)

# The rest of the report comes from the samples themselves, by the same rules as where /metrics is read.
SAMPLES = (
    '{__name__=~"circuit_breaker_state|circuit_breaker_transitions_total|db_connections_total|db_pool_(in_use|max)'
    "|event_loop_lag_seconds|order_batch_queue_depth|order_batch_size_(sum|count)"
    "|order_processing_seconds_(bucket|sum|count)|order_stage_seconds_(sum|count)|orders_total"
    "|process_(cpu_seconds_total|resident_memory_bytes|start_time_seconds)|requests_in_flight|requests_shed_total"
    '|retries_total"}'
)
SUCCESS = 'orders_total{status="success"}'
LAST_SCRAPE = f"timestamp({SUCCESS})"
CPU_NOW = "irate(process_cpu_seconds_total[1m])"  # between the last two scrapes
POOL_NOW = ("db_pool_in_use", "db_pool_max")


def quantile(share: float, seconds: int) -> str:
    """The query for a quantile of the processing times of the last *seconds*, all replicas together."""
    return f"histogram_quantile({share:g}, sum by (le) (rate(order_processing_seconds_bucket[{_duration(seconds)}])))"


def range_seconds(measured_seconds: float, scrape_seconds: float | None) -> int:
    """The range to ask the plan's queries over, in place of their minute.

    A minute where that is within the measured time: before it the service was idle, and a rate that reaches back
    there reads low. Longer where scrapes are so far apart that a minute has not four of them.
    """
    wanted = max(_MINUTE, math.ceil(4 * (scrape_seconds or 0)))
    return max(1, min(round(measured_seconds), wanted))


def _duration(seconds: int) -> str:
    return "1m" if seconds == _MINUTE else f"{seconds}s"
