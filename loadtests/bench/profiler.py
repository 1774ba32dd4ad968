"""`make profile`: where the order path spends its CPU, its time and its memory.

Two runs of the service on an embedded Postgres, under the same orders: one under py-spy, which samples it from
outside, and one under tracemalloc, which is too dear to share a run with anything that measures time. All of it ends
up in one page, `index.html`, with the figures beside it as `profile.json`; a second profile can be compared with it.
"""

import argparse
import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from loadtests.bench import flame_graphs, generator, measurement, profile_page
from loadtests.bench.flame_graphs import CpuProfile
from loadtests.bench.reporting import Steps, command, report_console, show_machine, table
from loadtests.machine import processes
from loadtests.service_side.http_client import http_client

STAGES = ("parse", "price", "queue", "store", "respond")

_LAUNCHER = (sys.executable, "-m", "loadtests.bench.profiled_service")
_SAMPLES_PER_SECOND = 250
_SCRAPE_SECONDS = 1.0  # a scrape costs the service some milliseconds
_PATIENCE_SECONDS = 60.0
_SHOWN = 15
_NAME_WIDTH = 60
_TITLE = re.compile(r'(<text id="title"[^>]*>)[^<]*(</text>)')  # py-spy writes its command line there


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Profile the service and write the page; 1 where that could not be done."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench.profiler", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 seconds of load instead of 15")
    parser.add_argument(
        "--seconds", type=float, help="of load in each of the two runs (default 15; quick: 4)"
    )
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--baseline", type=Path, help="the directory of an earlier profile to compare with")
    parser.add_argument("--output", type=Path, help="default: loadtests/results/profile-TIME")
    options = parser.parse_args(arguments)
    seconds = options.seconds or (4.0 if options.quick else 15.0)
    output = options.output or processes.ROOT / f"loadtests/results/profile-{time.strftime('%Y%m%d-%H%M%S')}"
    console = report_console()
    baseline = _load(options.baseline) if options.baseline else None
    output.mkdir(parents=True, exist_ok=True)
    profile = _profile(console, output, options.connections, seconds)
    (output / "profile.json").write_text(json.dumps(profile, indent=1))
    page = profile_page.write(output, profile, baseline)
    _show(console, profile, baseline)
    console.print(f"open in a browser: {page}", soft_wrap=True)
    return 0


def _load(folder: Path) -> CpuProfile:
    profile: CpuProfile = json.loads((folder / "profile.json").read_text())
    return profile


def _profile(console: Console, output: Path, connections: int, seconds: float) -> CpuProfile:
    steps = Steps(console, 4)
    with (
        steps,
        processes.scratch_directory() as folder,
        processes.steady_postgres(folder) as postgres,
    ):
        dsn = postgres.create_database("profile")
        steps.next("starting the service")
        with processes.service(dsn, folder, name="service-cpu", command=_LAUNCHER) as service:
            requests = generator.OrderRequests(service.url)
            measurement.drive(service.url, requests, connections=connections, seconds=1)
            steps.next(f"sampling its stacks for {seconds:g} s, under {connections} connections")
            with _sampled(service, output / "cpu.svg"), _scraped(service.url) as scrapes:
                cost, ids = measurement.measure(
                    service, postgres, requests, connections=connections, seconds=seconds
                )
        if missing := measurement.missing_orders(dsn, ids):
            raise RuntimeError(f"{missing} acknowledged orders are not in the database")
        steps.next("starting the service again, to follow its allocations")
        command = (*_LAUNCHER, "--allocations")
        with processes.service(
            dsn, folder, name="service-allocations", command=command, stdin=subprocess.PIPE
        ) as service:
            requests = generator.OrderRequests(service.url)
            measurement.drive(service.url, requests, connections=connections, seconds=min(seconds / 2, 3))
            steps.next(f"following its allocations for {seconds:g} s")
            allocations = _allocations(service, requests, folder, connections, seconds)
    before, after = scrapes[0][1], scrapes[-1][1]
    return {
        "machine": processes.machine(),
        "connections": connections,
        "seconds": seconds,
        "cost": asdict(cost),
        "orders_per_commit": _mean(before, after, "order_batch_size", ""),
        "stages_us": {stage: 1e6 * _mean(before, after, "order_stage_seconds", stage) for stage in STAGES},
        "event_loop_lag_ms": [
            [round(at - scrapes[0][0], 2), 1e3 * values["event_loop_lag_seconds", ""]]
            for at, values in scrapes
        ],
        **flame_graphs.functions((output / "cpu.svg").read_text()),
        "allocations": allocations,
    }


@contextlib.contextmanager
def _sampled(service: processes.Server, flame_graph: Path) -> Iterator[None]:
    """Sample the stacks of *service* while the block runs; then the flame graph is there."""
    command = [
        *(str(Path(sys.executable).with_name("py-spy")), "record", "--pid", str(service.process.pid)),
        # Of the thread that holds the interpreter's lock: others that wait would be taken for running ones.
        *("--gil", "--function", "--rate", str(_SAMPLES_PER_SECOND), "--output", str(flame_graph.resolve())),
    ]
    log_path = service.log_path.with_name("py-spy.log")
    with log_path.open("wb") as log, processes.child(command, stdout=log, stderr=log) as sampler:
        give_up_at = time.monotonic() + _PATIENCE_SECONDS
        while "Sampling process" not in log_path.read_text():
            if sampler.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError(
                    f"py-spy cannot look into the service (see /proc/sys/kernel/yama/ptrace_scope: "
                    f"above 1 only root may): {processes.tail(log_path)}"
                )
            time.sleep(0.02)
        yield
        sampler.send_signal(signal.SIGINT)  # it stops and writes
        if sampler.wait(_PATIENCE_SECONDS) or not flame_graph.exists():
            raise RuntimeError(f"py-spy wrote no flame graph: {processes.tail(log_path)}")
        flame_graph.write_text(_TITLE.sub(r"\1CPU of the order service\2", flame_graph.read_text(), count=1))


_Values = dict[tuple[str, str], float]  # by name and the value of the only label, if there is one


@contextlib.contextmanager
def _scraped(url: str) -> Iterator[list[tuple[float, _Values]]]:
    """(monotonic seconds, values) of the service's metrics: at once, each second, and when the block ends."""
    scrapes: list[tuple[float, _Values]] = []
    ended = threading.Event()
    with http_client(timeout_seconds=_PATIENCE_SECONDS) as client:

        def scrape() -> None:
            scrapes.append((time.monotonic(), _metrics(client, url)))

        def scrape_each_second() -> None:
            while not ended.wait(_SCRAPE_SECONDS):
                scrape()

        scrape()
        thread = threading.Thread(target=scrape_each_second, daemon=True)
        thread.start()
        try:
            yield scrapes
        finally:
            ended.set()
            thread.join(_PATIENCE_SECONDS)
        scrape()


def _metrics(client: httpx.Client, url: str) -> _Values:
    text = client.get(f"{url}/metrics").raise_for_status().text
    return {
        (sample.name, "".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _mean(before: _Values, after: _Values, histogram: str, label: str) -> float:
    total, count = (
        after[f"{histogram}_{part}", label] - before[f"{histogram}_{part}", label]
        for part in ("sum", "count")
    )
    return total / count if count else 0.0


def _allocations(
    service: processes.Server, requests: generator.Requests, folder: Path, connections: int, seconds: float
) -> CpuProfile:
    """Memory that the service allocates under load and still holds: in the middle of it, and when it is over.

    Returns:
        `orders`: how many it took; `lines`: the lines of code that hold something, as [line, line of app/ on whose
        behalf, bytes under load, bytes afterwards].
    """
    _tell(service, "start")
    under_load: dict[tuple[str, str], int] = {}

    def look() -> None:
        time.sleep(seconds / 2)
        under_load.update(_held(service, folder / "load.json"))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    outcome = measurement.drive(service.url, requests, connections=connections, seconds=seconds)
    looking.join(_PATIENCE_SECONDS)
    afterwards = _held(service, folder / "afterwards.json")
    return {
        "orders": len(outcome.acknowledged_ids),
        "lines": [
            [*line, under_load.get(line, 0), afterwards.get(line, 0)]
            for line in sorted(under_load.keys() | afterwards.keys())
        ],
    }


def _held(service: processes.Server, path: Path) -> dict[tuple[str, str], int]:
    """Bytes by (line of code, line of app/ on whose behalf)."""
    _tell(service, str(path))
    give_up_at = time.monotonic() + _PATIENCE_SECONDS
    while not path.exists():
        if service.process.poll() is not None or time.monotonic() > give_up_at:
            raise RuntimeError(f"the service told nothing of its memory: {processes.tail(service.log_path)}")
        time.sleep(0.02)
    return {(where, ours): size for where, ours, size in json.loads(path.read_text())}


def _tell(service: processes.Server, order: str) -> None:
    if service.process.stdin is not None:  # it was started with one
        service.process.stdin.write(f"{order}\n".encode())
        service.process.stdin.flush()


def _show(console: Console, profile: CpuProfile, baseline: CpuProfile | None) -> None:
    cost = profile["cost"]
    console.print(
        f"{profile['connections']} connections: {cost['per_second']:,.0f} orders/s, p50 {cost['p50_ms']:.1f} ms, "
        f"p99 {cost['p99_ms']:.1f} ms, {profile['orders_per_commit']:.0f} orders per commit, "
        f"CPU {cost['service_us']:.0f} + {cost['postgres_us']:.0f} µs per order (sampled)\n",
        soft_wrap=True,
    )
    headings = ["function", "µs itself", "µs in all"] + (["before", "difference"] if baseline else [])
    rows = [
        [name if len(name) <= _NAME_WIDTH else f"…{name[1 - _NAME_WIDTH :]}", f"{own:.1f}", f"{whole:.1f}"]
        + ([f"{before:.1f}", f"{own - before:+.1f}"] if before is not None else [])
        for name, own, whole, before in flame_graphs.by_cost(profile, baseline)[:_SHOWN]
    ]
    console.print(table("CPU-µs per order, by function", headings, rows))
    stages = [
        [stage, f"{value:,.0f}"]
        + (
            [f"{baseline['stages_us'][stage]:,.0f}", f"{value - baseline['stages_us'][stage]:+,.0f}"]
            if baseline
            else []
        )
        for stage, value in profile["stages_us"].items()
    ]
    console.print(table("µs an order spends in each stage", ["stage", "µs", *(headings[3:])], stages))
    show_machine(console)


if __name__ == "__main__":
    sys.exit(main())
