"""The server's side of a run from a Prometheus: the plan's own queries, the samples behind them, and the alerts."""

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Self
from urllib.parse import urlsplit

from loadtests.run_record import Query, ServiceFigures
from loadtests.samples import Window
from loadtests.service_side import plan_queries
from loadtests.service_side.alerts import Alerts, alerts_of
from loadtests.service_side.plan_queries import CPU, MEMORY, PLAN_QUERIES, PlanQuery
from loadtests.service_side.prometheus import Instance, Prometheus, PrometheusError, Vector, instance
from loadtests.service_side.readings import Labels, Limits, Page, Pages, Readings

_FIRST_SCRAPE_SECONDS = 30.0  # Prometheus takes 5 s to read whom to scrape
_NEXT_SCRAPE_SECONDS = 60.0
_LOOK_BACK_SECONDS = 60.0  # for the last scrape before the run
_STEP_SECONDS = 5.0  # where the scrapes do not say how far they are apart

# What the service itself says of a series; the others are of whoever scrapes it.
_OWN_LABELS = {"status", "error_type", "le", "stage", "to", "breaker", "operation", "outcome", "reason"}


class PrometheusSampler:
    """Asks Prometheus for the same figures as `MetricsSampler` reads by itself; open it around the run.

    Args:
        urls: pages of what is tested: their jobs are ours, and other order services' are not. Without one that
            Prometheus scrapes, all order services are.
    """

    def __init__(self, prometheus: Prometheus, urls: Sequence[str] = ()) -> None:
        self._prometheus = prometheus
        self.trouble: dict[str, str] = {}
        self._urls = urls
        self._alerts = Alerts()
        self._others: set[str] = set()  # jobs of other order services
        self._before: set[Instance] = set()
        self._instances: set[Instance] = set()  # those that sold, whenever: every program has a CPU figure
        self._replicas: Mapping[Instance, Pages] = {}
        self._began_at = 0.0

    def __enter__(self) -> Self:
        """Begin.

        Raises:
            PrometheusError: it does not answer, or scrapes no order service.
        """
        self._prometheus.set_clock()
        found = selling(self._prometheus)
        addresses = {urlsplit(url).netloc for url in self._urls}
        pages = self._prometheus.scraped_urls()
        jobs = {its[0] for its in found if urlsplit(pages.get(its, "")).netloc in addresses}
        self._others = {job for job, _ in found} - jobs if jobs else set()
        self._before = {its for its in found if its[0] not in self._others}
        self._began_at = time.time()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def unread(self) -> str:
        """Why the rise of the counters is not known; empty: it is."""
        return "; ".join(self.trouble.values())

    def finish(self) -> None:
        """Wait until every instance was scraped once more: everything that was asked for has ended."""
        try:
            last = self._wait_for_scrape()
            run = Window(self._began_at, time.time())
            seen = self._prometheus.samples(plan_queries.SUCCESS, run)
            self._instances = self._before | {
                instance(labels) for labels, _ in seen if labels.get("job", "") not in self._others
            }
            self._replicas = self._read()
            for its in self._instances & self._replicas.keys():
                self._replicas[its].gone = its not in last
            self._alerts = alerts_of(self._prometheus, run, self._instances, self._others)
        except PrometheusError as exc:
            self.trouble[self._prometheus.url] = str(exc)
            self._alerts = Alerts(trouble=str(exc))

    def success_rise(self) -> float | None:
        """The rise of `orders_total{status="success"}` over the run; None where an instance restarted or is gone."""
        if self.trouble or not self._before <= self._instances:
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

    def server(self, window: Window, *, limits: Limits) -> ServiceFigures:
        """The figures over *window*."""
        server = dataclasses.replace(
            Readings([*self._replicas.values()]).server(window, source="prometheus", limits=limits),
            critical_alerts=self._alerts.critical,
            warning_alerts=self._alerts.warning,
            alerts_trouble=self._alerts.trouble,
            alerts_before=self._alerts.before,
            clock_ahead_seconds=self._prometheus.ahead_seconds,
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
                    cpu_percent=cpu[its] * 100 if its in cpu else replica.cpu_percent,
                    rss_max_bytes=resident.get(its, replica.rss_max_bytes),
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

    def _wait_for_scrape(self) -> set[Instance]:
        """Wait for a scrape of every instance that still is there; those that are, or else all that were."""
        ended_at = time.time() + self._prometheus.ahead_seconds
        give_up_at = time.monotonic() + _NEXT_SCRAPE_SECONDS
        while time.monotonic() < give_up_at:
            stamps = {
                instance(labels): stamp
                for labels, stamp in self._prometheus.query(plan_queries.LAST_SCRAPE)
                if labels.get("job", "") not in self._others
            }
            up = {instance(labels) for labels, value in self._prometheus.query("up") if value}
            if stamps and min(stamps.values()) > ended_at:
                return {*stamps}
            if not up & {*stamps, *self._before} and not stamps:
                return set()  # all are gone, and Prometheus knows
            time.sleep(0.5)
        self.trouble[self._prometheus.url] = f"no scrape within {_NEXT_SCRAPE_SECONDS:g} s of the end"
        return {*self._before}

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
