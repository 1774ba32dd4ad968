"""`make bench-growth`: what requests cost as the table grows, as orders get longer, and as time goes by.

One service per number of stored orders, all of them at once on one embedded Postgres, taking turns under the same
requests as in `bench`; the orders are put straight into the table, in the form the service writes.
"""

import argparse
import contextlib
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psycopg2
from rich.console import Console

from loadtests import marked_block
from loadtests.bench import charts, generator, measurement, process_stats
from loadtests.bench.reporting import (
    Goal,
    Steps,
    command,
    machine_line,
    milliseconds_text,
    ratio_text,
    report_console,
    show_machine,
    show_targets,
    table,
)
from loadtests.machine import processes

_CONNECTIONS = 64
_PAGE_LIMIT = 20
_ORDERS_PER_CUSTOMER = 100
_SAMPLED = 10_000  # orders and customers to ask for
_ROWS_PER_INSERT = 100_000
_BYTES_PER_ORDER = 1500  # on disk: the row, its four indexes, and as much WAL as waits for a checkpoint
_SLICE_SECONDS = 10.0
_MOST = 1.2  # times the cost at the smallest size
_SETTINGS = {"DB_POOL_MAX_SIZE": "30"}  # of three services at once, out of the server's 120 connections

# The orders of the last thirty days, oldest first: the id begins with the milliseconds of created_at (UUIDv7), the
# prices are the catalogue's, and every order has a key of its own.
INSERT_ORDERS = """
    INSERT INTO orders (principal, id, customer_id, status, currency, total_cents, lines, created_at,
                        idempotency_key, request_hash)
    SELECT 'anonymous',
           (lpad(to_hex((extract(epoch FROM o.created_at) * 1000)::bigint), 12, '0') || '7' || substr(o.digits, 1, 3)
               || substr('89ab', 1 + i %% 4, 1) || substr(o.digits, 4, 15))::uuid,
           'customer-' || i %% greatest(1, %(orders)s / %(orders_per_customer)s),
           'confirmed', 'EUR', l.total_cents, l.lines, o.created_at,
           'bulk-' || o.digits, encode(sha256(o.digits::bytea), 'hex')
      FROM generate_series(%(first)s, %(last)s) AS i
     CROSS JOIN LATERAL (
               SELECT md5(i::text) AS digits,
                      %(loaded_at)s::timestamptz - (%(orders)s - i) * (interval '30 days' / %(orders)s) AS created_at
           ) AS o
     CROSS JOIN LATERAL (
               SELECT sum(quantity * price)::bigint AS total_cents,
                      jsonb_agg(jsonb_build_array('SKU-' || lpad(product::text, 4, '0'), quantity, price)) AS lines
                 FROM (SELECT product, 1 + i %% 3 AS quantity, 199 + (product * 7919) %% 9800 AS price
                         FROM unnest(ARRAY[1 + i * 7 %% 1000, 1 + (i * 7 + 500) %% 1000]) AS product) AS line
           ) AS l
"""


@dataclass(frozen=True)
class Round:
    """One workload for a few seconds; `key` is what is compared: orders stored, or lines per order."""

    workload: str
    key: int
    cost: measurement.Cost


@dataclass
class Soak:
    """The service under load for long, slice by slice."""

    seconds: list[float] = field(default_factory=list)  # at the end of each slice
    p99_ms: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    orders: int = 0
    refused: int = 0


@dataclass(frozen=True)
class Sized:
    """A service whose database holds *orders* orders."""

    orders: int
    server: processes.Server
    requests: dict[str, generator.Requests]


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement; 1 where an acknowledged order is missing, or the run came to nothing."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench.growth", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small tables, short rounds: a smoke test")
    parser.add_argument("--sizes", type=int, nargs="+", help="orders stored (default 10000 1000000 5000000)")
    parser.add_argument("--lines", type=int, nargs="+", default=[1, 10, 50], help="per order")
    parser.add_argument("--rounds", type=int, help="default 3; quick: 1")
    parser.add_argument("--seconds", type=float, help="of a round (default 4; quick: 1)")
    parser.add_argument("--soak", type=float, help="seconds of the soak (default 600; quick: 5)")
    parser.add_argument("--output", type=Path, default=processes.ROOT / "loadtests/results/growth")
    options = parser.parse_args(arguments)
    sizes = sorted(options.sizes or ([2_000, 20_000] if options.quick else [10_000, 1_000_000, 5_000_000]))
    rounds = options.rounds or (1 if options.quick else 3)
    seconds = options.seconds or (1.0 if options.quick else 4.0)
    soak_seconds = options.soak if options.soak is not None else (5.0 if options.quick else 600.0)
    console = report_console()
    growth, lines, soak = _run(console, sizes, options.lines, rounds, seconds, soak_seconds)
    report: dict[str, Any] = {
        "machine": processes.machine(),
        "connections": _CONNECTIONS,
        "growth": summarise(growth),
        "lines": summarise(lines),
        "soak": asdict(soak),
    }
    targets = reached(report["growth"])
    report["targets"] = [asdict(target) for target in targets]
    _show(console, report, soak, targets)
    text = _write(options.output, report, soak, targets)
    if options == parser.parse_args([]):  # a full run
        marked_block.write("bench-growth", text)
    console.print(
        f"the tables as Markdown, the figures as JSON, and pictures: {options.output}", soft_wrap=True
    )
    return 0


def _run(
    console: Console,
    sizes: Sequence[int],
    line_counts: Sequence[int],
    rounds: int,
    seconds: float,
    soak_seconds: float,
) -> tuple[list[Round], list[Round], Soak]:
    inserts = sum(-(-size // _ROWS_PER_INSERT) for size in sizes)
    measured = rounds * (4 * len(sizes) + 3 * len(line_counts))
    steps = Steps(console, len(sizes) + inserts + measured + _slices(soak_seconds))
    with steps, processes.scratch_directory() as folder, contextlib.ExitStack() as stack:
        if shutil.disk_usage(folder).free < (needed := 2**30 + sum(sizes) * _BYTES_PER_ORDER):
            raise RuntimeError(
                f"{folder.parent} needs {needed / 2**30:.0f} GiB free; TMPDIR names another place"
            )
        postgres = stack.enter_context(processes.steady_postgres(folder))
        sized = []
        for size in sizes:
            steps.next(f"starting a service for {size:,} orders")
            sized.append(stack.enter_context(_sized(size, postgres, folder, steps)))
        growth: list[Round] = []
        for workload in sized[0].requests:
            for number in range(rounds):
                for one in sized if number % 2 == 0 else reversed(sized):
                    steps.next(f"{workload}, {one.orders:,} orders stored, round {number + 1} of {rounds}")
                    requests = one.requests[workload]
                    growth.append(_round(workload, one.orders, one.server, postgres, requests, seconds))
        smallest = sized[0].server
        workloads = {count: _workloads_of_lines(smallest, count) for count in line_counts}
        lines: list[Round] = []
        for workload in ("POST", "GET", "customer's page"):
            for number in range(rounds):
                for count in line_counts if number % 2 == 0 else reversed(line_counts):
                    steps.next(f"{workload}, {count} lines per order, round {number + 1} of {rounds}")
                    requests = workloads[count][workload]
                    lines.append(_round(workload, count, smallest, postgres, requests, seconds))
        soak = _soak(sized[-1], soak_seconds, steps)
    return growth, lines, soak


@contextlib.contextmanager
def _sized(size: int, postgres: processes.Postgres, folder: Path, steps: Steps) -> Iterator[Sized]:
    """A service over *size* orders, and the requests to put to it."""
    dsn = postgres.create_database(f"growth_{size}")
    with processes.service(dsn, folder, name=f"service-{size}", settings=_SETTINGS) as server:
        store_orders(dsn, size, on_insert=lambda last: steps.next(f"storing {last:,} of {size:,} orders"))
        ids, customers = _samples(dsn)
        url = server.url
        requests: dict[str, generator.Requests] = {
            "POST": generator.OrderRequests(url),
            "GET": generator.ReadRequests(url, [f"/orders/{order_id}" for order_id in ids]),
            "newest page": generator.ReadRequests(url, [f"/orders?limit={_PAGE_LIMIT}"]),
            "customer's page": generator.ReadRequests(url, [_page_of(customer) for customer in customers]),
        }
        yield Sized(size, server, requests)


def store_orders(dsn: str, orders: int, *, on_insert: Callable[[int], None]) -> None:
    """Store *orders* orders of two lines behind the service's back; *on_insert* hears how many there soon are."""
    with contextlib.closing(psycopg2.connect(dsn)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT now()")
            (loaded_at,) = cursor.fetchone() or (None,)
            for first in range(1, orders + 1, _ROWS_PER_INSERT):
                last = min(orders, first + _ROWS_PER_INSERT - 1)
                on_insert(last)
                cursor.execute(
                    INSERT_ORDERS,
                    {
                        "orders": orders,
                        "orders_per_customer": _ORDERS_PER_CUSTOMER,
                        "first": first,
                        "last": last,
                        "loaded_at": loaded_at,
                    },
                )
            # What autovacuum would do in the middle of the first rounds.
            cursor.execute("VACUUM (ANALYZE) orders")
            cursor.execute("CHECKPOINT")


def _samples(dsn: str) -> tuple[list[str], list[str]]:
    """Ids of orders, and customers, from all over the table, in no order."""
    with contextlib.closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT id::text, customer_id
              FROM orders TABLESAMPLE BERNOULLI (least(100, 150.0 * %(sampled)s / (SELECT count(*) FROM orders)))
            """,
            {"sampled": _SAMPLED},
        )
        rows = cursor.fetchall()
    random.Random(1).shuffle(rows)  # noqa: S311 - repeatable, not secret
    rows = rows[:_SAMPLED]
    return [row[0] for row in rows], [row[1] for row in rows]


def _page_of(customer_id: str) -> str:
    return f"/orders?customer_id={customer_id}&limit={_PAGE_LIMIT}"


def _workloads_of_lines(server: processes.Server, count: int) -> dict[str, generator.Requests]:
    """Storing orders of *count* lines, and reading what a first second of that has stored."""
    post = generator.OrderRequests(server.url, lines=count)
    stored = measurement.drive(server.url, post, connections=_CONNECTIONS, seconds=1).acknowledged_ids
    return {
        "POST": post,
        "GET": generator.ReadRequests(server.url, [f"/orders/{order_id}" for order_id in stored]),
        "customer's page": generator.ReadRequests(server.url, [_page_of(post.customer_id)]),
    }


def _round(
    workload: str,
    key: int,
    server: processes.Server,
    postgres: processes.Postgres,
    requests: generator.Requests,
    seconds: float,
) -> Round:
    measurement.drive(server.url, requests, connections=_CONNECTIONS, seconds=seconds / 4)
    cost, ids = measurement.measure(server, postgres, requests, connections=_CONNECTIONS, seconds=seconds)
    if workload == "POST" and (missing := measurement.missing_orders(server.dsn, ids)):
        raise RuntimeError(f"{missing} acknowledged orders are not in the database: no figure here counts")
    return Round(workload, key, cost)


def _slices(seconds: float) -> int:
    return -int(-seconds // _SLICE_SECONDS)


def _soak(sized: Sized, seconds: float, steps: Steps) -> Soak:
    """Orders at full speed for *seconds*."""
    soak = Soak()
    started_at = time.monotonic()
    server, requests = sized.server, sized.requests["POST"]
    for number in range(_slices(seconds)):
        steps.next(f"soak: {number * _SLICE_SECONDS:.0f} of {seconds:.0f} s")
        outcome = measurement.drive(
            server.url, requests, connections=_CONNECTIONS, seconds=min(_SLICE_SECONDS, seconds)
        )
        if missing := measurement.missing_orders(server.dsn, outcome.acknowledged_ids):
            raise RuntimeError(
                f"{missing} acknowledged orders are not in the database: no figure here counts"
            )
        soak.seconds.append(round(time.monotonic() - started_at, 1))
        soak.p99_ms.append(
            statistics.quantiles(outcome.latencies_seconds, n=100, method="inclusive")[98] * 1e3
        )
        soak.rss_mib.append(process_stats.resident_bytes(server.process.pid) / 2**20)
        soak.orders += len(outcome.acknowledged_ids)
        soak.refused += outcome.refused + outcome.broken
    return soak


def summarise(results: Sequence[Round]) -> list[dict[str, Any]]:
    """One row per workload and key: medians over its rounds, and its cost over that at the smallest key."""
    summary = []
    for workload in dict.fromkeys(result.workload for result in results):
        rounds: dict[int, list[measurement.Cost]] = {}
        for result in results:
            if result.workload == workload:
                rounds.setdefault(result.key, []).append(result.cost)
        first = rounds[min(rounds)]
        for key in sorted(rounds):
            its = rounds[key]
            ratios = [a.total_us / b.total_us for a, b in zip(its, first, strict=True) if b.total_us]
            row: dict[str, Any] = {"workload": workload, "key": key}
            for figure in ("per_second", "p50_ms", "p99_ms", "service_us", "postgres_us", "total_us"):
                row[figure] = statistics.median(getattr(cost, figure) for cost in its)
            row["refused"] = sum(cost.refused + cost.broken for cost in its)
            row["cost_ratio"] = [min(ratios), statistics.median(ratios), max(ratios)] if ratios else None
            summary.append(row)
    return summary


def reached(summary: Sequence[dict[str, Any]]) -> list[Goal]:
    """The cost of each workload at the most stored orders over that at the fewest."""
    fewest, most = (choose(row["key"] for row in summary) for choose in (min, max))
    return [
        Goal(
            f"CPU of a {row['workload']} at {most:,} orders over {fewest:,}",
            row["cost_ratio"],
            _MOST,
            at_least=False,
        )
        for row in summary
        if row["key"] == most != fewest and row["cost_ratio"]
    ]


_TABLES = (
    ("growth", "orders stored", "as the table grows"),
    ("lines", "lines per order", "as orders get longer"),
)


def _headings(key: str) -> list[str]:
    return ["", key, "per s", "p50 ms", "p99 ms", "service µs", "Postgres", "both", "over the least"]


def _rows(summary: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            row["workload"],
            f"{row['key']:,}",
            f"{row['per_second']:,.0f}",
            milliseconds_text(row["p50_ms"]),
            milliseconds_text(row["p99_ms"]),
            f"{row['service_us']:,.0f}",
            f"{row['postgres_us']:,.0f}",
            f"{row['total_us']:,.0f}",
            ratio_text(row["cost_ratio"]),
        ]
        for row in summary
    ]


def _title(what: str) -> str:
    return f"CPU-µs per request {what} ({_CONNECTIONS} connections; medians, ratios with their spread)"


def _soak_line(soak: Soak) -> str:
    """The soak in a sentence: its first minute against its last."""
    if not soak.seconds:
        return "no soak"
    edge = max(1, min(6, len(soak.seconds) // 2))
    early, late = (statistics.median(soak.p99_ms[part]) for part in (slice(edge), slice(-edge, None)))
    return (
        f"soak of {soak.seconds[-1]:.0f} s, {soak.orders:,} orders, {soak.refused} refused: "
        f"p99 {early:.1f} ms at first, {late:.1f} ms at last; "
        f"memory {soak.rss_mib[0]:.0f} MiB at first, {soak.rss_mib[-1]:.0f} MiB at last"
    )


def _series(summary: Sequence[dict[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """The keys and the costs of each workload."""
    return {
        workload: (
            [row["key"] for row in summary if row["workload"] == workload],
            [row["total_us"] for row in summary if row["workload"] == workload],
        )
        for workload in dict.fromkeys(row["workload"] for row in summary)
    }


def _show(console: Console, report: dict[str, Any], soak: Soak, targets: Sequence[Goal]) -> None:
    for name, key, what in _TABLES:
        console.print(table(_title(what), _headings(key), _rows(report[name])))
        console.print()
    console.print(_soak_line(soak), soft_wrap=True)
    show_machine(console)
    show_targets(console, targets)


def _write(folder: Path, report: dict[str, Any], soak: Soak, targets: Sequence[Goal]) -> str:
    """Leave all forms of the report in *folder*; the tables as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "growth.json").write_text(json.dumps(report, indent=1))
    lines = []
    for name, key, what in _TABLES:
        lines += [f"**{_title(what)}**", ""]
        lines += [marked_block.markdown_table(_headings(key), _rows(report[name])), ""]
    lines += [f"- {_soak_line(soak)}", *(f"- {target.line}" for target in targets)]
    lines += ["", machine_line("make bench-growth")]
    text = "\n".join(lines) + "\n"
    (folder / "growth.md").write_text(text)
    charts.lines(
        {f"by {label}": _series(report[name]) for name, label, _ in _TABLES},
        folder / "growth",
        x_label="",
        y_label="CPU per request (µs)",
        x_log=True,
    )
    charts.lines(
        {
            "p99 (ms)": {"POST": (soak.seconds, soak.p99_ms)},
            "memory of the service (MiB)": {"resident": (soak.seconds, soak.rss_mib)},
        },
        folder / "soak",
        x_label="seconds under load",
        y_label="",
    )
    return text


if __name__ == "__main__":
    sys.exit(main())
