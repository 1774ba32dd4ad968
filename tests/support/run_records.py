"""Runs that never happened: raw samples, and the record that a run would make of them."""

import dataclasses
import gzip
import random
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from loadtests.judging import acceptance, criteria, quantiles
from loadtests.judging.analysis import analyze_results
from loadtests.judging.verdict import decide
from loadtests.run_record import (
    AllSent,
    Calibration,
    Check,
    Environment,
    Generator,
    Ledger,
    Replica,
    RunRecord,
    ServiceFigures,
)
from loadtests.running.order_samples import ACKNOWLEDGED, REFUSED, UNKNOWN, OrderSamples, percentile_of
from loadtests.samples import Outcome, Sample, Window

START = 1_800_000_000.0  # of the measured time
WARM_UP_SECONDS = 10

# second -> outcome, status, error type
Trouble = Callable[[float, random.Random], tuple[Outcome, int, str] | None]


def none_at_all(second: float, chance: random.Random) -> None:
    """Every order is acknowledged."""


def outage(second: float, chance: random.Random) -> tuple[Outcome, int, str] | None:
    """From second 12 to 18 the database is away; requests at its edges stay unanswered."""
    if 12 <= second < 12.2 or 17.9 <= second < 18:
        return "unknown", 0, "client_timeout"
    if 12 <= second < 18:
        return "refused", 503, "circuit_open" if chance.random() < 0.9 else "database"
    return None


def samples(
    *, seconds: int = 30, rate: int = 60, mean_ms: float = 12.0, seed: int = 1, trouble: Trouble = none_at_all
) -> list[Sample]:
    """Orders from the warm-up to a little after the measured time."""
    chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
    made = []
    for number in range(-WARM_UP_SECONDS * rate, (seconds + 1) * rate):
        second = number / rate + chance.random() / rate
        outcome, status, error_type = trouble(second, chance) or ("acknowledged", 201, "")
        latency = chance.gammavariate(4, mean_ms / 4000) if outcome != "unknown" else 10.0
        made.append(
            Sample(
                operation="create",
                route="/orders",
                key=f"key-{number}",
                order_id=f"order-{number}" if outcome == "acknowledged" else "",
                status=status,
                outcome=outcome,
                error_type=error_type,
                started_at=START + second,
                latency_seconds=latency,
                late_seconds=0.0,
                replayed=False,
            )
        )
    return made


def columns_of(made: Sequence[Sample]) -> OrderSamples:
    """The same in columns."""
    orders = OrderSamples()
    for sample in made:
        orders.add(sample)
    return orders


def record_of(
    made: Sequence[Sample],
    *,
    seconds: int = 30,
    cpu_percent: float = 40.0,
    started_at: float = START,
    **changes: Any,
) -> RunRecord:
    """The record of a run of the peak profile with these samples; *changes* are fields of it."""
    orders = columns_of(made)
    window = Window(START, START + seconds)
    counts, latency = orders.counts(window), orders.latency(ACKNOWLEDGED, window)
    chance = random.Random(7)  # noqa: S311 - as above
    rows = range(-WARM_UP_SECONDS, seconds)
    columns, errors = orders.per_second(START, rows)

    def wobble(middle: float, by: float) -> list[float | None]:
        return [max(0.0, middle + chance.uniform(-by, by)) for _ in rows]

    server = ServiceFigures(
        source="metrics",
        replicas=(
            Replica(
                url="http://127.0.0.1:8000/metrics",
                cpu_percent=cpu_percent,
                cpu_percent_mean=cpu_percent * 0.9,
                rss_max_bytes=90 * 2**20,
                memory_limit_bytes=2 * 2**30,
                pool_in_use_max=4,
                pool_max=50,
            ),
        ),
        orders_total={"success": float(counts.acknowledged)},
        processing_mean_ms=9.0,
        processing_p95_ms=20.0,
        processing_p99_ms=30.0,
        processing_edges_ms=(1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 200.0, 500.0, 1000.0),
        stage_mean_ms={"parse": 0.1, "price": 0.2, "queue": 3.0, "store": 5.0, "respond": 0.4},
        batch_size_mean=6.5,
        connections_opened=2.0,
        breaker_transitions={"open": 1.0, "half_open": 1.0, "closed": 1.0},
        retries=3.0,
        shed=0.0,
        cpu_us_per_order=300.0,
    )
    ledger = Ledger(
        counts=orders.counts(), source="database", stored=orders.counts().acknowledged, unknown_stored=0
    )
    sent = all_sent(orders, window)
    facts = criteria.Facts(
        counts=counts, latency=latency, sent=sent, ledger=ledger, server=server, seconds=float(seconds)
    )
    judged = criteria.judge(acceptance.load(), "peak", criteria.measure(facts))
    checks = (
        Check("requests", "OK", f"{counts.sent} orders were sent in the measured time"),
        Check("acknowledged_stored", "OK", "all acknowledged orders are stored"),
    )
    verdict, reasons = decide(judged, checks, strict=False)
    made_record = RunRecord(
        profile="peak",
        run_id="0123456789ab",
        model="closed",
        target="http://127.0.0.1:8000",
        started_at=_iso(started_at - WARM_UP_SECONDS),
        measured_from=_iso(START),
        measured_until=_iso(START + seconds),
        duration_seconds=float(seconds),
        planned_seconds=float(seconds),
        warm_up_seconds=float(WARM_UP_SECONDS),
        users=500,
        spawn_rate=50.0,
        wait_seconds=(0.2, 0.4),
        offered_per_second=None,
        orders_per_second=counts.acknowledged / seconds,
        complete=True,
        strict=False,
        verdict=verdict,
        reasons=reasons,
        counts=counts,
        acknowledged=latency,
        refused=orders.latency(REFUSED, window),
        unknown=orders.latency(UNKNOWN, window),
        seconds=tuple(float(second) for second in rows),
        series={
            **{name: tuple(column) for name, column in columns.items()},
            "users": tuple(float(min(500, 50 * (second + WARM_UP_SECONDS + 1))) for second in rows),
            "cpu_percent": tuple(wobble(cpu_percent * 0.9, cpu_percent * 0.1)),
            "generator_cpu_percent": tuple(wobble(20, 3)),
            "rss_bytes": tuple(80 * 2**20 + 2**18 * n for n in range(len(rows))),
            "pool_in_use": tuple(float(chance.randint(0, 4)) for _ in rows),
            "pool_max": tuple(50.0 for _ in rows),
            "batch_size": tuple(
                None if 12 <= second < 18 and errors else value
                for second, value in zip(rows, wobble(6, 2), strict=True)
            ),
            "queue_depth": tuple(wobble(4, 4)),
            "in_flight": tuple(wobble(20, 6)),
            "breaker_state": tuple(2.0 if 12 <= second < 18 and errors else 0.0 for second in rows),
            "loop_lag_ms": tuple(wobble(3, 2)),
            "generator_lag_ms": tuple(wobble(2, 2)),
        },
        errors={name: tuple(column) for name, column in errors.items()},
        server=server,
        generator=Generator(
            processes=1, cpu_percent=20.0, lag_p95_ms=2.0, lag_max_ms=9.0, little_users=495.0
        ),
        ledger=ledger,
        criteria=judged,
        checks=checks,
        environment=Environment(
            command="DURATION=30s python -m loadtests peak",
            commit="0123456789abcdef",
            versions={"python": "3.11.7", "locust": "2.47.0"},
            machine={"cpu": "A CPU", "cores": 2, "memory_bytes": 8 * 2**30, "governor": None},
            database={"max_connections": "120", "fsync": "on"},
            dataset={"products": 1000, "orders_before": 0},
        ),
        calibration=Calibration(0.25, 0.25),
        analysis=analyze_results(orders.test_data(window)),
        quantiles=quantiles.gaps(latency, server),
        all_sent=sent,
        corrected=latency,
    )
    return dataclasses.replace(made_record, **changes)


def all_sent(orders: OrderSamples, window: Window) -> AllSent:
    """The latencies that are judged, of an open model: what nobody sent is not made up."""
    latencies = orders.answered_or_failed(window, None)
    worst = orders.worst_windows(window, 60, None)
    return AllSent(
        count=len(latencies),
        p95_ms=percentile_of(latencies, 95),
        p99_ms=percentile_of(latencies, 99),
        window_seconds=min(60, window.seconds),
        worst_p99_ms=worst.p99_ms,
        worst_p99_count=worst.p99_orders,
        worst_error_percent=worst.error_percent,
        worst_error_count=worst.error_orders,
        longest_gap_seconds=orders.longest_gap_seconds(window),
    )


def store(directory: Path, record: RunRecord) -> Path:
    """A run's directory as far as reports need it; the runner leaves the raw samples, too."""
    directory.mkdir(parents=True)
    (directory / "report.json").write_bytes(record.to_json())
    return directory


def read_samples(directory: Path) -> Iterator[Sample]:
    """The raw samples in a run's directory, compressed or not, file by file."""
    for path in sorted(directory.glob("orders-*.jsonl*")):
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):  # a killed process may leave half a line
                    yield Sample(*orjson.loads(line))


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
