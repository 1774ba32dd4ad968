"""The options of `python -m loadtests`, from flags and the environment, and the plan they make."""

import argparse
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import configargparse

from loadtests.judging import acceptance
from loadtests.running.plan import REPLICAS, Plan
from loadtests.users.profiles import PROFILES

_EPILOG = """
Without --host the service that --prometheus-url scrapes is tested; without that, too, one of its own, on a fresh
Postgres. The warm-up (the users' ramp and --warm-up) comes before --duration; only the ledger counts it.
LOADTEST_API_KEY is sent with every request.
Exit codes: 0 PASS, 1 FAIL, 3 INVALID (the figures mean nothing, and why), 2 could not run, 130 ended by Ctrl-C (the
report is of what ran).
"""
_RESULTS = Path(__file__).with_name("results")
_UNITS = {"h": 3600, "m": 60, "s": 1, "": 1}
_RAMP_SECONDS = 10  # the plan's three loads all get there in ten seconds
_HIGHEST_PORT = 65535
_MIN_WORKERS, _MAX_WORKERS = 10, 2000  # of an open model


def parser() -> Any:
    """A `configargparse.ArgParser`; `make loadtest-normal DURATION=2m` sets an option by its variable."""
    made = configargparse.ArgParser(
        prog="python -m loadtests",
        description="A load test that ends in a verdict.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_config_file_help=False,
        allow_abbrev=False,
    )

    def add(name: str, **settings: Any) -> None:
        made.add_argument(name, **{"env_var": name[2:].replace("-", "_").upper(), **settings})

    made.add_argument(
        "profile",
        choices=PROFILES,
        help="normal, peak and stress are the plan's; mixed also reads and cancels",
    )
    add("--duration", type=_seconds, help="measured time: 90, 90s, 2m, 1h30m; default: the plan's")
    add("--users", type=_count, help="default: the plan's; with --rate one for each order of a second")
    add("--spawn-rate", type=float, help="users started per second; default: all within ten seconds")
    add("--warm-up", type=_seconds, default=5.0, help="once all users are there; default: 5s")
    add(
        "--replicas",
        type=_count,
        default=REPLICAS,
        help="of the service that it starts; default: 3, as the plan's",
    )
    add("--host", type=_url, help="URL of the deployment to test")
    add("--metrics-urls", type=_urls, default=[], help="of its replicas, by commas; default: HOST's")
    add(
        "--dsn", env_var="DATABASE_URL", help="its database, for the ledger (DSN, too); else the API is asked"
    )
    add("--prometheus-url", help="read the service's side there, once it has reloaded its configuration")
    add("--elasticsearch-url", help="delete the documents of logs-* there, before the run")
    add(
        "--strict",
        action="store_true",
        help="what was not measured fails, what was not checked makes the run INVALID",
    )
    add("--processes", type=_count, default=1, help="of the generator; default: 1")
    add(
        "--workers",
        type=_count,
        help="Locust workers that run elsewhere and connect to port 5557; they record in RESULTS/current",
    )
    add("--rate", type=float, help="open model: orders offered per second, whoever keeps up")
    add(
        "--abort-on-fail",
        type=_seconds,
        metavar="GRACE",
        help="end with FAIL as soon as errors, percentiles or a standstill miss their limits, after this much measured "
        "time: 30s",
    )
    add(
        "--live",
        type=_port,
        metavar="PORT",
        help="a page of the run under way, and /metrics, on loopback; 0: any",
    )
    add("--memory-limit", type=_bytes, help="of a service process: 512Mi, 2Gi; default: its cgroup's, or 2Gi")
    add("--cpu-limit", type=_cores, help="of a service process: 0.5, 500m; default: its cgroup's, or 1")
    add("--runs", type=_count, default=1, help="one after another, compared as one side; default: 1")
    add(
        "--baseline",
        help="the run to compare with, a directory or a name in --results; default: the last alike",
    )
    add("--acceptance", type=Path, default=acceptance.PATH, help="the criteria; default: acceptance.toml")
    add("--results", type=Path, default=_RESULTS, help="where reports go; default: loadtests/results")
    return made


def parse(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> tuple[Any, Plan]:
    """The options, and the plan they make; ends with 2 and a line where they make none."""
    given = {name: value.strip() for name, value in environment.items() if value.strip()}
    if "DSN" in given:
        given.setdefault("DATABASE_URL", given["DSN"])
    made = parser()
    options = made.parse_args(arguments, env_vars=given)
    variables = made.get_source_to_settings_dict().get("environment_variables", {})
    shown = {name: given[name] for name, (action, _) in variables.items() if action.dest != "dsn"}
    profile = PROFILES[options.profile]
    users = options.users or profile.users
    if options.rate is not None and options.users is None:
        users = max(_MIN_WORKERS, min(_MAX_WORKERS, round(options.rate)))
    plan = Plan(
        profile=profile,
        users=users,
        spawn_rate=options.spawn_rate
        or (profile.spawn_rate if users == profile.users else max(1, users / _RAMP_SECONDS)),
        duration_seconds=options.duration or profile.run_time_seconds,
        settle_seconds=options.warm_up,
        command=_command(arguments, shown),
        replicas=options.replicas,
        host=options.host,
        metrics_urls=options.metrics_urls,
        dsn=options.dsn,
        prometheus_url=options.prometheus_url,
        elasticsearch_url=options.elasticsearch_url,
        api_key=environment.get("LOADTEST_API_KEY"),
        strict=options.strict,
        processes=options.processes,
        workers=options.workers or 0,
        rate_per_second=options.rate,
        abort_after_seconds=options.abort_on_fail,
        live_port=options.live,
        memory_limit_bytes=options.memory_limit,
        cpu_limit_cores=options.cpu_limit,
        acceptance_path=options.acceptance,
    )
    return options, plan


def _command(arguments: Sequence[str], variables: Mapping[str, str]) -> str:
    """The command that was typed, or its like; without the DSN, which may hold a password."""
    shown, hide = [], False
    for argument in arguments:
        shown.append("..." if hide else re.sub(r"^(--dsn=).*", r"\1...", shlex.quote(argument)))
        hide = argument == "--dsn"
    set_before = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return " ".join([*set_before, "python", "-m", "loadtests", *shown])


def _url(text: str) -> str:
    return text if "://" in text else f"http://{text}"


def _urls(text: str) -> list[str]:
    return [_url(url) for url in re.split(r"[,\s]+", text) if url]


def _seconds(text: str) -> float:
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms]?)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90, 90s, 2m or 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > _HIGHEST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)


def _bytes(text: str) -> float:
    units = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "k": 10**3, "M": 10**6, "G": 10**9}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(Ki|Mi|Gi|k|M|G|)", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512Mi or 2Gi")
    return float(found[1]) * units[found[2]]


def _cores(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m?)", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of cores such as 0.5 or 500m")
    return float(found[1]) / (1000 if found[2] else 1)
