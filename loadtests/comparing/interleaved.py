"""Two commits, or two settings, turn by turn: `make compare A=main B=HEAD`, `make compare A= B=BATCH_MAX_SIZE=50`.

    python -m loadtests.comparing.interleaved --a SIDE --b SIDE [--runs 5] [--profile peak] [--duration 15s]

A side is a commit, or settings of this checkout's service (NAME=VALUE,NAME=VALUE), or nothing: this checkout as it is.
Each run has a service and a PostgreSQL of its own. Every second turn goes backwards, so that what grows or wears off
favours nobody. Exit codes: 0 no regression that these runs show, 1 B is worse beyond the noise, 2 could not run.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from loadtests.comparing.comparison import Comparison, compare
from loadtests.comparing.noise_floor import RUNS_NEEDED, measure_floor, read_floors, store_floor
from loadtests.comparing.stored_runs import Run
from loadtests.machine import processes, target
from loadtests.quantities import change, quantity
from loadtests.running.live import LiveLine
from loadtests.running.plan import Plan
from loadtests.running.run import CouldNotRun, run
from loadtests.users.profiles import PROFILES

RESULTS = Path(__file__).parents[1] / "results"

_RAMP_SECONDS = 3
_SETTLE_SECONDS = 2.0
_ATTEMPTS = 3
_SETTING = re.compile(r"[A-Z][A-Z0-9_]*=[^,]*")


class NoSuchSideError(Exception):
    """A side is neither a commit nor settings; the message says so."""


@dataclass(frozen=True)
class Side:
    """One of the two: a checkout, and settings of its service."""

    name: str
    folder: Path
    settings: Mapping[str, str]


@contextlib.contextmanager
def side(name: str, text: str, scratch: Path) -> Iterator[Side]:
    """The side that *text* means; a commit is checked out below *scratch* while the block runs.

    Raises:
        NoSuchSideError: it means none.
    """
    parts = [part for part in text.split(",") if part]
    if all(_SETTING.fullmatch(part) for part in parts):
        settings = dict(part.split("=", 1) for part in parts)
        yield Side(f"{name} ({text or 'this checkout'})", processes.ROOT, settings)
        return
    folder = scratch / name
    added = _git("worktree", "add", "--detach", str(folder), text)
    if added.returncode:
        raise NoSuchSideError(
            f"{name}={text}: neither a commit nor NAME=VALUE settings ({added.stderr.strip()})"
        )
    try:
        yield Side(f"{name} ({text})", folder, {})
    finally:
        _git("worktree", "remove", "--force", str(folder))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both sides in turn, and say what can be claimed."""
    options = _parser().parse_args(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Run]] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="order-compare-") as scratch, contextlib.ExitStack() as stack:
            sides = [
                stack.enter_context(side(name, text, Path(scratch)))
                for name, text in (("A", options.a), ("B", options.b))
            ]
            for turn in range(options.runs):
                for each in sides if turn % 2 == 0 else reversed(sides):
                    sys.stdout.write(f"turn {turn + 1} of {options.runs}: {each.name}\n")
                    sys.stdout.flush()
                    made = runs.setdefault(each.name, [])
                    made.append(_valid_run(each, options, f"{each.name} {turn + 1}"))
    except (CouldNotRun, NoSuchSideError, RuntimeError) as exc:
        sys.stderr.write(f"could not run: {exc}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    first, second = (runs[each.name] for each in sides)
    compared = compare(first, second, read_floors(options.results))
    if floor := measure_floor([one.record for one in first]):
        store_floor(options.results, floor)
    sys.stdout.write("\n".join(lines(compared)) + "\n")
    document = {"conclusion": compared.conclusion, **asdict(compared)}
    (options.results / "compare.json").write_text(json.dumps(document, indent=1))
    return int(any(row.claim == "worse" for row in compared.rows))


def lines(compared: Comparison) -> Iterator[str]:
    """The figures of both sides, and what they let one claim."""
    yield from (
        "",
        "| figure | A | B | change | 95 % interval | claim |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    )
    for row in compared.rows:
        known = row.low is not None and row.high is not None
        interval = f"{change(row.low or 1)} to {change(row.high or 1)}" if known else "not known"
        values = (
            f"{quantity(row.baseline, row.unit)} | {quantity(row.candidate, row.unit)} | {change(row.ratio)}"
        )
        yield f"| {row.title} | {values} | {interval} | {row.claim} |"
    yield from ("", compared.conclusion)


def _valid_run(each: Side, options: argparse.Namespace, name: str) -> Run:
    """A run that means something; one that the machine's other work made INVALID is made again."""
    profile = PROFILES[options.profile]
    users = options.users or profile.users
    for _ in range(_ATTEMPTS):
        with (
            processes.scratch_directory() as folder,
            target.own_service(folder, settings=each.settings, cwd=each.folder) as tested,
            tempfile.TemporaryDirectory() as results,
        ):
            plan = Plan(
                profile=profile,
                users=users,
                spawn_rate=max(1.0, users / _RAMP_SECONDS),
                duration_seconds=options.duration,
                settle_seconds=_SETTLE_SECONDS,
                command="python -m loadtests.comparing.interleaved",
                host=tested.url,
                metrics_urls=list(tested.metrics_urls),
                dsn=tested.dsn,
            )
            record, _ = run(plan, Path(results), LiveLine(Console(quiet=True)))
        if record.verdict != "INVALID":
            return Run(name, record)
        sys.stdout.write(f"  made again: {record.reasons[0]}\n")
    raise RuntimeError(f"{_ATTEMPTS} runs of {each.name} were INVALID: the machine is too busy")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.comparing.interleaved",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    variables = os.environ
    parser.add_argument("--a", default=variables.get("A", ""), metavar="SIDE")
    parser.add_argument("--b", default=variables.get("B", ""), metavar="SIDE")
    parser.add_argument(
        "--runs", type=int, default=int(variables.get("RUNS") or RUNS_NEEDED), help="of each side"
    )
    parser.add_argument(
        "--duration", type=float, default=15.0, metavar="SECONDS", help="measured time of a run"
    )
    parser.add_argument("--profile", choices=PROFILES, default=variables.get("PROFILE") or "peak")
    parser.add_argument("--users", type=int)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603
        ["git", *arguments],  # noqa: S607 - the one on the PATH
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


if __name__ == "__main__":
    sys.exit(main())
