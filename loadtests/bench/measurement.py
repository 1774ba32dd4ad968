"""One server under load for a few seconds: what its clients saw, and what an answer cost."""

import asyncio
import contextlib
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg2
import uvloop

from loadtests.bench import generator, process_stats
from loadtests.machine import processes

_COUNT_STORED = "SELECT count(*) FROM orders WHERE id = ANY (%s::uuid[])"
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Cost:
    """The figures of one server under load; CPU is microseconds per acknowledged request, of whole process trees."""

    answers: int
    per_second: float
    p50_ms: float
    p99_ms: float
    service_us: float
    postgres_us: float
    total_us: float
    generator_us: float
    generator_share: float  # of one core, while it ran
    service_rss_mib: float
    refused: int
    broken: int


def drive(url: str, requests: generator.Requests, *, connections: int, seconds: float) -> generator.Tally:
    """`generator.drive` on an event loop of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(generator.drive(url, requests, connections=connections, seconds=seconds))


def measure(
    server: processes.Server,
    postgres: processes.Postgres,
    requests: generator.Requests,
    *,
    connections: int,
    seconds: float,
) -> tuple[Cost, Sequence[str]]:
    """Load *server* for *seconds*; what it cost, and the ids it acknowledged.

    Raises:
        RuntimeError: it did not answer, or refused nearly everything; the message holds the end of its log.
    """
    service_before = process_stats.cpu_seconds(server.process.pid)
    postgres_before = process_stats.cpu_seconds(postgres.pid)
    try:
        outcome = drive(server.url, requests, connections=connections, seconds=seconds)
    except OSError as exc:
        raise RuntimeError(f"{server.name}: {exc}; {processes.tail(server.log_path)}") from exc
    service_seconds = process_stats.cpu_seconds(server.process.pid) - service_before
    postgres_seconds = process_stats.cpu_seconds(postgres.pid) - postgres_before
    answers = len(outcome.latencies_seconds)
    if answers < 2:  # noqa: PLR2004 - percentiles need two
        raise RuntimeError(
            f"{server.name} acknowledged {answers} requests, refused {outcome.refused} and broke off "
            f"{outcome.broken}; {processes.tail(server.log_path)}"
        )
    percentiles = statistics.quantiles(outcome.latencies_seconds, n=100, method="inclusive")
    cost = Cost(
        answers=answers,
        per_second=answers / outcome.seconds,
        p50_ms=percentiles[49] * 1e3,
        p99_ms=percentiles[98] * 1e3,
        service_us=service_seconds / answers * 1e6,
        postgres_us=postgres_seconds / answers * 1e6,
        total_us=(service_seconds + postgres_seconds) / answers * 1e6,
        generator_us=outcome.cpu_seconds / answers * 1e6,
        generator_share=outcome.cpu_seconds / outcome.seconds,
        service_rss_mib=process_stats.resident_bytes(server.process.pid) / 2**20,
        refused=outcome.refused,
        broken=outcome.broken,
    )
    return cost, outcome.acknowledged_ids


def missing_orders(dsn: str, ids: Sequence[str]) -> int:
    """The number of acknowledged *ids* that are not an order of their own in the database."""
    distinct = [order_id for order_id in set(ids) if _UUID.fullmatch(order_id)]
    with contextlib.closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute(_COUNT_STORED, (distinct,))
        found = cursor.fetchone()
    return len(ids) - (found[0] if found else 0)
