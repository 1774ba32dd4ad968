"""Readings of the service's own figures over a run; counters are read as differences.

Whoever reads them, from their pages or from a Prometheus, gets every figure by the same rules.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from loadtests.run_record import Replica, ServiceFigures
from loadtests.samples import Window

_MINUTE = 60.0
_SUMS = ("queue_depth", "in_flight")  # the others are those of the worst replica

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Limits:
    """The limits that a service process really has."""

    memory_bytes: float
    cpu_cores: float = 1.0  # one process uses no more
    throttled_seconds: float | None = None  # by its cgroup, in the run; None: not known


@dataclass(frozen=True)
class Page:
    """One reading of one replica's page. A label that is empty is one that is not there, as it is to Prometheus."""

    at: float  # seconds since the epoch
    values: Mapping[tuple[str, Labels], float]

    def get(self, name: str, **labels: str) -> float | None:
        """The value of one sample; None: it is not there."""
        return self.values.get((name, tuple(sorted(pair for pair in labels.items() if pair[1]))))

    def total(self, name: str, **labels: str) -> float:
        """The sum of all samples of *name* that carry *labels*."""
        wanted = {pair for pair in labels.items() if pair[1]}
        return sum(
            value for (its, pairs), value in self.values.items() if its == name and wanted <= set(pairs)
        )


@dataclass
class Pages:
    """All readings of one replica, in order."""

    url: str
    readings: list[Page] = field(default_factory=list)
    gone: bool = False  # it did not answer at the end

    def within(self, window: Window) -> list[Page]:
        """The readings in *window*, and the last one before it."""
        times = [page.at for page in self.readings]
        first = max(0, bisect_right(times, window.start) - 1)
        return self.readings[first : bisect_right(times, window.end)]

    def rise(self, readings: Sequence[Page], name: str, **labels: str) -> float:
        """The rise of a counter; a fall is a restart, from 0."""
        rise = 0.0
        for before, after in itertools.pairwise(readings):
            old, new = before.total(name, **labels), after.total(name, **labels)
            rise += new - old if new >= old else new
        return rise

    @property
    def restarted(self) -> bool:
        """True where another process answers than at first, and the former one never came back.

        Several processes behind one address are no restart: they take turns. One that began after the first reading is.
        """
        turns = self._turns
        if turns:
            return len(turns) > 1 and (turns == sorted(set(turns)) or max(turns) > self.readings[0].at)
        spent = [page.get("process_cpu_seconds_total") or 0.0 for page in self.readings]
        return any(after < before for before, after in itertools.pairwise(spent))

    @property
    def takes_turns(self) -> bool:
        """True where several processes answer behind its address: no counter means anything then."""
        turns = self._turns
        return len(turns) > len(set(turns))

    @property
    def _turns(self) -> Sequence[float]:
        """The starts of the processes that answered, one after the other."""
        starts = [at for page in self.readings if (at := page.get("process_start_time_seconds")) is not None]
        return [start for start, _ in itertools.groupby(starts)]

    def waited_for(self, readings: Sequence[Page]) -> float | None:
        """Connections of the pool that took a millisecond and longer to come by; None: not known."""
        known = [page for page in readings if page.get("db_pool_wait_seconds_count") is not None]
        if not known:
            return None
        count = self.rise(readings, "db_pool_wait_seconds_count")
        return count - self.rise(readings, "db_pool_wait_seconds_bucket", le="0.001")

    def cpu_percent(self, readings: Sequence[Page], over_seconds: float) -> float | None:
        """The highest share of one core over any *over_seconds* of *readings*, or over all where they are fewer."""
        spent: list[tuple[float, float]] = []
        before = total = 0.0
        for page in readings:
            if (cpu := page.get("process_cpu_seconds_total")) is not None:
                total += cpu - before if cpu >= before else cpu  # a process that was started anew: from 0
                before = cpu
                spent.append((page.at, total))
        if len(spent) < 2:  # noqa: PLR2004 - a difference needs two
            return None
        over_seconds = min(over_seconds, spent[-1][0] - spent[0][0])
        highest, first = 0.0, 0
        for at, cpu in spent:
            while first + 1 < len(spent) and at - spent[first + 1][0] >= over_seconds:
                first += 1
            if at - spent[first][0] >= over_seconds:
                highest = max(highest, (cpu - spent[first][1]) / (at - spent[first][0]) * 100)
        return highest


@dataclass(frozen=True)
class Readings:
    """The readings of all replicas."""

    replicas: Sequence[Pages]

    @property
    def apart(self) -> Sequence[Pages]:
        """The same, those who take turns behind one address each for itself."""
        found: list[Pages] = []
        for replica in self.replicas:
            if not replica.takes_turns:
                found.append(replica)
                continue
            by_start: dict[float | None, Pages] = {}
            for page in replica.readings:
                start = page.get("process_start_time_seconds")
                by_start.setdefault(start, Pages(f"{replica.url} ({len(by_start) + 1})")).readings.append(
                    page
                )
            found += by_start.values()
        return found

    def success_rise(self) -> float | None:
        """The rise of `orders_total{status="success"}` from first to last reading; None without two."""
        if not self.replicas or any(len(replica.readings) < 2 for replica in self.replicas):  # noqa: PLR2004
            return None
        if any(replica.restarted or replica.gone or replica.takes_turns for replica in self.replicas):
            return None  # what it counted since its last reading is lost
        return sum(
            replica.rise(replica.readings, "orders_total", status="success") for replica in self.replicas
        )

    def server(
        self, window: Window, *, source: Literal["metrics", "prometheus"], limits: Limits
    ) -> ServiceFigures:
        """The figures over *window*: from the last reading before it to the last one in it."""
        spans = [(replica, replica.within(window)) for replica in self.apart]
        if not any(len(readings) > 1 for _, readings in spans):
            return ServiceFigures()

        def rise(name: str, **labels: str) -> float:
            return sum(replica.rise(readings, name, **labels) for replica, readings in spans)

        def mean(name: str, **labels: str) -> float | None:
            count = rise(f"{name}_count", **labels)
            return rise(f"{name}_sum", **labels) / count if count else None

        last = [readings[-1] for _, readings in spans if readings]

        def labels_of(name: str, label: str) -> list[str]:
            return sorted({dict(pairs)[label] for page in last for its, pairs in page.values if its == name})

        outcomes = {
            (dict(pairs)["status"], dict(pairs).get("error_type", ""))
            for page in last
            for its, pairs in page.values
            if its == "orders_total"
        }
        orders = {
            f"{status}/{error_type}".rstrip("/"): rise("orders_total", status=status, error_type=error_type)
            for status, error_type in sorted(outcomes)
        }
        buckets = [
            (float(edge), rise("order_processing_seconds_bucket", le=edge))
            for edge in labels_of("order_processing_seconds_bucket", "le")
        ]
        processing = mean("order_processing_seconds")
        acknowledged = sum(rise("orders_total", status=status) for status in ("success", "replayed"))
        cpu_seconds = rise("process_cpu_seconds_total")
        return ServiceFigures(
            source=source,
            replicas=tuple(_replica(replica, readings, limits) for replica, readings in spans),
            orders_total=orders,
            processing_mean_ms=None if processing is None else processing * 1000,
            processing_p95_ms=histogram_quantile_ms(0.95, buckets),
            processing_p99_ms=histogram_quantile_ms(0.99, buckets),
            processing_edges_ms=tuple(sorted(edge * 1000 for edge, _ in buckets if math.isfinite(edge))),
            stage_mean_ms={
                stage: seconds * 1000
                for stage in labels_of("order_stage_seconds_count", "stage")
                if (seconds := mean("order_stage_seconds", stage=stage)) is not None
            },
            batch_size_mean=mean("order_batch_size"),
            connections_opened=rise("db_connections_total", outcome="opened"),
            breaker_transitions={
                state: rise("circuit_breaker_transitions_total", to=state)
                for state in labels_of("circuit_breaker_transitions_total", "to")
            },
            retries=rise("retries_total"),
            shed=rise("requests_shed_total"),
            cpu_us_per_order=cpu_seconds / acknowledged * 1e6 if acknowledged and cpu_seconds else None,
        )

    def per_second(
        self, origin: float, seconds: range, *, hold_seconds: int = 1
    ) -> Mapping[str, list[float | None]]:
        """The server's columns over *seconds* since *origin*, the worst replica or the sum (see `SERIES`).

        A value stands for *hold_seconds*, or until the next reading of its replica.
        """
        columns: dict[str, list[float | None]] = {}
        for replica in self.apart:
            for name, values in _by_second(replica, origin).items():
                held = _hold(values, seconds, hold_seconds)
                combine = sum if name in _SUMS else max
                columns[name] = [
                    combine(known) if (known := [v for v in both if v is not None]) else None
                    for both in zip(columns.get(name, [None] * len(held)), held, strict=True)
                ]
        return columns


def _by_second(replica: Pages, origin: float) -> Mapping[str, Mapping[int, float]]:
    """Each column of one replica, where it has a value; of two in one second the higher."""
    columns: dict[str, dict[int, float]] = {}
    for before, page in zip([None, *replica.readings], replica.readings, strict=False):
        lag = page.get("event_loop_lag_seconds")
        values = {
            "rss_bytes": page.get("process_resident_memory_bytes"),
            "pool_in_use": page.get("db_pool_in_use"),
            "pool_max": page.get("db_pool_max"),
            "queue_depth": page.get("order_batch_queue_depth"),
            "in_flight": page.get("requests_in_flight"),
            "breaker_state": page.get("circuit_breaker_state", breaker="postgres"),
            "loop_lag_ms": None if lag is None else lag * 1000,
        }
        if before is not None:
            values["cpu_percent"] = replica.cpu_percent([before, page], math.inf)
            if batches := replica.rise([before, page], "order_batch_size_count"):
                values["batch_size"] = replica.rise([before, page], "order_batch_size_sum") / batches
        second = math.floor(page.at - origin)
        for name, value in values.items():
            if value is not None:
                column = columns.setdefault(name, {})
                column[second] = max(column.get(second, 0.0), value)
    return columns


def _hold(values: Mapping[int, float], seconds: range, hold_seconds: int) -> list[float | None]:
    column = []
    for second in seconds:
        last = next((at for at in range(second, second - hold_seconds, -1) if at in values), None)
        column.append(None if last is None else values[last])
    return column


def _replica(replica: Pages, readings: Sequence[Page], limits: Limits) -> Replica:
    def highest(name: str) -> float | None:
        return max((value for page in readings if (value := page.get(name)) is not None), default=None)

    return Replica(
        url=replica.url,
        cpu_percent=replica.cpu_percent(readings, _MINUTE),
        cpu_percent_mean=replica.cpu_percent(readings, math.inf),
        rss_max_bytes=highest("process_resident_memory_bytes"),
        memory_limit_bytes=limits.memory_bytes,
        pool_in_use_max=highest("db_pool_in_use"),
        pool_max=highest("db_pool_max"),
        cpu_limit_cores=limits.cpu_cores,
        pool_waits=replica.waited_for(readings),
        throttled_seconds=limits.throttled_seconds,
        restarted=replica.restarted,
        gone=replica.gone,
    )


def histogram_quantile_ms(quantile: float, buckets: Iterable[tuple[float, float]]) -> float | None:
    """Interpolate as PromQL's `histogram_quantile` does; *buckets*: (upper edge in seconds, cumulative count)."""
    edges = sorted(buckets)
    if not edges or not edges[-1][1]:
        return None
    rank = quantile * edges[-1][1]
    lower, below = 0.0, 0.0
    for edge, count in edges:
        if count >= rank:
            if math.isinf(edge):
                return lower * 1000
            share = (rank - below) / (count - below) if count > below else 1.0
            return (lower + (edge - lower) * share) * 1000
        lower, below = edge, count
    return None
