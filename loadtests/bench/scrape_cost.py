"""`make bench-scrape`: how long a scrape of /metrics takes at full load, and whether the orders notice.

Phases of the same load with and without scrapes take turns; the second in which the clients connect does not count.
With scrapes there is one every second, five times as many as Prometheus is set to make, and the orders are told apart
by when they were answered: in the half-second that begins with a scrape, or in the other. A load test's report shows
latency by the second; what does not show here does not show there.
"""

import argparse
import bisect
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from loadtests import marked_block
from loadtests.bench import generator, measurement
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
from loadtests.bench.scraper import Scrape, scraping
from loadtests.machine import processes

_INTERVAL_SECONDS = 1.0
_HALF_SECONDS = _INTERVAL_SECONDS / 2
_IDLE_SECONDS = 2.0
_IDLE_INTERVAL_SECONDS = 0.05
_WARM_UP_SECONDS = 2.0
_CONNECTING_SECONDS = 1.0
_MOST_MS = 50.0
_MOST_RATIO = 1.1  # times the p99 without scrapes: two phases without any differ by as much


@dataclass(frozen=True)
class Phase:
    """A few seconds of load."""

    connections: int
    scraped: bool
    per_second: float
    p50_ms: float
    p99_ms: float
    scrapes_ms: Sequence[float]
    p99_at_scrapes_ms: float | None  # of the orders answered in the half-seconds that begin with one
    p99_between_ms: float | None
    refused: int
    missing: int  # acknowledged, and not in the database


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 where an acknowledged order is missing, or the run came to nothing."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench.scrape_cost", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute: shorter phases, fewer of them")
    parser.add_argument(
        "--rounds", type=int, help="of a phase with and one without scrapes (default 4; quick: 2)"
    )
    parser.add_argument("--seconds", type=float, help="of a phase (default 10; quick: 5)")
    parser.add_argument("--connections", type=int, nargs="+", default=[64, 500])
    parser.add_argument("--output", type=Path, default=processes.ROOT / "loadtests/results/scrape")
    options = parser.parse_args(arguments)
    rounds = options.rounds or (2 if options.quick else 4)
    seconds = options.seconds or (5.0 if options.quick else 10.0)
    console = report_console()
    idle, phases = _run(console, options.connections, rounds, seconds)
    missing = sum(phase.missing for phase in phases)
    rows = [summarise(phases, connections) for connections in options.connections]
    targets = [target for row in rows for target in judge(row)]
    _show(console, idle, rows, targets)
    if missing:
        raise RuntimeError(f"{missing} acknowledged orders are not in the database: no figure here counts")
    options.output.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": processes.machine(),
        "rounds_of_seconds": [rounds, seconds],
        "idle_scrapes_ms": [scrape.seconds * 1e3 for scrape in idle],
        "page_bytes": idle[-1].size_bytes,
        "summary": rows,
        "targets": [asdict(target) for target in targets],
        "phases": [asdict(phase) for phase in phases],
    }
    (options.output / "scrape.json").write_text(json.dumps(report, indent=1))
    if options == parser.parse_args([]):  # a full run
        marked_block.write("bench-scrape", _markdown(idle, rows, targets))
    console.print(f"all phases as JSON: {options.output}", soft_wrap=True)
    return 0


def _run(
    console: Console, loads: Sequence[int], rounds: int, seconds: float
) -> tuple[Sequence[Scrape], list[Phase]]:
    steps = Steps(console, 2 + len(loads) * 2 * rounds)
    with steps, processes.scratch_directory() as folder, contextlib.ExitStack() as stack:
        steps.next("starting the service")
        postgres = stack.enter_context(processes.steady_postgres(folder))
        server = stack.enter_context(processes.service(postgres.create_database("bench_scrape"), folder))
        requests = generator.OrderRequests(server.url)
        steps.next("scraping an idle service")
        measurement.drive(server.url, requests, connections=min(loads), seconds=_WARM_UP_SECONDS)
        with scraping(f"{server.url}/metrics", _IDLE_INTERVAL_SECONDS) as idle:
            time.sleep(_IDLE_SECONDS)
        phases = []
        for connections in loads:
            for number in range(rounds):
                # By turns, so that neither is always the one after the other.
                for scraped in (False, True) if number % 2 == 0 else (True, False):
                    steps.next(
                        f"{connections} connections, round {number + 1} of {rounds}: "
                        + ("with scrapes" if scraped else "without")
                    )
                    phases.append(_phase(server, requests, connections, seconds, scraped=scraped))
    return idle.done, phases


def _phase(
    server: processes.Server,
    requests: generator.OrderRequests,
    connections: int,
    seconds: float,
    *,
    scraped: bool,
) -> Phase:
    scrapes: Sequence[Scrape] = ()
    with contextlib.ExitStack() as stack:
        if scraped:
            scraper = stack.enter_context(scraping(f"{server.url}/metrics", _INTERVAL_SECONDS))
        outcome = measurement.drive(server.url, requests, connections=connections, seconds=seconds)
    settled_at = min(outcome.answered_at, default=0.0) + _CONNECTING_SECONDS
    answers = [
        (at, latency)
        for at, latency in zip(outcome.answered_at, outcome.latencies_seconds, strict=True)
        if at >= settled_at
    ]
    if len(answers) < 2:  # noqa: PLR2004 - percentiles need two
        raise RuntimeError(f"{server.name} acknowledged next to nothing; {processes.tail(server.log_path)}")
    latencies, ended_at = [latency for _, latency in answers], answers[-1][0]
    if scraped:
        last_start = ended_at - _INTERVAL_SECONDS
        scrapes = [one for one in scraper.done if settled_at <= one.started_at <= last_start]
    at_scrapes, between = split(answers, [scrape.started_at for scrape in scrapes])
    return Phase(
        connections=connections,
        scraped=scraped,
        per_second=len(answers) / (ended_at - settled_at),
        p50_ms=_percentile_ms(latencies, 50),
        p99_ms=_percentile_ms(latencies, 99),
        scrapes_ms=[scrape.seconds * 1e3 for scrape in scrapes],
        p99_at_scrapes_ms=_percentile_ms(at_scrapes, 99) if len(at_scrapes) > 1 else None,
        p99_between_ms=_percentile_ms(between, 99) if len(between) > 1 else None,
        refused=outcome.refused + outcome.broken,
        missing=measurement.missing_orders(server.dsn, outcome.acknowledged_ids),
    )


def split(
    answers: Sequence[tuple[float, float]], scrapes_at: Sequence[float]
) -> tuple[list[float], list[float]]:
    """The latencies of *answers* (when, latency) in the half-second from a scrape on, and in the one after it."""
    at_scrapes: list[float] = []
    between: list[float] = []
    for at, latency in answers:
        place = bisect.bisect_right(scrapes_at, at)
        since = at - scrapes_at[place - 1] if place else _INTERVAL_SECONDS
        if since < _HALF_SECONDS:
            at_scrapes.append(latency)
        elif since < _INTERVAL_SECONDS:
            between.append(latency)
    return at_scrapes, between


def _percentile_ms(latencies_seconds: Sequence[float], percentile: int) -> float:
    return statistics.quantiles(latencies_seconds, n=100, method="inclusive")[percentile - 1] * 1e3


def summarise(phases: Sequence[Phase], connections: int) -> dict[str, Any]:
    """One load: medians over its phases, all scrapes together, and ratios as [least, median, most] of its rounds."""
    without = [phase for phase in phases if phase.connections == connections and not phase.scraped]
    scraped = [phase for phase in phases if phase.connections == connections and phase.scraped]
    scrapes = sorted(ms for phase in scraped for ms in phase.scrapes_ms)
    beside = [with_them.p99_ms / alone.p99_ms for with_them, alone in zip(scraped, without, strict=True)]
    within = [
        phase.p99_at_scrapes_ms / phase.p99_between_ms
        for phase in scraped
        if phase.p99_at_scrapes_ms and phase.p99_between_ms
    ]
    return {
        "connections": connections,
        "per_second": statistics.median(phase.per_second for phase in without),
        "per_second_scraped": statistics.median(phase.per_second for phase in scraped),
        "p99_ms": statistics.median(phase.p99_ms for phase in without),
        "p99_ms_scraped": statistics.median(phase.p99_ms for phase in scraped),
        "scrapes": len(scrapes),
        "scrape_mean_ms": statistics.fmean(scrapes),
        "scrape_p99_ms": _nearest_rank(scrapes, 0.99),
        "scrape_max_ms": scrapes[-1],
        "scrape_p99_ms_of_rounds": _spread([_nearest_rank(phase.scrapes_ms, 0.99) for phase in scraped]),
        "p99_ratio": _spread(beside),
        "p99_at_scrapes_ratio": _spread(within),
    }


def _nearest_rank(values: Sequence[float], share: float) -> float:
    return sorted(values)[math.ceil(share * len(values)) - 1]


def _spread(values: Sequence[float]) -> list[float]:
    return [min(values), statistics.median(values), max(values)]


def judge(row: dict[str, Any]) -> list[Goal]:
    """The targets of one load."""
    at = f"at {row['connections']} connections"
    return [
        Goal(
            f"ms of a scrape {at}, p99 of a round", row["scrape_p99_ms_of_rounds"], _MOST_MS, at_least=False
        ),
        Goal(
            f"p99 of the orders {at}, half-seconds with a scrape over those without",
            row["p99_at_scrapes_ratio"],
            _MOST_RATIO,
            at_least=False,
        ),
        Goal(
            f"p99 of the orders {at}, phases with scrapes over those without",
            row["p99_ratio"],
            _MOST_RATIO,
            at_least=False,
        ),
    ]


_HEADINGS = (
    "connections", "orders/s", "scraped", "p99 ms", "scraped", "ratio", "at scrapes",
    "scrape ms", "p99", "max",
)  # fmt: skip


def _show(
    console: Console, idle: Sequence[Scrape], rows: Sequence[dict[str, Any]], targets: Sequence[Goal]
) -> None:
    cells = [
        [
            str(row["connections"]),
            f"{row['per_second']:,.0f}",
            f"{row['per_second_scraped']:,.0f}",
            milliseconds_text(row["p99_ms"]),
            milliseconds_text(row["p99_ms_scraped"]),
            ratio_text(row["p99_ratio"]),
            ratio_text(row["p99_at_scrapes_ratio"]),
            milliseconds_text(row["scrape_mean_ms"]),
            milliseconds_text(row["scrape_p99_ms"]),
            milliseconds_text(row["scrape_max_ms"]),
        ]
        for row in rows
    ]
    console.print(table("orders without scrapes and with one a second, and the scrapes", _HEADINGS, cells))
    alone = sorted(scrape.seconds * 1e3 for scrape in idle)
    console.print(
        f"a page of {idle[-1].size_bytes:,} bytes; idle, a scrape took {statistics.fmean(alone):.1f} ms, "
        f"at most {alone[-1]:.1f}: what is above that is waiting for a busy loop and a busy core\n",
        style="dim",
    )
    show_machine(console)
    show_targets(console, targets)


def _markdown(idle: Sequence[Scrape], rows: Sequence[dict[str, Any]], targets: Sequence[Goal]) -> str:
    """What a scrape took, idle and under each load, and the targets."""
    alone = [scrape.seconds * 1e3 for scrape in idle]
    loads = [("no load", statistics.fmean(alone), max(alone))] + [
        (f"{row['connections']} connections", row["scrape_mean_ms"], row["scrape_max_ms"]) for row in rows
    ]
    return "\n".join(
        [
            *(
                f"- {load}: a scrape took {milliseconds_text(mean)} ms, at most {milliseconds_text(most)}"
                for load, mean, most in loads
            ),
            *(f"- {target.line}" for target in targets),
            "",
            machine_line("make bench-scrape"),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
