"""The server's side of a run from a Prometheus: the plan's own queries, the samples behind them, and the alerts."""

import dataclasses
import statistics
import threading
import time
from collections.abc import Mapping
from typing import Self

from loadtests.run_record import Query, ServiceFigures
from loadtests.samples import Window
from loadtests.service_side import plan_queries
from loadtests.service_side.plan_queries import CPU, MEMORY, PLAN_QUERIES, PlanQuery
from loadtests.service_side.prometheus import Instance, Prometheus, PrometheusError, Vector, instance
from loadtests.service_side.readings import Labels, Page, Pages, Readings

_ALERTS_SECONDS = 5.0
_FIRST_SCRAPE_SECONDS = 30.0  # Prometheus takes 5 s to read whom to scrape
_NEXT_SCRAPE_SECONDS = 60.0
_LOOK_BACK_SECONDS = 60.0  # for the last scrape before the run
_STEP_SECONDS = 5.0  # where the scrapes do not say how far they are apart

# What the service itself says of a series; the others are of whoever scrapes it.
_OWN_LABELS = {"status", "error_type", "le", "stage", "to", "breaker", "operation", "outcome", "reason"}


class PrometheusSampler:
    """Asks Prometheus for the same figures as `MetricsSampler` reads by itself; open it around the run."""

    def __init__(self, prometheus: Prometheus) -> None:
        self._prometheus = prometheus
        self.trouble: dict[str, str] = {}
        self._fired: set[tuple[str, str]] | None = None
        self._before: set[Instance] = set()
        self._instances: set[Instance] = set()  # those that sell: every program has a CPU figure
        self._replicas: Mapping[Instance, Pages] = {}
        self._began_at = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)

    def __enter__(self) -> Self:
        """Begin.

        Raises:
            PrometheusError: it does not answer, or scrapes no order service.
        """
        self._before = selling(self._prometheus)
        self._began_at = time.time()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def finish(self) -> None:
        """Wait until every instance was scraped once more: everything that was asked for has ended."""
        self._ended.set()
        self._thread.join()
        self._look_at_alerts()
        try:
            self._wait_for_scrape()
            self._instances = {instance(labels) for labels, _ in self._prometheus.query(plan_queries.SUCCESS)}
            self._replicas = self._read()
        except PrometheusError as exc:
            self.trouble[self._prometheus.url] = str(exc)

    def success_rise(self) -> float | None:
        """The rise of `orders_total{status="success"}` over the run; None where an instance restarted or is gone."""
        broken = any(replica.restarted for replica in self._replicas.values())
        if self.trouble or broken or not self._before <= self._instances:
            return None
        return Readings([*self._replicas.values()]).success_rise()

    def now(self) -> tuple[float | None, float | None, float | None]:
        """The live line's figures: CPU percent of the busiest replica, pool in use, pool max."""
        try:
            cpu, in_use, pool_max = (
                max(
                    (v for labels, v in self._prometheus.query(q) if instance(labels) in self._before),
                    default=None,
                )
                for q in (plan_queries.CPU_NOW, *plan_queries.POOL_NOW)
            )
        except PrometheusError:
            return None, None, None
        return None if cpu is None else cpu * 100, in_use, pool_max

    def server(self, window: Window, *, memory_limit_bytes: float) -> ServiceFigures:
        """The figures over *window*."""
        server = dataclasses.replace(
            Readings([*self._replicas.values()]).server(
                window, source="prometheus", memory_limit_bytes=memory_limit_bytes
            ),
            critical_alerts=self._alerts("critical"),
            warning_alerts=self._alerts("warning"),
        )
        try:
            asked = {query: self._ask(query, window) for query in PLAN_QUERIES}
            measured = max(1, round(window.seconds))
            p95, p99 = (
                max((value for _, value in self._prometheus.query(promql, window.end)), default=None)
                for promql in (plan_queries.quantile(share, measured) for share in (0.95, 0.99))
            )
        except PrometheusError as exc:
            self.trouble[self._prometheus.url] = str(exc)
            return server
        (_, cpu), (_, resident) = asked[CPU], asked[MEMORY]
        return dataclasses.replace(
            server,
            replicas=tuple(
                dataclasses.replace(
                    replica,
                    cpu_percent=cpu[its] * 100 if its in cpu else None,
                    rss_max_bytes=resident.get(its),
                )
                for its, replica in zip(self._replicas, server.replicas, strict=False)
            ),
            processing_p95_ms=None if p95 is None else p95 * 1000,
            processing_p99_ms=None if p99 is None else p99 * 1000,
            processing_source=plan_queries.quantile(0.95, measured),
            queries=tuple(query for query, _ in asked.values()),
        )

    def per_second(self, origin: float, seconds: range) -> Mapping[str, list[float | None]]:
        """The server's columns over *seconds* since *origin*; a value stands until the next scrape."""
        scrape_seconds = self._scrape_seconds() or _STEP_SECONDS
        return Readings([*self._replicas.values()]).per_second(
            origin, seconds, hold_seconds=round(scrape_seconds) + 1
        )

    def _run(self) -> None:
        while True:
            self._look_at_alerts()
            if self._ended.wait(_ALERTS_SECONDS):
                return

    def _look_at_alerts(self) -> None:
        try:
            self._fired = (self._fired or set()) | self._prometheus.firing()
        except PrometheusError as exc:
            self.trouble[self._prometheus.url] = str(exc)

    def _alerts(self, severity: str) -> tuple[str, ...] | None:
        if self._fired is None:
            return None
        return tuple(sorted(name for its, name in self._fired if its == severity))

    def _wait_for_scrape(self) -> None:
        ended_at = time.time()
        while time.time() < ended_at + _NEXT_SCRAPE_SECONDS:
            stamps = self._prometheus.query(plan_queries.LAST_SCRAPE)
            if stamps and min(stamp for _, stamp in stamps) > ended_at:
                return
            time.sleep(0.5)
        self.trouble[self._prometheus.url] = f"no scrape within {_NEXT_SCRAPE_SECONDS:g} s of the end"

    def _read(self) -> Mapping[Instance, Pages]:
        """Every sample since the run began, scrape by scrape."""
        whole = Window(self._began_at - _LOOK_BACK_SECONDS, time.time())
        scrapes: dict[Instance, dict[float, dict[tuple[str, Labels], float]]] = {}
        for labels, samples in self._prometheus.samples(plan_queries.SAMPLES, whole):
            own = tuple(sorted((name, value) for name, value in labels.items() if name in _OWN_LABELS))
            by_time = scrapes.setdefault(instance(labels), {})
            for at, value in samples:
                by_time.setdefault(at, {})[labels["__name__"], own] = value
        replicas = {}
        for its in sorted(scrapes.keys() & self._instances):
            readings = [Page(at, values) for at, values in sorted(scrapes[its].items())]
            if its not in self._before:  # it has started since: from 0
                readings.insert(0, Page(readings[0].at, {}))
            since = Pages(its[1], readings).within(Window(self._began_at, whole.end))
            replicas[its] = Pages(its[1], since)
        return replicas

    def _scrape_seconds(self) -> float | None:
        """The time from scrape to scrape."""
        apart = [
            after.at - before.at
            for replica in self._replicas.values()
            for before, after in zip(replica.readings, replica.readings[1:], strict=False)
        ]
        return statistics.median(apart) if apart else None

    def _ask(self, query: PlanQuery, window: Window) -> tuple[Query, Mapping[Instance, float]]:
        """Put *query* in the measured time; its answer, and the highest of each instance."""
        scrape_seconds = self._scrape_seconds()
        seconds = plan_queries.range_seconds(window.seconds, scrape_seconds)
        promql = query.over(seconds)
        first = min(window.end, window.start + seconds) if query.has_range else window.start
        at_end = self._ours(self._prometheus.query(promql, window.end))
        steps = self._prometheus.query_range(
            promql, Window(first, window.end), scrape_seconds or _STEP_SECONDS
        )
        values = self._ours([(labels, value) for labels, series in steps for _, value in series]) + at_end
        highest: dict[Instance, float] = {}
        for labels, value in values:
            highest[instance(labels)] = max(highest.get(instance(labels), value), value)
        return (
            Query(
                promql=promql,
                unit=query.unit,
                at_end=max((value for _, value in at_end), default=None),
                highest=max(highest.values(), default=None),
                criterion=query.criterion,
            ),
            highest,
        )

    def _ours(self, found: Vector) -> Vector:
        """Without the instances that do not sell; a sum over instances stays."""
        return [
            (labels, value)
            for labels, value in found
            if "instance" not in labels or instance(labels) in self._instances
        ]


def selling(prometheus: Prometheus) -> set[Instance]:
    """The order services that *prometheus* scrapes; it may have been started just now.

    Raises:
        PrometheusError: it does not answer, or there is none.
    """
    give_up_at = time.monotonic() + _FIRST_SCRAPE_SECONDS
    while not (found := prometheus.query(plan_queries.SUCCESS)):
        if time.monotonic() > give_up_at:
            raise PrometheusError(
                f"{prometheus.url} scrapes no order service: does one run (`make run`), and is it a target?"
            )
        time.sleep(0.5)
    return {instance(labels) for labels, _ in found}
