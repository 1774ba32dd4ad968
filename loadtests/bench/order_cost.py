"""`make bench`: what an order costs here, beside the usual ways to write an order API.

All contestants run at once on one embedded Postgres, each in a database of its own, and take turns under the same
orders, round after round, so that a machine that speeds up or slows down does it to all of them. Speeds drift; ratios
from one run are what to quote. A figure counts only if every order that was acknowledged is in the database.
"""

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from loadtests import marked_block
from loadtests.bench import charts, generator, measurement
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

_WARM_UP_CONNECTIONS = 64  # enough to open every contestant's pool of 50

_MAX_CONNECTIONS = 360  # pools of 50 each, of which the service, four times, needs the ten that it opens with


@dataclass(frozen=True)
class Contestant:
    """One way to take orders: the service itself, or a module to run with `--port` and `--dsn`."""

    name: str
    module: str
    has_database: bool = True
    replicas: int = 1  # of the service


SERVICE = Contestant("service", "app")
CONTESTANTS = (
    SERVICE,
    Contestant("three_replicas", "app", replicas=3),
    Contestant("per_request", "loadtests.bench.peers.per_request"),
    Contestant("sqlalchemy_asyncpg", "loadtests.bench.peers.sqlalchemy_asyncpg"),
    Contestant("echo", "loadtests.bench.peers.echo", has_database=False),
)


@dataclass(frozen=True)
class Round:
    """One contestant under load for a few seconds."""

    contestant: str
    connections: int
    cost: measurement.Cost
    missing: int  # acknowledged, and not in the database


@dataclass(frozen=True)
class _Running:
    contestant: Contestant
    server: processes.Server
    requests: generator.OrderRequests


@command
def main(arguments: Sequence[str] | None = None, contestants: Sequence[Contestant] = CONTESTANTS) -> int:
    """Run the benchmark; 1 where an acknowledged order is missing, or the run came to nothing."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench.order_cost", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute: shorter rounds, fewer of them")
    parser.add_argument("--rounds", type=int, help="per contestant and load (default 3; quick: 2)")
    parser.add_argument("--seconds", type=float, help="of a round (default 4; quick: 1)")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 64, 500])
    parser.add_argument("--only", nargs="+", choices=[c.name for c in contestants], metavar="CONTESTANT")
    parser.add_argument("--output", type=Path, default=processes.ROOT / "loadtests/results/bench")
    options = parser.parse_args(arguments)
    rounds = options.rounds or (2 if options.quick else 3)
    seconds = options.seconds or (1.0 if options.quick else 4.0)
    console = report_console()
    results = _run(
        console,
        [c for c in contestants if options.only is None or c.name in options.only],
        options.connections,
        rounds,
        seconds,
    )
    summary = summarise(results)
    targets = reached(summary)
    report = {
        "machine": processes.machine(),
        "rounds_of_seconds": [rounds, seconds],
        "summary": summary,
        "targets": [asdict(target) for target in targets],
        "rounds": [
            {"contestant": r.contestant, "connections": r.connections, **asdict(r.cost), "missing": r.missing}
            for r in results
        ],
    }
    missing = sum(result.missing for result in results)
    _show(console, summary, targets)
    if missing:
        raise RuntimeError(f"{missing} acknowledged orders are not in the database: no figure here counts")
    text = _write(options.output, report, summary, targets)
    if options == parser.parse_args([]):  # a full run
        marked_block.write("bench", text)
    console.print(
        f"the tables as Markdown, all rounds as JSON, and a picture: {options.output}", soft_wrap=True
    )
    return 0


def _run(
    console: Console, contestants: Sequence[Contestant], loads: Sequence[int], rounds: int, seconds: float
) -> list[Round]:
    steps = Steps(console, len(contestants) * (1 + len(loads) * rounds))
    with steps, processes.scratch_directory() as folder, contextlib.ExitStack() as stack:
        postgres = stack.enter_context(processes.steady_postgres(folder, max_connections=_MAX_CONNECTIONS))
        running = []
        for contestant in contestants:
            steps.next(f"starting {contestant.name}")
            running.append(stack.enter_context(_started(contestant, postgres, folder)))
        results = []
        for connections in loads:
            for number in range(rounds):
                # Forwards and backwards by turns: none is always the one after the heaviest.
                for one in running if number % 2 == 0 else reversed(running):
                    steps.next(
                        f"{connections} connections, round {number + 1} of {rounds}: {one.contestant.name}"
                    )
                    if number == 0:
                        measurement.drive(
                            one.server.url,
                            one.requests,
                            connections=min(connections, _WARM_UP_CONNECTIONS),
                            seconds=min(seconds / 2, 1.0),
                        )
                    results.append(_round(one, postgres, connections, seconds))
    return results


@contextlib.contextmanager
def _started(contestant: Contestant, postgres: processes.Postgres, folder: Path) -> Iterator[_Running]:
    dsn = postgres.create_database(f"bench_{contestant.name}")
    with contextlib.ExitStack() as stack:
        if contestant.module == SERVICE.module:
            server = stack.enter_context(
                processes.service(dsn, folder, name=contestant.name, replicas=contestant.replicas)
            )
        else:
            port = processes.free_port()
            command = [sys.executable, "-m", contestant.module, "--port", str(port), "--dsn", dsn]
            server = stack.enter_context(
                processes.server(contestant.name, command, port=port, dsn=dsn, folder=folder)
            )
        yield _Running(contestant, server, generator.OrderRequests(server.url))


def _round(running: _Running, postgres: processes.Postgres, connections: int, seconds: float) -> Round:
    cost, ids = measurement.measure(
        running.server, postgres, running.requests, connections=connections, seconds=seconds
    )
    missing = measurement.missing_orders(running.server.dsn, ids) if running.contestant.has_database else 0
    return Round(running.contestant.name, connections, cost, missing)


def summarise(results: Sequence[Round]) -> list[dict[str, Any]]:
    """One row per load and contestant: medians over its rounds, and ratios as [least, median, most].

    Ratios compare rounds of the same number: `cost_ratio` is its CPU per order, service and Postgres together, over
    our service's; `own_ratio` its own CPU over the echo's; `latency_ratio` its p50 over our service's.
    """
    summary = []
    for connections in dict.fromkeys(result.connections for result in results):
        rounds = {
            name: [r.cost for r in results if (r.contestant, r.connections) == (name, connections)]
            for name in dict.fromkeys(result.contestant for result in results)
        }
        ours, floor = rounds.get(SERVICE.name), rounds.get("echo")
        for name, its in rounds.items():
            row: dict[str, Any] = {"connections": connections, "contestant": name}
            for figure in fields(measurement.Cost):
                combine = sum if figure.name in {"answers", "refused", "broken"} else statistics.median
                row[figure.name] = combine(getattr(cost, figure.name) for cost in its)
            if ours:
                row["cost_ratio"] = _ratio(its, ours, "total_us")
                row["latency_ratio"] = _ratio(its, ours, "p50_ms")
            if floor:
                row["own_ratio"] = _ratio(its, floor, "service_us")
            row["missing"] = sum(
                r.missing for r in results if (r.contestant, r.connections) == (name, connections)
            )
            summary.append(row)
    return summary


def _ratio(
    its: Sequence[measurement.Cost], others: Sequence[measurement.Cost], figure: str
) -> list[float] | None:
    """[least, median, most] over the rounds; None where a round took no tick of CPU."""
    if not all(getattr(other, figure) for other in others):
        return None
    ratios = [getattr(a, figure) / getattr(b, figure) for a, b in zip(its, others, strict=True)]
    return [min(ratios), statistics.median(ratios), max(ratios)]


def reached(summary: Sequence[dict[str, Any]]) -> list[Goal]:
    """The targets that this run can tell about."""
    rows = {(row["contestant"], row["connections"]): row for row in summary}
    wanted = (
        (
            "per_request",
            64,
            "cost_ratio",
            "CPU per order at 64 connections, per_request over ours",
            8.0,
            True,
        ),
        ("sqlalchemy_asyncpg", 64, "cost_ratio", "the same, sqlalchemy_asyncpg over ours", 15.0, True),
        ("per_request", 500, "cost_ratio", "the same at 500 connections, per_request over ours", 10.0, True),
        (SERVICE.name, 64, "own_ratio", "the service's own CPU at 64 connections over echo's", 3.0, False),
        ("per_request", 1, "latency_ratio", "p50 of a lone order, per_request over ours", 1.0, True),
    )
    return [
        Goal(what, ratio, limit, at_least=at_least)
        for contestant, connections, figure, what, limit, at_least in wanted
        if (ratio := rows.get((contestant, connections), {}).get(figure))
    ]


_HEADINGS = (
    "", "orders/s", "p50 ms", "p99 ms", "own µs", "Postgres", "both", "cost ratio", "own/echo", "MiB",
)  # fmt: skip


def _rows(summary: Sequence[dict[str, Any]], connections: int) -> list[list[str]]:
    return [
        [
            row["contestant"],
            f"{row['per_second']:,.0f}",
            milliseconds_text(row["p50_ms"]),
            milliseconds_text(row["p99_ms"]),
            f"{row['service_us']:,.0f}",
            f"{row['postgres_us']:,.0f}",
            f"{row['total_us']:,.0f}",
            ratio_text(row.get("cost_ratio")),
            ratio_text(row.get("own_ratio")),
            f"{row['service_rss_mib']:.0f}",
        ]
        for row in summary
        if row["connections"] == connections
    ]


def _notes(summary: Sequence[dict[str, Any]], connections: int) -> str:
    """Remarks: how far the generator was from being the bottleneck, and what was not acknowledged."""
    rows = [row for row in summary if row["connections"] == connections]
    note = "the generator took " + ", ".join(
        f"{row['generator_us']:.0f} µs ({row['generator_share']:.0%} of a core) for {row['contestant']}"
        for row in rows
    )
    for row in rows:
        if row["refused"] or row["broken"]:
            note += f"; {row['contestant']} refused {row['refused']} and broke off {row['broken']}"
    return note


def _title(connections: int) -> str:
    plural = "" if connections == 1 else "s"
    return f"{connections} connection{plural}: CPU-µs per durable order (medians; ratios with their spread)"


def _loads(summary: Sequence[dict[str, Any]]) -> list[int]:
    return list(dict.fromkeys(row["connections"] for row in summary))


def _show(console: Console, summary: Sequence[dict[str, Any]], targets: Sequence[Goal]) -> None:
    for connections in _loads(summary):
        console.print(table(_title(connections), _HEADINGS, _rows(summary, connections)))
        console.print(_notes(summary, connections) + "\n", style="dim")
    show_machine(console)
    show_targets(console, targets)


def _write(
    folder: Path, report: dict[str, Any], summary: Sequence[dict[str, Any]], targets: Sequence[Goal]
) -> str:
    """Leave all forms of the report in *folder*; the tables as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(report, indent=1))
    lines = []
    for connections in _loads(summary):
        lines += [f"**{_title(connections)}**", ""]
        lines += [marked_block.markdown_table(_HEADINGS, _rows(summary, connections)), ""]
    lines += [f"- {target.line}" for target in targets]
    lines += ["", machine_line("make bench")]
    text = "\n".join(lines) + "\n"
    (folder / "bench.md").write_text(text)
    charts.bench(summary, folder / "bench")
    return text


if __name__ == "__main__":
    sys.exit(main())
