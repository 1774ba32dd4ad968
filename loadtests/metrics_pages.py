"""The server's side of a run from its own `/metrics` pages, read once a second; counters are read as differences."""

import contextlib
import itertools
import math
import re
import threading
import time
import urllib.error
import urllib.request
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from loadtests.run_record import Replica, Server
from loadtests.samples import Window

_TIMEOUT_SECONDS = 5.0
_MINUTE = 60.0
_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Page:
    """One reading of one replica's page."""

    at: float  # seconds since the epoch
    values: Mapping[tuple[str, Labels], float]

    def get(self, name: str, **labels: str) -> float | None:
        """One sample."""
        return self.values.get((name, tuple(sorted(labels.items()))))

    def total(self, name: str, **labels: str) -> float:
        """The sum of all samples of *name* that carry *labels*."""
        wanted = set(labels.items())
        return sum(
            value for (its, pairs), value in self.values.items() if its == name and wanted <= set(pairs)
        )


def parse(text: str, at: float) -> Page:
    """Read the text format: https://prometheus.io/docs/instrumenting/exposition_formats/."""
    values = {}
    for name, labels, value in _SAMPLE.findall(text):
        values[name, tuple(sorted(_LABEL.findall(labels)))] = float(value)
    return Page(at, values)


def read_page(url: str) -> Page:
    """Read *url* now; raises OSError or ValueError where it is no metrics page."""
    with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310 - the operator's own URL
        page = parse(answer.read().decode(), time.time())
    if page.get("orders_total", status="success", error_type="") is None:
        raise ValueError(f"{url} has no orders_total")
    return page


@dataclass
class Pages:
    """All readings of one replica, in order."""

    url: str
    readings: list[Page] = field(default_factory=list)

    def within(self, window: Window) -> list[Page]:
        """The readings in *window*, and the last one before it."""
        times = [page.at for page in self.readings]
        first = max(0, bisect_right(times, window.start) - 1)
        return self.readings[first : bisect_right(times, window.end)]

    def rise(self, readings: Sequence[Page], name: str, **labels: str) -> float:
        """How much a counter rose; a fall is a restart, from 0."""
        rise = 0.0
        for before, after in itertools.pairwise(readings):
            old, new = before.total(name, **labels), after.total(name, **labels)
            rise += new - old if new >= old else new
        return rise

    @property
    def restarted(self) -> bool:
        """Whether its CPU counter ever fell."""
        spent = [page.get("process_cpu_seconds_total") or 0.0 for page in self.readings]
        return any(after < before for before, after in itertools.pairwise(spent))

    def cpu_percent(self, readings: Sequence[Page], over_seconds: float) -> float | None:
        """The highest share of one core over any *over_seconds* of *readings*, or over all where they are fewer."""
        spent = [(p.at, cpu) for p in readings if (cpu := p.get("process_cpu_seconds_total")) is not None]
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


class MetricsSampler:
    """Reads every replica's page once a second, in a thread of its own, while its block runs."""

    source = "metrics"

    def __init__(self, urls: Iterable[str], *, interval_seconds: float = 1.0) -> None:
        self.replicas = [Pages(url) for url in urls]
        self.trouble: dict[str, str] = {}  # url -> why its page could not be read, the last time
        self._interval_seconds = interval_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self.read()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def read(self) -> None:
        """Read all pages now."""
        for replica in self.replicas:
            try:
                replica.readings.append(read_page(replica.url))
                self.trouble.pop(replica.url, None)
            except (OSError, ValueError) as exc:
                self.trouble[replica.url] = str(exc)

    def finish(self) -> None:
        """Stop reading, after one last time: everything that was asked for has ended."""
        self._ended.set()
        self._thread.join()
        self.read()

    def _run(self) -> None:
        while not self._ended.wait(self._interval_seconds):
            self.read()

    def success_rise(self) -> float | None:
        """How much `orders_total{status="success"}` rose from the first reading to the last, all replicas."""
        if self.trouble or any(len(replica.readings) < 2 for replica in self.replicas):  # noqa: PLR2004
            return None
        return sum(
            replica.rise(replica.readings, "orders_total", status="success") for replica in self.replicas
        )

    def now(self) -> tuple[float | None, float | None, float | None]:
        """For the live line: CPU percent of the busiest replica in the last seconds, pool in use, pool max."""
        cpu: float | None = None
        in_use = pool_max = None
        for replica in self.replicas:
            recent = replica.readings[-3:]
            if len(recent) > 1:
                cpu = max(cpu or 0.0, replica.cpu_percent(recent, 2 * self._interval_seconds) or 0.0)
            if recent and (lent := recent[-1].get("db_pool_in_use")) is not None and lent >= (in_use or 0):
                in_use, pool_max = lent, recent[-1].get("db_pool_max")
        return cpu, in_use, pool_max

    def server(self, window: Window, *, memory_limit_bytes: float, acknowledged: int) -> Server:
        """The figures over *window*."""
        spans = [(replica, replica.within(window)) for replica in self.replicas]
        if not any(len(readings) > 1 for _, readings in spans):
            return Server()

        def rise(name: str, **labels: str) -> float:
            return sum(replica.rise(readings, name, **labels) for replica, readings in spans)

        def mean(name: str, **labels: str) -> float | None:
            count = rise(f"{name}_count", **labels)
            return rise(f"{name}_sum", **labels) / count if count else None

        last = [readings[-1] for _, readings in spans if readings]

        def labels_of(name: str, label: str) -> list[str]:
            return sorted({dict(pairs)[label] for page in last for its, pairs in page.values if its == name})

        outcomes = {
            (dict(pairs)["status"], dict(pairs)["error_type"])
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
        cpu_seconds = rise("process_cpu_seconds_total")
        return Server(
            source="metrics",
            replicas=tuple(_replica(replica, readings, memory_limit_bytes) for replica, readings in spans),
            orders_total=orders,
            processing_mean_ms=None if processing is None else processing * 1000,
            processing_p95_ms=histogram_quantile_ms(0.95, buckets),
            processing_p99_ms=histogram_quantile_ms(0.99, buckets),
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

    def per_second(self, origin: float, seconds: range) -> Mapping[str, list[float | None]]:
        """The server's columns over *seconds* since *origin*, the worst replica or the sum (see `SERIES`)."""
        columns: dict[str, dict[int, float]] = {}

        def note(name: str, second: int, value: float | None, *, add: bool = False) -> None:
            if value is not None:
                column = columns.setdefault(name, {})
                column[second] = (
                    column.get(second, 0.0) + value if add else max(column.get(second, 0.0), value)
                )

        for replica in self.replicas:
            for before, page in zip([None, *replica.readings], replica.readings, strict=False):
                second = math.floor(page.at - origin)
                note("rss_bytes", second, page.get("process_resident_memory_bytes"))
                note("pool_in_use", second, page.get("db_pool_in_use"))
                note("pool_max", second, page.get("db_pool_max"))
                note("queue_depth", second, page.get("order_batch_queue_depth"), add=True)
                note("in_flight", second, page.get("requests_in_flight"), add=True)
                note("breaker_state", second, page.get("circuit_breaker_state", breaker="postgres"))
                lag = page.get("event_loop_lag_seconds")
                note("loop_lag_ms", second, None if lag is None else lag * 1000)
                if before is not None:
                    note("cpu_percent", second, replica.cpu_percent([before, page], math.inf))
                    if batches := replica.rise([before, page], "order_batch_size_count"):
                        orders = replica.rise([before, page], "order_batch_size_sum")
                        note("batch_size", second, orders / batches)
        return {name: [column.get(second) for second in seconds] for name, column in columns.items()}


def _replica(replica: Pages, readings: Sequence[Page], memory_limit_bytes: float) -> Replica:
    def highest(name: str) -> float | None:
        return max((value for page in readings if (value := page.get(name)) is not None), default=None)

    return Replica(
        url=replica.url,
        cpu_percent=replica.cpu_percent(readings, _MINUTE),
        cpu_percent_mean=replica.cpu_percent(readings, math.inf),
        rss_max_bytes=highest("process_resident_memory_bytes"),
        memory_limit_bytes=memory_limit_bytes,
        pool_in_use_max=highest("db_pool_in_use"),
        pool_max=highest("db_pool_max"),
        restarted=replica.restarted,
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


def answers(url: str) -> str:
    """Why *url* does not answer; empty where it does, whatever the status."""
    with contextlib.suppress(urllib.error.HTTPError):
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS):  # noqa: S310 - the operator's own URL
                pass
        except urllib.error.HTTPError:
            raise
        except (OSError, ValueError) as exc:
            return str(exc)
    return ""
