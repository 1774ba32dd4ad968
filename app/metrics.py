"""All metrics of the service, in the order a request meets them.

Names are the contract with the load tests, the rules, the alerts and the dashboards. Labels are closed sets: a
route is its template, never a path. Base units: seconds, bytes, counts.
"""

import contextlib
from collections.abc import Mapping
from typing import Literal, get_args

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    REGISTRY,
    Gauge,
    disable_created_metrics,
)
from prometheus_client import Counter as LockedCounter

from app.errors import ErrorType, ShedReason
from app.light_metrics import Counter, Histogram

disable_created_metrics()  # type: ignore[no-untyped-call]  # the _created series nearly double a scrape and nobody reads them
REGISTRY.unregister(GC_COLLECTOR)
REGISTRY.unregister(PLATFORM_COLLECTOR)

ORDER_STAGES = ("parse", "price", "queue", "store", "respond")

# status -> the error types it can carry: every valid combination, and no other.
ORDER_OUTCOMES: Mapping[str, tuple[ErrorType | Literal[""], ...]] = {
    "success": ("",),
    "replayed": ("",),
    "rejected": (
        "validation",
        "unauthorized",
        "too_large",
        "unknown_product",
        "out_of_stock",
        "idempotency_mismatch",
    ),
    "error": ("overloaded", "circuit_open", "database", "timeout", "internal"),
}

_LATENCY_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    10.0,
)
_STAGE_BUCKETS = (
    0.00005,
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    5.0,
)

# --- every request -------------------------------------------------------------------------------------------
# Read by: dashboard "Order path".
HTTP_REQUESTS = Counter(
    "http_requests_total",
    "HTTP requests by the status of their answer; 0 where none was begun.",
    ["method", "route", "status"],
)
HTTP_REQUEST_SECONDS = Histogram(
    "http_request_seconds",
    "Seconds the application took for a request, from its headers to the end of its answer.",
    ["route"],
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0),
)

# --- admission -----------------------------------------------------------------------------------------------
# Read by: autoscaling (saturation per replica); OrdersShed; dashboards "Order path", "Resilience and saturation".
REQUESTS_IN_FLIGHT = Gauge(
    "requests_in_flight", "Requests of the API now admitted and not yet answered; a batch counts its orders."
)
REQUESTS_SHED = Counter(
    "requests_shed_total", "Orders refused to protect the rest, by the limit that was reached.", ["reason"]
)
SHED_REASONS: tuple[ShedReason, ...] = get_args(ShedReason)

# --- the order -----------------------------------------------------------------------------------------------
# Read by: the plan's latency queries, the acceptance criteria, OrderLatencyP95, OrderLatencyP99, OrderLatencyMean;
# dashboard "Load test". No labels: the plan's queries sum none.
ORDER_PROCESSING_SECONDS = Histogram(
    "order_processing_seconds",
    "Seconds from an order's arrival to its answer, for every order taken into processing, whatever its outcome.",
    buckets=_LATENCY_BUCKETS,
)
# Read by: the plan's error-rate queries, the load test's ledger; OrderErrorRate, InternalErrors, ErrorBudgetBurnFast,
# ErrorBudgetBurnSlow, NoTraffic; every dashboard.
ORDERS = Counter("orders_total", "Orders asked for, by what became of them.", ["status", "error_type"])
# Read by: `make profile`; BatchQueueNearLimit; dashboard "Order path".
ORDER_STAGE_SECONDS = Histogram(
    "order_stage_seconds",
    "Seconds an order spent in each stage that it came to.",
    ["stage"],
    buckets=_STAGE_BUCKETS,
)

# --- batching ------------------------------------------------------------------------------------------------
# Read by: dashboards "Order path", "Resilience and saturation".
ORDER_BATCH_SIZE = Histogram(
    "order_batch_size",
    "Orders sent to the database by one call, repeated ones included.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 100, 128),
)
ORDER_BATCH_QUEUE_DEPTH = Gauge("order_batch_queue_depth", "Orders waiting for their batch to start.")

# --- the cache -----------------------------------------------------------------------------------------------
# Read by: dashboard "Order path".
CACHE_REQUESTS = Counter("cache_requests_total", "Cache look-ups by result.", ["cache", "result"])
CACHE_NAMES = ("products", "product_pages")
CACHE_RESULTS = ("hit", "miss", "stale", "coalesced")

# --- resilience ----------------------------------------------------------------------------------------------
# Read by: CircuitBreakerOpen; dashboard "Resilience and saturation".
# breaker: "postgres" for what writes, "postgres_reads" for what only reads.
BREAKER_STATE = Gauge("circuit_breaker_state", "0 closed, 1 half-open, 2 open.", ["breaker"])
BREAKER_TRANSITIONS = Counter(
    "circuit_breaker_transitions_total", "State changes, by the state entered.", ["breaker", "to"]
)
BREAKER_STATES = ("closed", "half_open", "open")
RETRIES = Counter(
    "retries_total",
    "Repeated attempts by what they led to; budget_exhausted where one was not made.",
    ["operation", "outcome"],
)
RETRY_OUTCOMES = ("success", "failure", "budget_exhausted")

# --- the pool ------------------------------------------------------------------------------------------------
# Read by: the plan's connection query, the acceptance criterion on pool use, ConnectionPoolNearLimit,
# ConnectionPoolExhausted; every dashboard. All rules and dashboards take what has a pool for an order service.
DB_CONNECTIONS = Counter(
    "db_connections_total", "Connections to the database, by how opening them ended.", ["outcome"]
)
DB_POOL_SIZE = Gauge("db_pool_size", "Connections now open or being opened.")
DB_POOL_IN_USE = Gauge("db_pool_in_use", "Connections now in use.")
DB_POOL_MAX = Gauge("db_pool_max", "The most connections the pool may open.")
DB_POOL_WAIT_SECONDS = Histogram(
    "db_pool_wait_seconds",
    "Seconds a call waited for a connection, opening one included.",
    buckets=(0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5),
)

# --- payments ------------------------------------------------------------------------------------------------
# Exported only with PAYMENTS_URL. Read by: dashboard "Resilience and saturation".
PAYMENTS_PENDING = Gauge(
    "payments_pending",
    "Orders about which payments is still to be asked, of all replicas; at most 100,000 are counted.",
    registry=None,
)
PAYMENTS_OLDEST_PENDING_SECONDS = Gauge(
    "payments_oldest_pending_seconds",
    "Age of the oldest order that is pending, of all replicas; 0 where there is none.",
    registry=None,
)
PAYMENTS = Counter(
    "payments_total",
    "Orders about which payments was asked, by what came of it; failed and refused ones are asked about again.",
    ["outcome"],
    registry=None,
)
PAYMENT_OUTCOMES = ("authorised", "declined", "voided", "failed", "refused")
PAYMENT_SECONDS = Histogram(
    "payment_seconds",
    "Seconds that payments took to answer one attempt, or until it was given up.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
    registry=None,
)

# --- faults on demand ----------------------------------------------------------------------------------------
# Exported only with FAULTS_TOKEN. Read by: dashboard "Resilience and saturation".
FAULT_INJECTION_ACTIVE = Gauge(
    "fault_injection_active", "Faults that were asked for and have not ended.", ["fault"], registry=None
)
FAULT_INJECTION_HITS = Counter(
    "fault_injection_hits_total",
    "Requests, attempts at payments, connections and moments that an injected fault has hit.",
    ["fault"],
    registry=None,
)
_OF_PAYMENTS = (PAYMENTS_PENDING, PAYMENTS_OLDEST_PENDING_SECONDS, PAYMENTS, PAYMENT_SECONDS)
_OF_FAULTS = (FAULT_INJECTION_ACTIVE, FAULT_INJECTION_HITS)

# --- the process ---------------------------------------------------------------------------------------------
# Read by: EventLoopLag, ReplicaFreezes; dashboard "Resilience and saturation".
EVENT_LOOP_LAG_SECONDS = Gauge(
    "event_loop_lag_seconds", "The most that a timer of the event loop was late, of the last 15 s."
)
LOG_LINES_DROPPED = LockedCounter(  # the writer's thread counts, too
    "log_lines_dropped_total", "Log lines dropped because the sink could not keep up or took none."
)
BUILD_INFO = Gauge(
    "build_info", "Always 1; the labels tell what is running.", ["version", "python", "postgres"]
)


def _create_series() -> None:
    """Create every label combination at 0, so that a rate exists from the second scrape on."""
    for status, error_types in ORDER_OUTCOMES.items():
        for error_type in error_types:
            ORDERS.labels(status, error_type)
    for stage in ORDER_STAGES:
        ORDER_STAGE_SECONDS.labels(stage)
    for reason in SHED_REASONS:
        REQUESTS_SHED.labels(reason)
    for cache in CACHE_NAMES:
        for result in CACHE_RESULTS:
            CACHE_REQUESTS.labels(cache, result)
    for outcome in ("opened", "failed"):
        DB_CONNECTIONS.labels(outcome)
    for outcome in PAYMENT_OUTCOMES:
        PAYMENTS.labels(outcome)


def export(*, payments: bool, faults: bool) -> None:
    """Export the metrics of what is not always there; repeatable."""
    for metrics, wanted in (_OF_PAYMENTS, payments), (_OF_FAULTS, faults):
        for metric in metrics:
            with contextlib.suppress(KeyError):
                REGISTRY.unregister(metric)
            if wanted:
                REGISTRY.register(metric)


_create_series()
