"""The server's side of a run from Prometheus, with the plan's own queries, and the alerts that fired."""

import json
import math
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from loadtests.run_record import Replica, Server
from loadtests.samples import Window

_TIMEOUT_SECONDS = 10.0
_STEP_SECONDS = 5.0
_ALERTS_SECONDS = 5.0
_NEXT_SCRAPE_SECONDS = 60.0

# Section 2 of the performance test plan, word for word.
P95 = "histogram_quantile(0.95, rate(order_processing_seconds_bucket[1m]))"
P99 = "histogram_quantile(0.99, rate(order_processing_seconds_bucket[1m]))"
MEAN = "rate(order_processing_seconds_sum[1m]) / rate(order_processing_seconds_count[1m])"
CPU = "rate(process_cpu_seconds_total[1m])"
MEMORY = "process_resident_memory_bytes"
CONNECTIONS = "rate(db_connections_total[1m])"

Instance = tuple[str, str]  # job, instance


class PrometheusError(Exception):
    """It did not answer, or not with what was asked for."""


class Prometheus:
    """Its HTTP API: https://prometheus.io/docs/prometheus/latest/querying/api/."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def reload(self) -> None:
        """POST /-/reload: it reads its configuration again; no metric is reset by it."""
        self._send("/-/reload", method="POST")

    def query(self, promql: str, at: float | None = None) -> list[tuple[Mapping[str, str], float]]:
        """An instant vector."""
        result = self._get("/api/v1/query", query=promql, time=time.time() if at is None else at)["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def query_range(
        self, promql: str, window: Window, step_seconds: float = _STEP_SECONDS
    ) -> list[tuple[Mapping[str, str], list[tuple[float, float]]]]:
        """A matrix: (labels, [(seconds since the epoch, value)]), without NaN."""
        result = self._get(
            "/api/v1/query_range", query=promql, start=window.start, end=window.end, step=step_seconds
        )["result"]
        return [
            (series["metric"], [(at, float(v)) for at, v in series["values"] if not math.isnan(float(v))])
            for series in result
        ]

    def firing(self) -> set[tuple[str, str]]:
        """(severity, alert and its labels) of all that fire now."""
        return {
            (alert["labels"].get("severity", ""), _alert_name(alert["labels"]))
            for alert in self._get("/api/v1/alerts")["alerts"]
            if alert["state"] == "firing"
        }

    def _get(self, path: str, **query: object) -> Any:
        document = self._send(f"{path}?{urllib.parse.urlencode(query)}" if query else path)
        try:
            return json.loads(document)["data"]
        except (ValueError, KeyError, TypeError) as exc:
            raise PrometheusError(f"{self.url}{path}: not the answer of a Prometheus") from exc

    def _send(self, path: str, method: str = "GET") -> bytes:
        request = urllib.request.Request(f"{self.url}{path}", method=method)  # noqa: S310 - the operator's own URL
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310 - as above
                return bytes(answer.read())
        except (OSError, ValueError) as exc:
            raise PrometheusError(f"{self.url}{path}: {exc}") from exc


class PrometheusSampler:
    """Asks Prometheus for the same figures as `MetricsSampler` reads by itself; open it around the run."""

    source = "prometheus"

    def __init__(self, prometheus: Prometheus) -> None:
        self._prometheus = prometheus
        self.trouble: dict[str, str] = {}
        self._fired: set[tuple[str, str]] | None = None
        self._instances: set[Instance] = set()
        self._before: dict[Instance, float] = {}
        self._after: dict[Instance, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)

    def __enter__(self) -> Self:
        self._before = self._success()
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
        ended_at = time.time()
        give_up_at = ended_at + _NEXT_SCRAPE_SECONDS
        try:
            while time.time() < give_up_at:
                stamps = self._prometheus.query('timestamp(orders_total{status="success"})')
                if stamps and min(stamp for _, stamp in stamps) > ended_at:
                    break
                time.sleep(0.5)
            else:
                self.trouble[self._prometheus.url] = f"no scrape within {_NEXT_SCRAPE_SECONDS:g} s of the end"
            self._after = self._success()
            self._instances = set(self._after)
        except PrometheusError as exc:
            self.trouble[self._prometheus.url] = str(exc)

    def success_rise(self) -> float | None:
        """How much `orders_total{status="success"}` rose over the run; None where an instance restarted."""
        if self.trouble or not self._after:
            return None
        rises = [value - self._before.get(instance, 0.0) for instance, value in self._after.items()]
        return (
            sum(rises)
            if all(rise >= 0 for rise in rises) and self._before.keys() <= self._after.keys()
            else None
        )

    def now(self) -> tuple[float | None, float | None, float | None]:
        """For the live line: CPU percent of the busiest replica, pool in use, pool max."""
        try:
            figures = [self._largest(promql) for promql in (CPU, "db_pool_in_use", "db_pool_max")]
        except PrometheusError:
            return None, None, None
        cpu, in_use, pool_max = figures
        return None if cpu is None else cpu * 100, in_use, pool_max

    def server(self, window: Window, *, memory_limit_bytes: float, acknowledged: int) -> Server:
        """The figures over *window*."""
        alerts = self._fired
        fired = (
            None
            if alerts is None
            else {s: tuple(sorted(n for its, n in alerts if its == s)) for s, _ in alerts}
        )
        critical = None if fired is None else fired.get("critical", ())
        warning = None if fired is None else fired.get("warning", ())
        try:
            replicas = self._replicas(window, memory_limit_bytes)
            quantiles = [self._overall(promql, window) for promql in (MEAN, P95, P99)]
            orders = self._prometheus.query(
                f"sum by (status, error_type) (increase(orders_total[{max(1, round(window.seconds))}s]))",
                window.end,
            )
        except PrometheusError as exc:
            self.trouble[self._prometheus.url] = str(exc)
            return Server(critical_alerts=critical, warning_alerts=warning)
        mean, p95, p99 = (None if value is None else value * 1000 for value in quantiles)
        return Server(
            source="prometheus",
            replicas=replicas,
            orders_total={
                f"{labels.get('status', '')}/{labels.get('error_type', '')}".rstrip("/"): value
                for labels, value in orders
            },
            processing_mean_ms=mean,
            processing_p95_ms=p95,
            processing_p99_ms=p99,
            critical_alerts=critical,
            warning_alerts=warning,
            cpu_us_per_order=sum(r.cpu_percent_mean or 0 for r in replicas)
            / 100
            * window.seconds
            / acknowledged
            * 1e6
            if acknowledged
            else None,
        )

    def per_second(self, origin: float, seconds: range) -> Mapping[str, list[float | None]]:
        """The server's columns over *seconds* since *origin*; a value stands until the next step."""
        window = Window(origin + seconds.start, origin + seconds.stop)
        queries: Mapping[str, tuple[str, Callable[[Iterable[float]], float]]] = {
            "cpu_percent": (f"{CPU} * 100", max),
            "rss_bytes": (MEMORY, max),
            "pool_in_use": ("db_pool_in_use", max),
            "pool_max": ("db_pool_max", max),
            "batch_size": ("rate(order_batch_size_sum[1m]) / rate(order_batch_size_count[1m])", max),
            "queue_depth": ("order_batch_queue_depth", sum),
            "in_flight": ("requests_in_flight", sum),
            "breaker_state": ("circuit_breaker_state", max),
            "loop_lag_ms": ("event_loop_lag_seconds * 1000", max),
        }
        columns = {}
        for name, (promql, combine) in queries.items():
            try:
                found = self._ours(self._prometheus.query_range(promql, window))
            except PrometheusError:
                continue
            by_time: dict[float, list[float]] = {}
            for _, values in found:
                for at, value in values:
                    by_time.setdefault(at, []).append(value)
            steps = {math.floor(at - origin): float(combine(values)) for at, values in by_time.items()}
            column: list[float | None] = []
            for second in seconds:
                column.append(steps.get(second, column[-1] if column else None))
            if steps:
                columns[name] = column
        return columns

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

    def _success(self) -> dict[Instance, float]:
        try:
            found = self._prometheus.query('orders_total{status="success"}')
        except PrometheusError as exc:
            self.trouble[self._prometheus.url] = str(exc)
            return {}
        return {_instance(labels): value for labels, value in found}

    def _ours(self, found: Sequence[tuple[Mapping[str, str], Any]]) -> list[tuple[Instance, Any]]:
        """Those of the instances that sell: every program has a CPU figure."""
        return [(_instance(labels), it) for labels, it in found if _instance(labels) in self._instances]

    def _largest(self, promql: str) -> float | None:
        selling = self._success()
        found = self._prometheus.query(promql)
        return max((value for labels, value in found if _instance(labels) in selling), default=None)

    def _overall(self, promql: str, window: Window) -> float | None:
        """The highest over *window* and all instances."""
        found = self._ours(self._prometheus.query_range(promql, window))
        return max((value for _, values in found for _, value in values), default=None)

    def _replicas(self, window: Window, memory_limit_bytes: float) -> tuple[Replica, ...]:
        def values(promql: str) -> dict[Instance, list[float]]:
            found = self._ours(self._prometheus.query_range(promql, window))
            return {instance: [value for _, value in series] for instance, series in found if series}

        # The first minute's rate reaches back before the measured time, except where it is all there is.
        later = Window(min(window.end, window.start + 60), window.end)
        spent = {
            instance: [value for _, value in series]
            for instance, series in self._ours(self._prometheus.query_range(CPU, later))
        }
        resident, in_use, most = values(MEMORY), values("db_pool_in_use"), values("db_pool_max")
        replicas = []
        for instance in sorted(self._instances):
            cpu = spent.get(instance)
            replicas.append(
                Replica(
                    url=instance[1],
                    cpu_percent=max(cpu) * 100 if cpu else None,
                    cpu_percent_mean=sum(cpu) / len(cpu) * 100 if cpu else None,
                    rss_max_bytes=max(resident.get(instance, ()), default=None),
                    memory_limit_bytes=memory_limit_bytes,
                    pool_in_use_max=max(in_use.get(instance, ()), default=None),
                    pool_max=max(most.get(instance, ()), default=None),
                    restarted=self._after.get(instance, 0.0) < self._before.get(instance, 0.0),
                )
            )
        return tuple(replicas)


def _instance(labels: Mapping[str, str]) -> Instance:
    return labels.get("job", ""), labels.get("instance", "")


def _alert_name(labels: Mapping[str, str]) -> str:
    rest = ", ".join(f"{k}={v}" for k, v in sorted(labels.items()) if k not in ("alertname", "severity"))
    return f"{labels.get('alertname', '')}{{{rest}}}"
