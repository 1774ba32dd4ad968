"""A finished run as one value: everything a report says or compares stands in here.

Units are in the names; a share is a fraction (0.01 is 1 %) unless its name says percent. `None` means that it was not
measured, never zero. `from_json(to_json(record)) == record`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

from pydantic import ConfigDict, TypeAdapter
from typing_extensions import TypedDict

Verdict = Literal["PASS", "FAIL", "INVALID"]
CriterionVerdict = Literal["PASS", "FAIL", "NOT MEASURED"]
CheckVerdict = Literal["OK", "BREACH", "NOT CHECKED"]

# JSON has no number for what failed and so never ended: it is written as the text "Infinity".
_INFINITE = ConfigDict(ser_json_inf_nan="strings")

# What a second of the run is described by; a run that could not read one of them leaves its column out.
SERIES = {
    "users": "simulated users running",
    "orders_per_second": "orders acknowledged, by the second their answer came",
    "p50_ms": "of the orders acknowledged in this second; so are p95 and p99",
    "p95_ms": "",
    "p99_ms": "",
    "errors_per_second": "refused and unknown, of any type",
    "cpu_percent": "of one core: the busiest service process",
    "rss_bytes": "the largest service process",
    "pool_in_use": "connections lent, in the process with the fullest pool",
    "pool_max": "the most that pool may open",
    "batch_size": "mean orders per commit in this second",
    "queue_depth": "orders waiting for their batch, all processes",
    "breaker_state": "0 closed, 1 half-open, 2 open; the worst",
    "in_flight": "requests admitted and not yet answered, all processes",
    "loop_lag_ms": "how late the service's event loop woke a timer, the worst recent one",
    "generator_cpu_percent": "of one core: the busiest generator process",
    "generator_lag_ms": "how late the generator's own loop woke a timer, the worst in this second",
}


@dataclass(frozen=True)
class Latency:
    """A distribution of latencies from a histogram of three significant digits (HdrHistogram).

    Every figure but `count` is None where there were no samples.
    """

    count: int
    mean_ms: float | None = None
    min_ms: float | None = None
    p50_ms: float | None = None
    p75_ms: float | None = None
    p90_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    p999_ms: float | None = None
    max_ms: float | None = None
    curve: tuple[tuple[float, float], ...] = ()  # (percentile 0..100, ms), ascending, for a percentile plot
    hdr: str = ""  # HdrHistogram V2, base64; of microseconds


@dataclass(frozen=True)
class Counts:
    """Orders by what their clients were told."""

    sent: int = 0  # acknowledged + refused + unknown
    acknowledged: int = 0
    refused: int = 0
    unknown: int = 0  # timeout, reset, cut off at the end, an answer that is not the order
    cut_off: int = 0  # by the end of the run
    agreed: int = 0  # refused as the shop may: sold out
    server_errors: int = 0  # answers of 5xx
    client_errors: int = 0  # answers of 4xx
    transport_errors: int = 0  # unknown, and not because the run ended
    undeclared_errors: int = 0  # answers of 500, and of another 5xx that say nothing of the order
    by_type: Mapping[str, int] = field(default_factory=dict)  # refused and unknown, by error type

    @property
    def failed(self) -> int:
        """Orders that the service failed, whatever the status of their answers."""
        return self.sent - self.acknowledged - self.cut_off - self.agreed


class Analysis(TypedDict):
    """The three figures of the plan's `analyze_results`; None: there was nothing to take it from."""

    avg_response_time: float | None  # ms
    error_rate: float | None  # a fraction: 0.01 is 1 %
    throughput: float | None  # acknowledged orders per second


def _no_analysis() -> Analysis:
    """The analysis of a record from before version 2, which has none."""
    return {"avg_response_time": None, "error_rate": None, "throughput": None}


@dataclass(frozen=True)
class Ledger:
    """Ids told to clients, held as sets against what is stored; the warm-up is in here."""

    counts: Counts
    source: Literal["database", "api"] | None = None  # what was asked; None: it could not be
    stored: int | None = None  # orders of this run
    unknown_stored: int | None = None  # stored, and their clients do not know it: allowed
    lost: tuple[str, ...] = ()  # ids acknowledged and not stored
    unexpected: tuple[str, ...] = ()  # ids stored that no acknowledged or unknown request explains
    doubled: tuple[str, ...] = ()  # keys stored more than once, ids given to more than one request
    swapped: tuple[str, ...] = ()  # ids given to another request than the one whose key they are stored under
    altered: tuple[str, ...] | None = ()  # ids stored with other lines, total, currency; None: not compared
    cancellations: tuple[str, ...] = ()  # ids acknowledged as cancelled and not, or the other way round
    unjust_refusals: tuple[str, ...] = ()  # ids whose cancellation was refused though their status allows it
    not_replayed: tuple[str, ...] | None = (
        None  # keys sent again that brought something else; None: none was sent
    )
    replayed: int = 0  # keys sent again, all together
    trouble: str = ""  # why something of it is not known
    success_rise: float | None = None  # of orders_total{status="success"}, all replicas
    stock_not_conserved: tuple[str, ...] | None = None  # products; None: not asked


@dataclass(frozen=True)
class Replica:
    """One service process over the measured time."""

    url: str
    cpu_percent: float | None = None  # of one core: the highest over a minute, or over a shorter run
    cpu_percent_mean: float | None = None
    rss_max_bytes: float | None = None
    memory_limit_bytes: float | None = None
    pool_in_use_max: float | None = None
    pool_max: float | None = None
    cpu_limit_cores: float = 1.0  # what `cpu_percent` is judged of; one process has no more than a core
    pool_waits: float | None = None  # connections that had to be waited for
    throttled_seconds: float | None = None  # by its cgroup; None: not known
    restarted: bool = False  # another process answers in its place, or a counter fell
    gone: bool = False  # it did not answer at the end


@dataclass(frozen=True)
class Query:
    """A query of the plan, as a Prometheus was asked it, and what it answered; of several series the highest."""

    promql: str
    unit: str
    at_end: float | None  # of the measured time
    highest: float | None  # in it
    criterion: str = ""  # whose value it is; empty: of none


@dataclass(frozen=True)
class ServiceFigures:
    """The service's own figures, as differences over the measured time."""

    source: Literal["metrics", "prometheus"] | None = None
    replicas: tuple[Replica, ...] = ()
    orders_total: Mapping[str, float] = field(default_factory=dict)  # "status" or "status/error_type" -> rise
    processing_mean_ms: float | None = None  # order_processing_seconds
    processing_p95_ms: float | None = None  # interpolated in its buckets, as histogram_quantile does
    processing_p99_ms: float | None = None
    processing_source: str = ""  # the two: the PromQL of the first; empty: from the differences of /metrics
    processing_edges_ms: tuple[float, ...] = ()  # of its buckets, without the infinite one
    stage_mean_ms: Mapping[str, float] = field(default_factory=dict)  # order_stage_seconds
    batch_size_mean: float | None = None
    connections_opened: float | None = None
    breaker_transitions: Mapping[str, float] = field(default_factory=dict)  # by the state entered
    retries: float | None = None
    shed: float | None = None
    cpu_us_per_order: float | None = None  # all service processes, per acknowledged order
    critical_alerts: tuple[str, ...] | None = None  # that fired in the run; None: nobody was asked
    warning_alerts: tuple[str, ...] | None = None
    alerts_trouble: str = ""  # why they are not known
    alerts_before: tuple[str, ...] = ()  # that fired before the run already, and do not count
    clock_ahead_seconds: float | None = None  # Prometheus's clock before ours; its times are corrected by it
    queries: tuple[Query, ...] = ()  # empty: no Prometheus was asked


@dataclass(frozen=True)
class QuantileGap:
    """A percentile at the client beside the same one in the service's histogram, which knows it to a bucket."""

    percentile: float  # 0..100
    client_ms: float
    service_ms: float
    client_bucket_ms: tuple[float, float | None]  # in which bucket each of them lies; None: without an end
    service_bucket_ms: tuple[float, float | None]
    buckets_apart: int  # 0: the same one, 1: neighbours

    @property
    def gap_ms(self) -> float:
        """By how much the client's is longer."""
        return self.client_ms - self.service_ms


@dataclass(frozen=True)
class AllSent:
    """The orders sent in the measured time, a failure counting as infinitely late; they are what is judged.

    A closed model's user who waits for an answer sends nothing meanwhile: the orders that would have been sent are in
    here with the rest of that time (the correction for coordinated omission).
    """

    __pydantic_config__ = _INFINITE

    count: int = 0
    p95_ms: float | None = None
    p99_ms: float | None = None
    interval_seconds: float | None = None  # from order to order of a user; None: an open model, not corrected
    window_seconds: float = 0.0  # of the windows whose worst are the next two
    worst_p99_ms: float | None = None
    worst_p99_count: int = 0
    worst_error_percent: float | None = None
    worst_error_count: int = 0
    longest_gap_seconds: float | None = None  # in which orders waited and none was acknowledged


@dataclass(frozen=True)
class RouteFigures:
    """Another kind of request that the profile sends, over the measured time."""

    __pydantic_config__ = _INFINITE

    route: str
    counts: Counts
    p50_ms: float | None = None  # of all sent, as of orders
    p95_ms: float | None = None
    p99_ms: float | None = None


@dataclass(frozen=True)
class Generator:
    """The generator itself; its figures decide whether the run means anything."""

    processes: int
    cpu_percent: float | None = None  # of one core, mean of the busiest process
    lag_p95_ms: float | None = None
    lag_max_ms: float | None = None
    little_users: float | None = None  # rate x (latency + wait); closed model
    little_tolerance: float | None = None  # how far that may be from the users: so few orders say no more
    achieved_share: float | None = None  # achieved / offered; open model


@dataclass(frozen=True)
class Criterion:
    """One acceptance criterion and what became of it."""

    __pydantic_config__ = _INFINITE

    name: str
    title: str
    verdict: CriterionVerdict
    value: float | None
    limit: float
    comparison: Literal["<", "<=", ">="]
    unit: str
    samples: int | None  # what the value rests on, where that is a number of orders
    definition: str
    source: str  # where the value comes from
    reason: str = ""  # why it failed or was not measured


@dataclass(frozen=True)
class Check:
    """One condition beside the criteria. A breach of the instrument's makes a run INVALID, the service's fails it."""

    name: str
    verdict: CheckVerdict
    reason: str
    ids: tuple[str, ...] = ()  # of orders (or keys, or products) it is about
    # The books are between the two: who could not read them cannot pass a run, and may well fail it.
    about: Literal["instrument", "service", "books"] = "instrument"


@dataclass(frozen=True)
class Environment:
    """The environment of a run, to run it again in."""

    command: str
    commit: str
    versions: Mapping[str, str]
    machine: Mapping[str, str | int | float | None]
    database: Mapping[str, str]  # settings; empty: no DSN to ask
    dataset: Mapping[str, str | int | None]


@dataclass(frozen=True)
class Calibration:
    """Seconds of one fixed piece of work on this machine, before and after: a change is the machine's, not ours."""

    before_seconds: float | None = None
    after_seconds: float | None = None
    stolen_percent: float | None = None  # of the machine's CPU time in between, which its host gave to others


@dataclass(frozen=True)
class RunRecord:
    """One run of one profile."""

    profile: str
    run_id: str
    model: Literal["closed", "open"]
    target: str  # URL
    started_at: str  # ISO 8601, UTC; of the first request
    measured_from: str  # the warm-up ends here
    measured_until: str
    duration_seconds: float  # measured
    planned_seconds: float
    warm_up_seconds: float
    users: int
    spawn_rate: float
    wait_seconds: tuple[float, float]  # least and most between two orders of a user; closed model
    offered_per_second: float | None  # open model
    orders_per_second: float  # acknowledged
    complete: bool  # False: ended before its time, by Ctrl-C or having failed
    strict: bool
    verdict: Verdict
    reasons: tuple[str, ...]  # one sentence each, the gravest first; empty: PASS without remarks
    counts: Counts  # of the measured time
    acknowledged: Latency  # of the measured time, as all below
    refused: Latency
    unknown: Latency
    seconds: tuple[float, ...]  # of every row of the series: since measured_from; negative: warm-up
    series: Mapping[str, tuple[float | None, ...]]  # by the names in SERIES
    errors: Mapping[str, tuple[int, ...]]  # per second, by error type
    server: ServiceFigures
    generator: Generator
    ledger: Ledger
    criteria: tuple[Criterion, ...]
    checks: tuple[Check, ...]
    environment: Environment
    analysis: Analysis = field(default_factory=_no_analysis)  # of the measured time
    calibration: Calibration = Calibration()
    quantiles: tuple[QuantileGap, ...] = ()  # empty: one of the two sides is not known
    all_sent: AllSent = AllSent()
    corrected: Latency = Latency(0)  # acknowledged orders, corrected as `AllSent` says
    others: tuple[RouteFigures, ...] = ()
    aborted: str = ""  # why it ended early, having failed (ABORT_ON_FAIL); it is not complete then
    version: int = 3  # of this model

    @property
    def headline(self) -> str:
        """The verdict; of a PASS with how much of it was judged."""
        if self.verdict != "PASS":
            return self.verdict
        met = sum(criterion.verdict == "PASS" for criterion in self.criteria)
        return f"PASS, {met} of {len(self.criteria)} criteria"

    @property
    def exit_code(self) -> int:
        """0 PASS, 1 FAIL, 3 INVALID, 130 ended by Ctrl-C."""
        if not self.complete and not self.aborted:
            return 130
        return {"PASS": 0, "FAIL": 1, "INVALID": 3}[self.verdict]

    def to_json(self) -> bytes:
        """The record as a JSON document."""
        return _ADAPTER.dump_json(self, indent=1)

    @classmethod
    def from_json(cls, document: bytes | str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            pydantic.ValidationError: it is not of this form.
        """
        return _ADAPTER.validate_json(document)  # type: ignore[return-value]


_ADAPTER = TypeAdapter(RunRecord)
