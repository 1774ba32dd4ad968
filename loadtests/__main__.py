"""`python -m loadtests normal|peak|stress`: a load test that ends in a verdict."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from loadtests.comparing import comparison
from loadtests.judging import acceptance
from loadtests.reports import report
from loadtests.reports.summary import summarise
from loadtests.running.live import LiveLine
from loadtests.running.plan import Plan
from loadtests.running.run import CouldNotRun, run
from loadtests.users.profiles import PROFILES

_COULD_NOT_RUN = 2
_INTERRUPTED = 130
_GRAVITY = (0, 1, 3, _INTERRUPTED)  # of several runs the gravest speaks
_UNITS = {"h": 3600, "m": 60, "s": 1, "": 1}
_RAMP_SECONDS = 10  # the plan's three loads all get there in ten seconds

_EPILOG = """
Every option can be given in the environment, by the name in brackets; `make loadtest-normal DURATION=2m` does so.
Without --host the service that --prometheus-url scrapes is tested; without that, too, one of its own, on a fresh
Postgres. The warm-up (the users' ramp and --warm-up) comes
before --duration; it does not count in the latencies, and it does in the ledger.
Exit codes: 0 PASS, 1 FAIL, 3 INVALID (the figures mean nothing, and why), 2 could not run, 130 ended by Ctrl-C (the
report is of what ran).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code tells the verdict."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser(os.environ)
    options = parser.parse_args(arguments)
    if options.runs < 1:
        parser.error("--runs: at least 1")
    profile = PROFILES[options.profile]
    users = options.users or profile.users
    if options.rate is not None and options.users is None:
        users = max(10, min(2000, round(options.rate)))  # a worker for each arrival of a second
    plan = Plan(
        profile=profile,
        users=users,
        spawn_rate=options.spawn_rate
        or (profile.spawn_rate if users == profile.users else max(1, users / _RAMP_SECONDS)),
        duration_seconds=options.duration or profile.run_time_seconds,
        settle_seconds=options.warm_up,
        command=_command(arguments, os.environ),
        host=_url(options.host),
        metrics_urls=[url for url in re.split(r"[,\s]+", options.metrics_urls or "") if url],
        dsn=options.dsn,
        prometheus_url=options.prometheus_url,
        elasticsearch_url=options.elasticsearch_url,
        api_key=os.environ.get("LOADTEST_API_KEY"),
        strict=options.strict,
        processes=options.processes,
        rate_per_second=options.rate,
        acceptance_path=options.acceptance,
    )
    if plan.host is None and plan.prometheus_url is None and plan.dsn:
        sys.stderr.write("DATABASE_URL is not used without HOST: the service gets a fresh database\n")
    exit_codes: list[int] = []
    directories: list[Path] = []
    try:
        baseline = comparison.find(options.baseline, options.results) if options.baseline else None
        for _ in range(options.runs):
            exit_codes.append(_run(plan, options.results, baseline, directories))
            if exit_codes[-1] == _INTERRUPTED:
                break
    except (CouldNotRun, acceptance.AcceptanceError, FileNotFoundError) as exc:
        sys.stderr.write(f"could not run: {exc}\n")
        return _COULD_NOT_RUN
    except KeyboardInterrupt:
        sys.stderr.write("ended before the load began: there is no report\n")
        return _INTERRUPTED
    return max(exit_codes, key=_GRAVITY.index)


def _run(plan: Plan, results: Path, baseline: Path | None, directories: list[Path]) -> int:
    """One run with its report; *directories*: those of the runs before it, to which its own is added."""
    record, directory = run(plan, results, LiveLine())
    compared = report.write(record, directory, baseline=baseline, earlier=directories)
    directories.append(directory)
    summary = summarise(record, directory)
    if compared is not None:
        summary += f"against {', '.join(compared.baseline)}: {compared.conclusion}\n"
    (directory / "summary.txt").write_text(summary)
    sys.stdout.write(summary)
    return record.exit_code


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def given(name: str, default: str | None = None) -> str | None:
        return environment.get(name, "").strip() or default

    parser.add_argument("profile", choices=PROFILES, help="the plan's loads; mixed also reads and cancels")
    parser.add_argument(
        "--duration",
        type=_seconds,
        default=given("DURATION"),
        help="measured time: 90, 90s, 2m, 1h30m [DURATION]",
    )
    parser.add_argument("--users", type=_count, default=given("USERS"), help="[USERS]")
    parser.add_argument(
        "--spawn-rate", type=float, default=given("SPAWN_RATE"), help="users per second [SPAWN_RATE]"
    )
    parser.add_argument(
        "--warm-up", type=_seconds, default=given("WARM_UP", "5"), help="after the ramp; default 5s [WARM_UP]"
    )
    parser.add_argument("--host", default=given("HOST"), help="URL of the deployment to test [HOST]")
    parser.add_argument(
        "--metrics-urls",
        default=given("METRICS_URLS"),
        help="of its replicas, by commas; default: HOST [METRICS_URLS]",
    )
    parser.add_argument(
        "--dsn",
        default=given("DATABASE_URL", given("DSN")),
        help="its database, for the ledger; else the API is asked [DATABASE_URL, DSN]",
    )
    parser.add_argument(
        "--prometheus-url",
        default=given("PROMETHEUS_URL"),
        help="read the server's side there [PROMETHEUS_URL]",
    )
    parser.add_argument(
        "--elasticsearch-url",
        default=given("ELASTICSEARCH_URL"),
        help="clear logs-* there [ELASTICSEARCH_URL]",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        default=(given("STRICT", "0") or "").lower() in ("1", "true", "yes"),
        help="what could not be measured fails [STRICT=1]",
    )
    parser.add_argument(
        "--processes",
        type=_count,
        default=given("PROCESSES", "1"),
        help="of the generator; default 1 [PROCESSES]",
    )
    parser.add_argument(
        "--rate", type=float, default=given("RATE"), help="open model: orders offered per second [RATE]"
    )
    parser.add_argument("--runs", type=_count, default=given("RUNS", "1"), help="one after another [RUNS]")
    parser.add_argument("--baseline", default=given("BASELINE"), help="a run to compare with [BASELINE]")
    parser.add_argument(
        "--acceptance", type=Path, default=given("ACCEPTANCE", str(acceptance.PATH)), help="[ACCEPTANCE]"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=given("RESULTS", str(Path(__file__).with_name("results"))),
        help="where reports go [RESULTS]",
    )
    return parser


VARIABLES = (
    "DURATION", "USERS", "SPAWN_RATE", "WARM_UP", "HOST", "METRICS_URLS", "PROMETHEUS_URL", "ELASTICSEARCH_URL",
    "STRICT", "PROCESSES", "RATE", "RUNS", "BASELINE", "ACCEPTANCE", "RESULTS",
)  # fmt: skip


def _command(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """What was typed, or its like; without the DSN, which may hold a password."""
    variables = [f"{name}={shlex.quote(environment[name])}" for name in VARIABLES if environment.get(name)]
    shown, hide = [], False
    for argument in arguments:
        shown.append("..." if hide else re.sub(r"^(--dsn=).*", r"\1...", shlex.quote(argument)))
        hide = argument == "--dsn"
    return " ".join([*variables, "python", "-m", "loadtests", *shown])


def _url(host: str | None) -> str | None:
    return host if host is None or "://" in host else f"http://{host}"


def _seconds(text: str) -> float:
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms]?)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90, 90s, 2m or 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
