"""`python -m loadtests normal|peak|stress`: a load test that ends in a verdict."""

import sys
from collections.abc import Sequence
from pathlib import Path

from loadtests import marked_block
from loadtests.comparing.stored_runs import find
from loadtests.judging.acceptance import AcceptanceError
from loadtests.options import parse
from loadtests.reports import live_page, report
from loadtests.reports.summary import HEADINGS, row, summarise
from loadtests.run_record import RunRecord
from loadtests.running.live import LiveLine
from loadtests.running.plan import REPLICAS, Plan
from loadtests.running.run import CouldNotRun, run

_COULD_NOT_RUN = 2
_INTERRUPTED = 130
_GRAVITY = (0, 1, 3, _INTERRUPTED)  # of several runs the gravest speaks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code tells the verdict."""
    options, plan = parse(sys.argv[1:] if arguments is None else arguments)
    if plan.host is None and plan.prometheus_url is None and plan.dsn:
        sys.stderr.write("DATABASE_URL is not used without HOST: the service gets a fresh database\n")
    exit_codes: list[int] = []
    directories: list[Path] = []
    try:
        baseline = find(options.baseline, options.results) if options.baseline else None
        for _ in range(options.runs):
            exit_codes.append(_run(plan, options.results, baseline, directories))
            if exit_codes[-1] == _INTERRUPTED:
                break
    except (CouldNotRun, AcceptanceError, FileNotFoundError) as exc:
        sys.stderr.write(f"could not run: {exc}\n")
        return _COULD_NOT_RUN
    except KeyboardInterrupt:
        sys.stderr.write("ended before the load began: there is no report\n")
        return _INTERRUPTED
    return max(exit_codes, key=_GRAVITY.index)


def _run(plan: Plan, results: Path, baseline: Path | None, directories: list[Path]) -> int:
    """One run with its report; *directories*: those of the runs before it, to which its own is added."""
    record, directory = run(plan, results, LiveLine(), live_page.served)
    compared = report.write(record, directory, baseline=baseline, earlier=directories)
    directories.append(directory)
    summary = summarise(record, directory)
    if compared is not None:
        summary += f"against {', '.join(compared.baseline)}: {compared.conclusion}\n"
    (directory / "summary.txt").write_text(summary)
    sys.stdout.write(summary)
    if is_the_plans(plan, record):
        marked_block.write_row("loadtests", HEADINGS, row(record))
    return record.exit_code


def is_the_plans(plan: Plan, record: RunRecord) -> bool:
    """Whether a run is one of the plan's three, whole, of a service of its own, and its figures mean something."""
    whole = record.complete and record.planned_seconds == plan.profile.run_time_seconds
    own = plan.host is None and plan.prometheus_url is None and plan.replicas == REPLICAS
    load = record.users == plan.profile.users and record.model == "closed"
    return (
        whole and own and load and plan.profile.orders_per_second is not None and record.verdict != "INVALID"
    )


if __name__ == "__main__":
    sys.exit(main())
