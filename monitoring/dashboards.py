"""The Grafana dashboards, as tables of panels; `python -m monitoring.generate` writes them as JSON.

Every panel has a unit and a description. A panel that shows what the load test judges has the limit of
loadtests/acceptance.toml drawn as a line. The windows are a minute, as in the performance test plan.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATASOURCE_UID = "prometheus"  # provisioning/datasources/prometheus.yml gives it
ACCEPTANCE = Path(__file__).parents[1] / "loadtests" / "acceptance.toml"

_COLUMNS = 24
_HEIGHT = 7
_ORDERS_PER_SECOND = "suffix: orders/s"
_PER_SECOND = "suffix: /s"


@dataclass(frozen=True)
class Panel:
    """A graph of *queries* (legend, PromQL); *criterion* names the acceptance limit to draw."""

    title: str
    description: str
    unit: str  # https://github.com/grafana/grafana/blob/main/packages/grafana-data/src/valueFormats/categories.ts
    queries: Sequence[tuple[str, str]]
    criterion: str | None = None


@dataclass(frozen=True)
class Row:
    """Panels side by side, under a title."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Dashboard:
    """`uid` is also the name of its file."""

    uid: str
    title: str
    description: str
    rows: Sequence[Row]

    @property
    def panels(self) -> Sequence[Panel]:
        """All of them, in order."""
        return [panel for row in self.rows for panel in row.panels]


def _quantiles(metric: str, matcher: str = "") -> Sequence[tuple[str, str]]:
    buckets = f"sum by (le) (rate({metric}_bucket{matcher}[1m]))"
    return [(f"p{q * 100:g}", f"histogram_quantile({q}, {buckets})") for q in (0.5, 0.95, 0.99)]


def _stage(stage: str, description: str) -> Panel:
    return Panel(
        f"Time in {stage}", description, "s", _quantiles("order_stage_seconds", f'{{stage="{stage}"}}')
    )


_POOL = Panel(
    "Connection pool",
    "Share of the connections that are lent, per replica. At 100 % requests wait, then are refused.",
    "percent",
    [("{{instance}}", "instance:db_pool:percent")],
    "pool",
)
_ERROR_TYPES = Panel(
    "Errors by type",
    "Orders that failed through our fault, by error_type: where to look first.",
    _ORDERS_PER_SECOND,
    [("{{error_type}}", "sum by (error_type) (job_error_type:orders:error_rate_1m)")],
)
_OUTCOMES = Panel(
    "Orders by outcome",
    "Orders asked for: success, replayed (an idempotent repeat), rejected (the client's fault), error (ours).",
    _ORDERS_PER_SECOND,
    [("{{status}}", "sum by (status) (rate(orders_total[1m]))")],
)
_SHED = Panel(
    "Shed",
    "Orders and other requests that were refused to protect the rest, by where: admission, queue, pool.",
    _PER_SECOND,
    [("{{reason}}", "sum by (reason) (rate(requests_shed_total[1m]))")],
)
_IN_FLIGHT = Panel(
    "In flight",
    "Orders and other requests that are admitted and not yet answered, per replica; MAX_IN_FLIGHT (2000) is the most.",
    "short",
    [("{{instance}}", "requests_in_flight")],
)
_QUEUE_DEPTH = Panel(
    "Batch queue",
    "Orders that wait for their batch to start, per replica.",
    "short",
    [("{{instance}}", "order_batch_queue_depth")],
)
_POOL_WAIT = Panel(
    "Wait for a connection",
    "How long requests waited for a connection; past DB_ACQUIRE_TIMEOUT_SECONDS (1 s) they are refused.",
    "s",
    _quantiles("db_pool_wait_seconds"),
)

ORDER_PATH = Dashboard(
    "order-path",
    "Order path",
    "An order's life from top to bottom, one row per stage.",
    [
        Row(
            "Arrive",
            [
                Panel(
                    "Requests",
                    "HTTP requests answered, by route.",
                    "reqps",
                    [("{{method}} {{route}}", "sum by (method, route) (rate(http_requests_total[1m]))")],
                ),
                Panel(
                    "Request time",
                    "95th percentile from a request's headers to the last byte of its answer, by route.",
                    "s",
                    [
                        (
                            "{{route}}",
                            "histogram_quantile(0.95, sum by (route, le) (rate(http_request_seconds_bucket[1m])))",
                        )
                    ],
                ),
            ],
        ),
        Row("Admit", [_IN_FLIGHT, _SHED]),
        Row("Parse", [_stage("parse", "Reading the body and checking it against the contract.")]),
        Row(
            "Price",
            [
                _stage(
                    "price", "Prices from the cached catalogue; from the database where the cache has none."
                ),
                Panel(
                    "Cache look-ups",
                    "stale: the database was away; coalesced: another's load was joined.",
                    _PER_SECOND,
                    [("{{cache}} {{result}}", "sum by (cache, result) (rate(cache_requests_total[1m]))")],
                ),
            ],
        ),
        Row(
            "Queue",
            [
                _stage(
                    "queue",
                    "Waiting for the writer; past BATCH_MAX_WAIT_SECONDS (0.5 s) an order is refused.",
                ),
                _QUEUE_DEPTH,
                Panel(
                    "Orders per batch",
                    "Mean number of orders that one commit stores: it grows by itself under load, up to 100.",
                    "short",
                    [
                        (
                            "mean",
                            "sum(rate(order_batch_size_sum[1m])) / sum(rate(order_batch_size_count[1m]))",
                        )
                    ],
                ),
            ],
        ),
        Row(
            "Store",
            [
                _stage("store", "The round trip to the database and its commit, attempts included."),
                _POOL,
                _POOL_WAIT,
            ],
        ),
        Row(
            "Respond",
            [_stage("respond", "From the stored batch to the written answer."), _OUTCOMES, _ERROR_TYPES],
        ),
    ],
)

LOAD_TEST = Dashboard(
    "load-test",
    "Load test",
    "What the report of a load test shows, live, with its limits. The report measures latency at the client, this at "
    "the server: under overload the client also waits for its order to be read.",
    [
        Row(
            "Orders",
            [
                Panel(
                    "Throughput",
                    "Orders stored. The lines are the plan's rates: normal, peak, stress.",
                    _ORDERS_PER_SECOND,
                    [("stored", 'sum(rate(orders_total{status="success"}[1m]))')],
                    "throughput",
                ),
                Panel(
                    "Error rate",
                    "Share of the orders that failed through our fault.",
                    "percent",
                    [("{{job}}", "job:orders:error_percent_1m")],
                    "error_rate",
                ),
                _OUTCOMES,
                _ERROR_TYPES,
            ],
        ),
        Row(
            "Latency",
            [
                Panel(
                    "95th percentile",
                    "Processing time that 95 % of the orders stay below.",
                    "s",
                    [("{{job}}", "job:order_processing_seconds:p95_1m")],
                    "latency_p95",
                ),
                Panel(
                    "99th percentile",
                    "Processing time that 99 % of the orders stay below.",
                    "s",
                    [("{{job}}", "job:order_processing_seconds:p99_1m")],
                    "latency_p99",
                ),
                Panel(
                    "Average",
                    "Mean processing time of an order.",
                    "s",
                    [("{{job}}", "job:order_processing_seconds:mean_1m")],
                    "latency_mean",
                ),
            ],
        ),
        Row(
            "Resources",
            [
                Panel(
                    "CPU",
                    "Share of one core, per replica. One process runs Python on one core at a time.",
                    "percent",
                    [("{{instance}}", "instance:process_cpu:percent_1m")],
                    "cpu",
                ),
                Panel(
                    "Memory",
                    "Resident memory as a share of 2 GiB, per replica.",
                    "percent",
                    [("{{instance}}", "instance:process_memory:percent")],
                    "memory",
                ),
                _POOL,
                Panel(
                    "New connections",
                    "Connections to the database that were opened, or failed to open.",
                    _PER_SECOND,
                    [("{{instance}} {{outcome}}", "rate(db_connections_total[1m])")],
                ),
            ],
        ),
        Row(
            "Alerts",
            [
                Panel(
                    "Critical alerts",
                    "Alerts of severity critical that fire now; one during a run fails it.",
                    "short",
                    [("critical", 'count(ALERTS{alertstate="firing",severity="critical"}) or vector(0)')],
                    "critical_alerts",
                ),
                Panel(
                    "Warnings",
                    "Alerts of severity warning that fire now; the report counts all that fired during the run.",
                    "short",
                    [("warning", 'count(ALERTS{alertstate="firing",severity="warning"}) or vector(0)')],
                    "warning_alerts",
                ),
                Panel(
                    "Critical errors",
                    "Orders that met a defect of the service in the last minute.",
                    "short",
                    [("internal", 'sum(increase(orders_total{error_type="internal"}[1m]))')],
                    "critical_errors",
                ),
            ],
        ),
    ],
)

RESILIENCE = Dashboard(
    "resilience",
    "Resilience and saturation",
    "How the service protects itself, and how near it is to its limits.",
    [
        Row(
            "Database",
            [
                Panel(
                    "Circuit breaker",
                    "0 closed, 1 half-open, 2 open: while postgres is not closed orders are refused at once, "
                    "while postgres_reads is not, reads.",
                    "short",
                    [("{{instance}} {{breaker}}", "circuit_breaker_state")],
                ),
                Panel(
                    "Breaker transitions",
                    "Changes of state in the last 5 minutes, by the state entered.",
                    "short",
                    [
                        (
                            "{{to}}",
                            "sum by (to) (increase(circuit_breaker_transitions_total[5m])) or vector(0)",
                        )
                    ],
                ),
                Panel(
                    "Retries",
                    "Repeated attempts, by what they led to; budget_exhausted where one was not made.",
                    _PER_SECOND,
                    [
                        (
                            "{{operation}} {{outcome}}",
                            "sum by (operation, outcome) (rate(retries_total[1m])) or vector(0)",
                        )
                    ],
                ),
                Panel(
                    "Connections",
                    "Connections that are open, per replica, and the most there can be.",
                    "short",
                    [("{{instance}} open", "db_pool_size"), ("{{instance}} most", "db_pool_max")],
                ),
            ],
        ),
        Row(
            "Limits",
            [_IN_FLIGHT, _QUEUE_DEPTH, _POOL, _POOL_WAIT],
        ),
        Row("Refusals", [_SHED, _ERROR_TYPES]),
        Row(
            "Process",
            [
                Panel(
                    "Event loop lag",
                    "The longest delay of a timer in the last 15 s: for so long the loop answered nobody.",
                    "s",
                    [("{{instance}}", "event_loop_lag_seconds")],
                ),
                Panel(
                    "Open files",
                    "File descriptors in use, as a share of the process's limit; each client connection is one.",
                    "percent",
                    [
                        (
                            "{{instance}}",
                            "process_open_fds / process_max_fds * 100 and on (job, instance) db_pool_max",
                        )
                    ],
                ),
                Panel(
                    "Log lines dropped",
                    "Lines that were dropped because whatever reads the log could not keep up.",
                    _PER_SECOND,
                    [("{{instance}}", "rate(log_lines_dropped_total[1m])")],
                ),
                Panel(
                    "Replicas",
                    "Replicas that can be scraped, by version.",
                    "short",
                    [("{{version}}", "sum by (version) (build_info)")],
                ),
            ],
        ),
    ],
)

DASHBOARDS = (ORDER_PATH, LOAD_TEST, RESILIENCE)


def acceptance_limits() -> Mapping[str, Sequence[float]]:
    """By criterion, what to draw, in the unit of its panel: one limit, or one for each profile, rising."""
    criteria: list[dict[str, Any]] = tomllib.loads(ACCEPTANCE.read_text())["criteria"]
    limits = {}
    for criterion in criteria:
        limit = criterion["limit"]
        scale = 1000 if criterion["unit"] == "ms" else 1
        limits[criterion["name"]] = [
            number / scale for number in sorted(limit.values() if isinstance(limit, dict) else [limit])
        ]
    return limits


def render(dashboard: Dashboard) -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row in dashboard.rows:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"h": 1, "w": _COLUMNS, "x": 0, "y": y},
                "panels": [],
            }
        )
        width = _COLUMNS // len(row.panels)
        for column, panel in enumerate(row.panels):
            place = {"h": _HEIGHT, "w": width, "x": column * width, "y": y + 1}
            panels.append(_render(panel, len(panels) + 1, place))
        y += 1 + _HEIGHT
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["order-service"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "timepicker": {},
        "templating": {"list": []},
        "annotations": {"list": []},
        "links": [
            {"type": "dashboards", "title": "Order service", "tags": ["order-service"], "asDropdown": False}
        ],
        "panels": panels,
    }


def _render(panel: Panel, identity: int, place: Mapping[str, int]) -> dict[str, Any]:
    datasource = {"type": "prometheus", "uid": DATASOURCE_UID}
    limits = acceptance_limits()[panel.criterion] if panel.criterion else []
    floor = panel.criterion == "throughput"  # the only one that must be reached
    steps: list[dict[str, Any]] = [{"color": "red" if floor else "green", "value": None}]
    steps += [{"color": "green" if floor else "red", "value": limit} for limit in limits]
    return {
        "id": identity,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "gridPos": dict(place),
        "datasource": datasource,
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "custom": {"thresholdsStyle": {"mode": "line" if limits else "off"}, "fillOpacity": 10},
                "thresholds": {"mode": "absolute", "steps": steps},
            },
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi"},
        },
        "targets": [
            {"refId": chr(ord("A") + n), "datasource": datasource, "expr": expr, "legendFormat": legend}
            for n, (legend, expr) in enumerate(panel.queries)
        ],
    }
