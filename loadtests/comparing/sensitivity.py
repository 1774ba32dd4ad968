"""The sensitivity of a comparison on this machine: nothing between two equal builds, 30 %, and perhaps 10 %.

    python -m loadtests.comparing.sensitivity [--runs 5] [--duration 15] [--profile stress]

Four builds take turns, run by run, so that what changes on the machine changes for all of them: the service twice
over, and the service with so much more work in each order that it costs 10 % and 30 % more CPU than in the first run.
Each is held against the first as any two builds are. It exits with 1 where the two equal ones differ, or the 30 % are
not found. The runs of the first side are stored as this machine's noise floor. About 25 s a run, 20 runs.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from loadtests import marked_block
from loadtests.bench.reporting import machine_line
from loadtests.comparing.comparison import Comparison, compare
from loadtests.comparing.figures import METRICS
from loadtests.comparing.noise_floor import RUNS_NEEDED, measure_floor, store_floor
from loadtests.comparing.stored_runs import Run
from loadtests.machine import processes, target
from loadtests.quantities import change, quantity
from loadtests.run_record import RunRecord
from loadtests.running.live import LiveLine
from loadtests.running.plan import Plan
from loadtests.running.run import CouldNotRun, run
from loadtests.users.profiles import PROFILES, Profile

_SLOWER_SERVICE = "loadtests.comparing.slower_service"
_RAMP_SECONDS = 3
_SETTLE_SECONDS = 2.0
_ATTEMPTS = 4
RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Build:
    """A build of the service, by how much slower it is."""

    name: str
    slower_by: float  # share of the CPU of an order


BUILDS = (Build("A", 0.0), Build("A again", 0.0), Build("10 % slower", 0.1), Build("30 % slower", 0.3))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them all and print what each comparison says."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.comparing.sensitivity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=RUNS_NEEDED, help="of each build")
    parser.add_argument(
        "--duration", type=float, default=15.0, metavar="SECONDS", help="measured time of a run"
    )
    parser.add_argument("--profile", choices=PROFILES, default="stress")
    parser.add_argument("--users", type=int)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.runs < RUNS_NEEDED:
        parser.error(f"--runs: at least {RUNS_NEEDED}")
    profile = PROFILES[options.profile]
    options.results.mkdir(parents=True, exist_ok=True)
    sides: dict[Build, list[Run]] = {build: [] for build in BUILDS}
    try:
        for number in range(options.runs):
            # Every second round backwards: what grows or wears off in the course of a round favours nobody.
            for build in BUILDS if number % 2 == 0 else (BUILDS[0], *reversed(BUILDS[1:])):
                sys.stdout.write(f"round {number + 1} of {options.runs}: {build.name}\n")
                sys.stdout.flush()
                first = sides[BUILDS[0]][0].record if sides[BUILDS[0]] else None
                record = _valid_run(build, profile, options.users or profile.users, options.duration, first)
                sides[build].append(Run(f"{build.name} {number + 1}", record))
    except (CouldNotRun, RuntimeError) as exc:
        sys.stderr.write(f"could not run: {exc}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    if floor := measure_floor([one.record for one in sides[BUILDS[0]]]):
        store_floor(options.results, floor)
    compared = {build: compare(sides[BUILDS[0]], sides[build]) for build in BUILDS[1:]}
    text = "\n".join(_lines(sides, compared))
    (options.results / "sensitivity.md").write_text(text)
    document = {build.name: asdict(comparison) for build, comparison in compared.items()}
    (options.results / "sensitivity.json").write_text(json.dumps(document, indent=1))
    if options == parser.parse_args([]):  # a full run
        marked_block.write("sensitivity", changes(compared))
    sys.stdout.write(text)
    return int(not holds(compared))


def holds(compared: Mapping[Build, Comparison]) -> bool:
    """True where equal builds show no difference and 30 % is found, in the figure it was put into."""
    said = {
        build.name: {row.name: row.claim for row in comparison.rows} for build, comparison in compared.items()
    }
    equal = not {"better", "worse"} & set(said["A again"].values())
    return equal and said["30 % slower"].get("cpu_us_per_order") == "worse"


HEADINGS = ("against A", "orders/s", "mean", "p50", "p95", "p99", "CPU per order", "said to differ")


def changes(compared: Mapping[Build, Comparison]) -> str:
    """A row a build: by how much each metric changed, and which of them are claimed to differ; then the machine."""
    titles = dict(zip((metric.name for metric in METRICS), HEADINGS[1:-1], strict=True))
    rows = []
    for build, comparison in compared.items():
        ratios = {row.name: change(row.ratio) for row in comparison.rows}
        claimed = [titles[row.name] for row in comparison.rows if row.claim in ("better", "worse")]
        rows.append(
            [build.name, *(ratios.get(name, "-") for name in titles), ", ".join(claimed) or "nothing"]
        )
    machine = machine_line("python -m loadtests.comparing.sensitivity")
    return f"{marked_block.markdown_table(HEADINGS, rows)}\n\n{machine}"


def _valid_run(
    build: Build, profile: Profile, users: int, seconds: float, first: RunRecord | None
) -> RunRecord:
    """A run that means something, whatever it came to: one that the machine's other work made INVALID is made again."""
    for _ in range(_ATTEMPTS):
        record = _run(build, profile, users, seconds, first)
        if record.verdict != "INVALID" and record.server.cpu_us_per_order is not None:
            return record
        sys.stdout.write(f"  made again: {'; '.join(record.reasons[:1]) or 'no CPU per order'}\n")
        sys.stdout.flush()
    raise RuntimeError(f"{_ATTEMPTS} runs of {build.name} were INVALID: the machine is too busy")


def _run(build: Build, profile: Profile, users: int, seconds: float, first: RunRecord | None) -> RunRecord:
    """One run of one build, on a database of its own."""
    cost = first.server.cpu_us_per_order if first else None
    if build.slower_by and cost is None:
        raise RuntimeError("the first run did not tell its CPU per order")
    settings = {"SLOWER_BY_US": f"{(cost or 0.0) * build.slower_by:.1f}"}
    command = (sys.executable, "-m", _SLOWER_SERVICE)
    with (
        processes.scratch_directory() as folder,
        target.own_service(folder, command=command, settings=settings) as tested,
    ):
        plan = Plan(
            profile=profile,
            users=users,
            spawn_rate=max(1.0, users / _RAMP_SECONDS),
            duration_seconds=seconds,
            settle_seconds=_SETTLE_SECONDS,
            command="python -m loadtests.comparing.sensitivity",
            host=tested.url,
            metrics_urls=list(tested.metrics_urls),
            dsn=tested.dsn,
        )
        with tempfile.TemporaryDirectory() as results:
            record, _ = run(plan, Path(results), LiveLine(Console(quiet=True)))
    return record


def _lines(sides: Mapping[Build, Sequence[Run]], compared: Mapping[Build, Comparison]) -> Iterable[str]:
    yield from ("", "| against A | figure | A | this build | change | 95 % interval | p | claim |")
    yield "| --- | --- | ---: | ---: | ---: | --- | ---: | --- |"
    for build, comparison in compared.items():
        for row in comparison.rows:
            interval = (
                "not known"
                if row.low is None or row.high is None
                else f"{change(row.low)} to {change(row.high)}"
            )
            p = "-" if row.p is None else f"{row.p:.3f}"
            values = f"{quantity(row.baseline, row.unit)} | {quantity(row.candidate, row.unit)} | {change(row.ratio)}"
            yield f"| {build.name} | {row.title} | {values} | {interval} | {p} | {row.claim} |"
    yield ""
    for build, comparison in compared.items():
        drift = f" Calibration work {change(comparison.drift)}." if comparison.drift else ""
        yield f"- {build.name}: {comparison.conclusion}{drift}"
    for build, runs in sides.items():
        rates = [one.record.orders_per_second for one in runs]
        verdicts = sorted({one.record.verdict for one in runs})
        yield (
            f"- {build.name}: {statistics.median(rates):,.0f} orders/s in the middle of {len(runs)} runs, "
            f"{', '.join(verdicts)}"
        )
    yield ""


if __name__ == "__main__":
    sys.exit(main())
