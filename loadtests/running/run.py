"""One load test from start to record: target, pre-test, load, ledger and criteria, verdict."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from loadtests.judging import acceptance, ledger
from loadtests.judging.acceptance import Acceptance
from loadtests.machine import calibration, environment, pretest, processes, target
from loadtests.machine.limits import ProcessLimits
from loadtests.run_record import Calibration, Environment, RunRecord
from loadtests.running.interruption import Interruption
from loadtests.running.live import LiveLine
from loadtests.running.load import Load
from loadtests.running.plan import Plan
from loadtests.running.record import lost, sum_up
from loadtests.samples import compress
from loadtests.service_side.metrics_pages import MetricsSampler
from loadtests.service_side.prometheus import Prometheus, PrometheusError
from loadtests.service_side.prometheus_sampler import PrometheusSampler


class CouldNotRun(Exception):
    """There is nothing to judge; the message says why."""


Page = Callable[[Load, Acceptance, int], contextlib.AbstractContextManager[str]]


def run(plan: Plan, results: Path, live: LiveLine, page: Page | None = None) -> tuple[RunRecord, Path]:
    """Run *plan*; its record, and the directory under *results* that holds it (report.json) and the raw samples.

    Args:
        page: serves the load under way on a port, where *plan* has one.

    Raises:
        CouldNotRun: there was nothing to measure.
        KeyboardInterrupt: it was ended before its load began.
    """
    limits = acceptance.load(plan.acceptance_path)
    directory = _new_directory(results, plan.profile.name)
    if plan.workers:
        _make_current(directory)
    with contextlib.ExitStack() as stack:
        tested = stack.enter_context(_target(plan))
        count = len(tested.metrics_urls)
        replicas = f" ({count} replicas)" if count > 1 else ""
        live.say(
            f"testing {tested.url}{replicas}, {plan.profile.name} load: {plan.load}; results in {directory}"
        )
        try:
            _pretest(plan, tested, live)
            described = _describe(plan, tested)
            pieces = ledger.pieces_in_database(tested.dsn) if tested.dsn else None
            sampler = (
                PrometheusSampler(Prometheus(plan.prometheus_url), [tested.url, *tested.metrics_urls])
                if plan.prometheus_url
                else MetricsSampler(tested.metrics_urls)
            )
            stack.enter_context(sampler)
        except (pretest.PretestError, ledger.LedgerError, PrometheusError) as exc:
            raise CouldNotRun(str(exc)) from exc
        process_limits = ProcessLimits(
            tested.url, tested.pids, memory_bytes=plan.memory_limit_bytes, cpu_cores=plan.cpu_limit_cores
        )
        before, times_before = calibration.calibrate(), calibration.cpu_times()
        load = Load(plan, tested.url, sampler, directory)
        interruption = Interruption()
        with interruption.handled(), contextlib.ExitStack() as serving:
            if page is not None and plan.live_port is not None:
                try:
                    live.say(f"live at {serving.enter_context(page(load, limits, plan.live_port))}")
                except OSError as exc:
                    raise CouldNotRun(f"port {plan.live_port} (LIVE): {exc.strerror}") from exc
            load.run(live, interruption, lambda: lost(load, limits))
            if load.aborted:
                live.say(f"ended early: {load.aborted}")
            if load.trouble and not len(load.orders):
                raise CouldNotRun(load.trouble)
            live.say("comparing what was acknowledged with what is stored")
            sampler.finish()
            complete = not interruption.asked and not load.aborted
            allowed = process_limits.so_far()
            record = sum_up(load, tested, limits, described, pieces, allowed, complete=complete)
    times_after = calibration.cpu_times()
    stolen = times_after.stolen_percent_since(times_before) if times_before and times_after else None
    record = dataclasses.replace(record, calibration=Calibration(before, calibration.calibrate(), stolen))
    compress(directory)
    (directory / "report.json").write_bytes(record.to_json())
    return record, directory


@contextlib.contextmanager
def _target(plan: Plan) -> Iterator[target.Target]:
    if plan.host is not None:
        yield target.deployment(plan.host, plan.metrics_urls, plan.dsn)
        return
    if plan.prometheus_url is not None:
        try:
            scraped = target.scraped_by(Prometheus(plan.prometheus_url))
        except PrometheusError as exc:
            raise CouldNotRun(f"{exc} (PROMETHEUS_URL)") from exc
        yield target.deployment(scraped, plan.metrics_urls, plan.dsn)
        return
    with processes.scratch_directory() as folder, contextlib.ExitStack() as stack:
        try:
            started = stack.enter_context(target.own_service(folder, replicas=plan.replicas))
        except RuntimeError as exc:
            raise CouldNotRun(str(exc)) from exc
        yield started


def _pretest(plan: Plan, tested: target.Target, live: LiveLine) -> None:
    if plan.prometheus_url:
        pretest.reload_prometheus(plan.prometheus_url)
        live.say("Prometheus has reloaded its configuration")
    if plan.elasticsearch_url:
        pretest.clear_logs(plan.elasticsearch_url)
        live.say("the logs in Elasticsearch are cleared")
    pretest.count_products(tested.url, plan.api_key)


def _describe(plan: Plan, tested: target.Target) -> Environment:
    return Environment(
        command=plan.command,
        commit=environment.commit(),
        versions=environment.versions(),
        machine=environment.machine(),
        database=environment.database_settings(tested.dsn),
        dataset=environment.dataset(tested.dsn),
    )


def _make_current(directory: Path) -> None:
    """Let the link `current` beside *directory* lead to it: workers elsewhere cannot know its name."""
    new = directory.with_name("current.new")
    new.unlink(missing_ok=True)
    new.symlink_to(directory.name)
    new.replace(directory.with_name("current"))


def _new_directory(results: Path, profile: str) -> Path:
    name = f"{profile}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        with contextlib.suppress(FileExistsError):
            (results / f"{name}{suffix}").mkdir(parents=True)
            return results / f"{name}{suffix}"
    raise CouldNotRun(f"{results / name} is there already")
