"""The Grafana dashboards, as tables of panels; `python -m monitoring.generate` writes them as JSON.

Every panel has a unit and a description. A panel that shows what the load test judges has the limit of
loadtests/acceptance.toml drawn as a line; a limit of each profile, that of the profile which runs, or is chosen.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATASOURCE_UID = "${datasource}"  # the first variable; provisioned is the one of provisioning/datasources
# Whose series: of all targets that export an order service's metrics, those that the variables choose.
_OURS = 'namespace=~"$namespace",job=~"$job",pod=~"$pod"'
_REPLICA = "{{pod}} {{instance}}"
_BY_REPLICA = "namespace, job, pod, instance"
_OF_REPLICAS = f" and on ({_BY_REPLICA}) pod:order_replicas:info"  # every program has a CPU and a memory
ACCEPTANCE = Path(__file__).parents[1] / "loadtests" / "acceptance.toml"

_COLUMNS = 24
_HEIGHT = 7
_ORDERS_PER_SECOND = "suffix: orders/s"
_PER_SECOND = "suffix: /s"


@dataclass(frozen=True)
class Panel:
    """A graph; *criterion* names the acceptance limit to draw. A heatmap has one query, by `le`."""

    title: str
    description: str
    unit: str  # https://github.com/grafana/grafana/blob/main/packages/grafana-data/src/valueFormats/categories.ts
    asked: Sequence[tuple[str, str]]  # legend, PromQL; `{ours` stands for the matchers of the variables
    criterion: str | None = None
    kind: str = "timeseries"

    @property
    def queries(self) -> Sequence[tuple[str, str]]:
        """Each legend, and its PromQL."""
        return [
            (legend, re.sub(r"(?<=\{)ours(?=[,}])", lambda _: _OURS, expr)) for legend, expr in self.asked
        ]


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
    buckets = f"sum by (le) (rate({metric}_bucket{{ours{matcher}}}[$__rate_interval]))"
    return [(f"p{q * 100:g}", f"histogram_quantile({q}, {buckets})") for q in (0.5, 0.95, 0.99)]


def _stage(stage: str, description: str) -> Panel:
    return Panel(f"Time in {stage}", description, "s", _quantiles("order_stage_seconds", f',stage="{stage}"'))


_POOL = Panel(
    "Connection pool",
    "Share of the connections that are lent, per replica. At 100 % requests wait, then are refused.",
    "percentunit",
    [
        (
            _REPLICA,
            f"sum by ({_BY_REPLICA}) (db_pool_in_use{{ours}}) / sum by ({_BY_REPLICA}) (db_pool_max{{ours}})",
        )
    ],
    "pool",
)
_ERROR_TYPES = Panel(
    "Errors by type",
    "Orders that failed through our fault, by error_type: where to look first.",
    _ORDERS_PER_SECOND,
    [("{{error_type}}", 'sum by (error_type) (rate(orders_total{ours,status="error"}[$__rate_interval]))')],
)
_OUTCOMES = Panel(
    "Orders by outcome",
    "Orders asked for: success, replayed (an idempotent repeat), rejected (the client's fault), error (ours).",
    _ORDERS_PER_SECOND,
    [("{{status}}", "sum by (status) (rate(orders_total{ours}[$__rate_interval]))")],
)
_SHED = Panel(
    "Shed",
    "Orders and other requests that were refused to protect the rest, by where: admission, queue, pool.",
    _PER_SECOND,
    [("{{reason}}", "sum by (reason) (rate(requests_shed_total{ours}[$__rate_interval]))")],
)
_IN_FLIGHT = Panel(
    "In flight",
    "Orders and other requests that are admitted and not yet answered, per replica; MAX_IN_FLIGHT (2000) is the most.",
    "short",
    [(_REPLICA, "requests_in_flight{ours}")],
)
_QUEUE_DEPTH = Panel(
    "Batch queue",
    "Orders that wait for their batch to start, per replica.",
    "short",
    [(_REPLICA, "order_batch_queue_depth{ours}")],
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
                    [
                        (
                            "{{method}} {{route}}",
                            "sum by (method, route) (rate(http_requests_total{ours}[$__rate_interval]))",
                        )
                    ],
                ),
                Panel(
                    "Request time",
                    "95th percentile from a request's headers to the last byte of its answer, by route.",
                    "s",
                    [
                        (
                            "{{route}}",
                            (
                                "histogram_quantile(0.95, sum by (route, le) "
                                "(rate(http_request_seconds_bucket{ours}[$__rate_interval])))"
                            ),
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
                    [
                        (
                            "{{cache}} {{result}}",
                            "sum by (cache, result) (rate(cache_requests_total{ours}[$__rate_interval]))",
                        )
                    ],
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
                            (
                                "sum(rate(order_batch_size_sum{ours}[$__rate_interval]))"
                                " / sum(rate(order_batch_size_count{ours}[$__rate_interval]))"
                            ),
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
                    "Orders stored. The line is the plan's rate for the profile that runs, or that is chosen above.",
                    _ORDERS_PER_SECOND,
                    [("stored", 'sum(rate(orders_total{ours,status="success"}[$__rate_interval]))')],
                    "throughput",
                ),
                Panel(
                    "Error rate",
                    "Share of the orders that failed through our fault.",
                    "percentunit",
                    [
                        (
                            "{{job}}",
                            (
                                'sum by (namespace, job) (rate(orders_total{ours,status="error"}[$__rate_interval]))'
                                " / sum by (namespace, job) (rate(orders_total{ours}[$__rate_interval]))"
                            ),
                        )
                    ],
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
                    [
                        (
                            "{{job}}",
                            (
                                "histogram_quantile(0.95, sum by (namespace, job, le) "
                                "(rate(order_processing_seconds_bucket{ours}[$__rate_interval])))"
                            ),
                        )
                    ],
                    "latency_p95",
                ),
                Panel(
                    "99th percentile",
                    "Processing time that 99 % of the orders stay below.",
                    "s",
                    [
                        (
                            "{{job}}",
                            (
                                "histogram_quantile(0.99, sum by (namespace, job, le) "
                                "(rate(order_processing_seconds_bucket{ours}[$__rate_interval])))"
                            ),
                        )
                    ],
                    "latency_p99",
                ),
                Panel(
                    "Average",
                    "Mean processing time of an order.",
                    "s",
                    [
                        (
                            "{{job}}",
                            (
                                "sum by (namespace, job) (rate(order_processing_seconds_sum{ours}[$__rate_interval]))"
                                " / sum by (namespace, job) "
                                "(rate(order_processing_seconds_count{ours}[$__rate_interval]))"
                            ),
                        )
                    ],
                    "latency_mean",
                ),
            ],
        ),
        Row(
            "Latencies",
            [
                Panel(
                    "Orders by processing time",
                    "How many orders took how long: two humps, or a few that are far off, are in no percentile.",
                    "s",
                    [
                        (
                            "{{le}}",
                            "sum by (le) (increase(order_processing_seconds_bucket{ours}[$__rate_interval]))",
                        )
                    ],
                    kind="heatmap",
                ),
            ],
        ),
        Row(
            "Resources",
            [
                Panel(
                    "CPU",
                    "Share of one core, per replica; Python has one. The autoscaler aims at the line, too.",
                    "percentunit",
                    [
                        (
                            _REPLICA,
                            f"sum by ({_BY_REPLICA}) (rate(process_cpu_seconds_total{{ours}}[$__rate_interval]))"
                            + _OF_REPLICAS,
                        )
                    ],
                    "cpu",
                ),
                Panel(
                    "Memory",
                    "Resident memory as a share of 2 GiB, per replica.",
                    "percentunit",
                    [
                        (
                            _REPLICA,
                            f"sum by ({_BY_REPLICA}) (process_resident_memory_bytes{{ours}}) / (2 * 1024 ^ 3)"
                            + _OF_REPLICAS,
                        )
                    ],
                    "memory",
                ),
                _POOL,
                Panel(
                    "New connections",
                    "Connections to the database that were opened, or failed to open.",
                    _PER_SECOND,
                    [(_REPLICA + " {{outcome}}", "rate(db_connections_total{ours}[$__rate_interval])")],
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
                    [
                        (
                            "critical",
                            (
                                'count(ALERTS{alertstate="firing",severity="critical",namespace=~"$namespace"})'
                                " or vector(0)"
                            ),
                        )
                    ],
                    "critical_alerts",
                ),
                Panel(
                    "Warnings",
                    "Alerts of severity warning that fire now; the report counts all that fired during the run.",
                    "short",
                    [
                        (
                            "warning",
                            (
                                'count(ALERTS{alertstate="firing",severity="warning",namespace=~"$namespace"})'
                                " or vector(0)"
                            ),
                        )
                    ],
                    "warning_alerts",
                ),
                Panel(
                    "Critical errors",
                    "Orders that met a defect of the service in the last minute.",
                    "short",
                    [
                        (
                            "internal",
                            'sum(increase(orders_total{ours,error_type="internal"}[$__rate_interval]))',
                        )
                    ],
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
                    [(_REPLICA + " {{breaker}}", "circuit_breaker_state{ours}")],
                ),
                Panel(
                    "Breaker transitions",
                    "Changes of state in the last 5 minutes, by the state entered.",
                    "short",
                    [
                        (
                            "{{breaker}} {{to}}",
                            "sum by (breaker, to) (increase(circuit_breaker_transitions_total{ours}[5m])) or vector(0)",
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
                            "sum by (operation, outcome) (rate(retries_total{ours}[$__rate_interval])) or vector(0)",
                        )
                    ],
                ),
                Panel(
                    "Connections",
                    "Connections that are open, per replica, and the most there can be.",
                    "short",
                    [(_REPLICA + " open", "db_pool_size{ours}"), (_REPLICA + " most", "db_pool_max{ours}")],
                ),
            ],
        ),
        Row(
            "Limits",
            [_IN_FLIGHT, _QUEUE_DEPTH, _POOL, _POOL_WAIT],
        ),
        Row("Refusals", [_SHED, _ERROR_TYPES]),
        Row(
            "Payments",
            [
                Panel(
                    "Payments backlog",
                    "Orders about which payments is still to be asked; each replica counts those of all.",
                    "short",
                    [("due", "max(payments_pending{ours})")],
                ),
                Panel(
                    "Age of the backlog",
                    "How long the oldest pending order has waited for payments; it grows while payments is away.",
                    "s",
                    [("oldest", "max(payments_oldest_pending_seconds{ours})")],
                ),
                Panel(
                    "Payments",
                    "Orders asked about, by what came of it; those failed and refused are asked about again.",
                    _ORDERS_PER_SECOND,
                    [("{{outcome}}", "sum by (outcome) (rate(payments_total{ours}[$__rate_interval]))")],
                ),
                Panel(
                    "Time payments takes",
                    "Time to answer one attempt, or until it was given up.",
                    "s",
                    _quantiles("payment_seconds"),
                ),
            ],
        ),
        Row(
            "Faults on demand",
            [
                Panel(
                    "Faults that are on",
                    "Faults that somebody asked for through /faults, by kind.",
                    "short",
                    [("{{fault}}", "sum by (fault) (fault_injection_active{ours})")],
                ),
                Panel(
                    "Hits of faults",
                    "Requests, attempts at payments, connections and moments that they have hit.",
                    _PER_SECOND,
                    [
                        (
                            "{{fault}}",
                            "sum by (fault) (rate(fault_injection_hits_total{ours}[$__rate_interval]))",
                        )
                    ],
                ),
            ],
        ),
        Row(
            "Process",
            [
                Panel(
                    "Event loop lag",
                    "The longest delay of a timer in the last 15 s: for so long the loop answered nobody.",
                    "s",
                    [(_REPLICA, "event_loop_lag_seconds{ours}")],
                ),
                Panel(
                    "Open files",
                    "File descriptors in use, as a share of the process's limit; each client connection is one.",
                    "percentunit",
                    [
                        (
                            _REPLICA,
                            f"sum by ({_BY_REPLICA}) (process_open_fds{{ours}})"
                            f" / sum by ({_BY_REPLICA}) (process_max_fds{{ours}})" + _OF_REPLICAS,
                        )
                    ],
                ),
                Panel(
                    "Log lines dropped",
                    "Lines that were dropped because whatever reads the log could not keep up.",
                    _PER_SECOND,
                    [(_REPLICA, "rate(log_lines_dropped_total{ours}[$__rate_interval])")],
                ),
                Panel(
                    "Replicas",
                    "Replicas that can be scraped, by version.",
                    "short",
                    [("{{version}}", "sum by (version) (build_info{ours})")],
                ),
            ],
        ),
    ],
)

DASHBOARDS = (ORDER_PATH, LOAD_TEST, RESILIENCE)


def acceptance_limits() -> Mapping[str, Mapping[str, float]]:
    """By criterion, what to draw, in the unit of its panel: a limit by profile, or one for every profile, by ""."""
    criteria: list[dict[str, Any]] = tomllib.loads(ACCEPTANCE.read_text())["criteria"]
    scales = {"ms": 1000, "%": 100}
    limits = {}
    for criterion in criteria:
        limit = criterion["limit"]
        by_profile = limit if isinstance(limit, dict) else {"": limit}
        scale = scales.get(criterion["unit"], 1)
        limits[criterion["name"]] = {profile: number / scale for profile, number in by_profile.items()}
    return limits


def profiles() -> Sequence[str]:
    """Those that have a limit of their own, in their order."""
    return [
        profile for profile in dict.fromkeys(p for by in acceptance_limits().values() for p in by) if profile
    ]


def filled(promql: str, window: str = "5m") -> str:
    """*promql* as Grafana asks it, with "All" chosen everywhere, the first profile, and *window* as its interval."""
    text = promql.replace("$__rate_interval", window).replace("$profile", profiles()[0])
    return re.sub(r"\$(namespace|job|pod)\b", ".*", text)


def _limit_query(by_profile: Mapping[str, float]) -> str:
    """The limit of the profile that a load test says it runs; where none does, of the one that is chosen.

    A load test says so by a gauge, `loadtest_running{profile="..."}`, which is 1 from its beginning to its end.
    """

    def labelled(value: str, profile: str) -> str:
        return f'label_replace(vector({value}), "profile", "{profile}", "", "")'

    limits = " or ".join(labelled(f"{number:g}", profile) for profile, number in by_profile.items())
    running = "max by (profile) (loadtest_running == 1)"
    chosen = f"({labelled('1', '$profile')} unless on () {running})"
    return f"({limits}) and on (profile) ({running} or {chosen})"


_DATASOURCE = {"type": "prometheus", "uid": DATASOURCE_UID}


def _variables() -> Sequence[dict[str, Any]]:
    """Data source, namespace, job, pod and profile; "All" is also what has no such label."""
    chosen = ""
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    ]
    for label in ("namespace", "job", "pod"):
        variables.append(
            {
                "name": label,
                "label": label.capitalize(),
                "type": "query",
                "datasource": _DATASOURCE,
                "query": f"label_values(db_pool_max{{{chosen}}}, {label})",
                "refresh": 2,  # whenever the time changes: pods come and go
                "sort": 1,
                "multi": True,
                "includeAll": True,
                "allValue": ".*",
                "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
            }
        )
        chosen += f'{"," if chosen else ""}{label}=~"${label}"'
    names = profiles()
    variables.append(
        {
            "name": "profile",
            "label": "Limits of",
            "type": "custom",
            "query": ",".join(names),
            "options": [{"selected": name == names[0], "text": name, "value": name} for name in names],
            "current": {"selected": True, "text": names[0], "value": names[0]},
        }
    )
    return variables


def _annotations() -> Sequence[dict[str, Any]]:
    """The time of each load test, from its beginning to its end, and the critical alerts."""
    return [
        {
            "name": "Load tests",
            "enable": True,
            "iconColor": "blue",
            "datasource": _DATASOURCE,
            "expr": "max by (profile, run) (loadtest_running == 1)",
            "step": "5s",
            "titleFormat": "load test: {{profile}}",
            "textFormat": "{{run}}",
        },
        {
            "name": "Critical alerts",
            "enable": True,
            "iconColor": "red",
            "datasource": _DATASOURCE,
            "expr": 'ALERTS{alertstate="firing",severity="critical",namespace=~"$namespace"}',
            "step": "15s",
            "titleFormat": "{{alertname}}",
            "textFormat": "{{job}} {{pod}} {{instance}}",
        },
    ]


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
        "templating": {"list": _variables()},
        "annotations": {"list": _annotations()},
        "links": [
            {"type": "dashboards", "title": "Order service", "tags": ["order-service"], "asDropdown": False}
        ],
        "panels": panels,
    }


def _render(panel: Panel, identity: int, place: Mapping[str, int]) -> dict[str, Any]:
    limits = acceptance_limits()[panel.criterion] if panel.criterion else {}
    queries = [*panel.queries]
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    overrides: list[dict[str, Any]] = []
    if "" in limits:
        steps.append({"color": "red", "value": limits[""]})
    elif limits:
        queries.append(("limit: {{profile}}", _limit_query(limits)))
        line = [("color", {"mode": "fixed", "fixedColor": "red"}), ("custom.fillOpacity", 0)]
        overrides.append(
            {
                "matcher": {"id": "byRegexp", "options": "^limit: "},
                "properties": [{"id": name, "value": value} for name, value in line],
            }
        )
    common: dict[str, Any] = {
        "id": identity,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "gridPos": dict(place),
        "datasource": _DATASOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + n),
                "datasource": _DATASOURCE,
                "expr": expr,
                "legendFormat": legend,
                **({"format": "heatmap"} if panel.kind == "heatmap" else {}),
            }
            for n, (legend, expr) in enumerate(queries)
        ],
    }
    if panel.kind == "heatmap":
        return {
            **common,
            "fieldConfig": {"defaults": {}, "overrides": []},
            "options": {
                "calculate": False,
                "yAxis": {"unit": panel.unit, "axisPlacement": "left"},
                "color": {"mode": "scheme", "scheme": "Blues", "steps": 64},
                "cellGap": 1,
                "filterValues": {"le": 1e-9},
                "tooltip": {"mode": "single"},
                "legend": {"show": True},
            },
        }
    return {
        **common,
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "custom": {
                    "thresholdsStyle": {"mode": "line" if "" in limits else "off"},
                    "fillOpacity": 10,
                },
                "thresholds": {"mode": "absolute", "steps": steps},
            },
            "overrides": overrides,
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi"},
        },
    }
