"""One load test from start to record: target, pre-test, Locust, samples, ledger, criteria, verdict."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from loadtests.judging import acceptance, criteria, ledger, quantiles
from loadtests.judging.verdict import Validity, decide
from loadtests.machine import calibration, environment, pretest, processes, target
from loadtests.run_record import Calibration, Environment, Generator, Ledger, RunRecord
from loadtests.running.live import LiveLine, Moment
from loadtests.samples import (
    ACKNOWLEDGED,
    REFUSED,
    UNKNOWN,
    GeneratorSamples,
    JsonLines,
    OrderSamples,
    Sample,
    Window,
    compress,
    percentile_of,
    read_samples,
)
from loadtests.service_side.metrics_pages import MetricsSampler
from loadtests.service_side.prometheus import Prometheus, PrometheusError
from loadtests.service_side.prometheus_sampler import PrometheusSampler
from loadtests.users.profiles import Profile

FOLDER = Path(__file__).parents[1]

_TICK_SECONDS = 0.5
_LOCUST_START_SECONDS = 30.0  # more than it needs to import and to connect its workers
_LOCUST_STOP_SECONDS = 40.0  # its own stop timeout, and the workers' last reports
_RECENT_SECONDS = 5.0  # what the live line's rate and percentile are of


class CouldNotRun(Exception):
    """There is nothing to judge; the message says why."""


@dataclass(frozen=True)
class Plan:
    """What is to be run."""

    profile: Profile
    users: int
    spawn_rate: float
    duration_seconds: float  # measured, after the warm-up
    settle_seconds: float  # of the warm-up, once all users are there
    command: str
    host: str | None = None  # None: what Prometheus scrapes; without one a service of our own
    metrics_urls: Sequence[str] = ()
    dsn: str | None = None
    prometheus_url: str | None = None
    elasticsearch_url: str | None = None
    api_key: str | None = None
    strict: bool = False
    processes: int = 1
    rate_per_second: float | None = None  # the open model's
    acceptance_path: Path = acceptance.PATH

    @property
    def ramp_seconds(self) -> float:
        """Until all users are there."""
        return self.users / self.spawn_rate


class Interruption:
    """Ctrl-C or SIGTERM: the first asks for an end with a report, a second ends at once."""

    def __init__(self) -> None:
        self.asked = False

    def note(self, *_: object) -> None:
        """Handle the signal."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """While the block runs."""
        previous = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def run(plan: Plan, results: Path, live: LiveLine) -> tuple[RunRecord, Path]:
    """Run *plan*; its record, and the directory under *results* that holds it and the raw samples.

    Raises:
        CouldNotRun: there was nothing to measure.
        KeyboardInterrupt: it was ended before its load began.
    """
    limits = acceptance.load(plan.acceptance_path)
    directory = _new_directory(results, plan.profile.name)
    with contextlib.ExitStack() as stack:
        tested = stack.enter_context(_target(plan))
        live.say(f"testing {tested.url}, {plan.profile.name} load: {_load(plan)}; results in {directory}")
        try:
            _pretest(plan, tested, live)
            described = _describe(plan, tested)
            pieces = ledger.pieces_in_database(tested.dsn) if tested.dsn else None
            sampler = (
                PrometheusSampler(Prometheus(plan.prometheus_url))
                if plan.prometheus_url
                else MetricsSampler(tested.metrics_urls)
            )
            stack.enter_context(sampler)
        except (pretest.PretestError, ledger.LedgerError, PrometheusError) as exc:
            raise CouldNotRun(str(exc)) from exc
        before, times_before = calibration.calibrate(), calibration.cpu_times()
        load = _Load(plan, tested, sampler, directory)
        interruption = Interruption()
        with interruption.handled():
            load.run(live, interruption)
            live.say("comparing what was acknowledged with what is stored")
            sampler.finish()
            record = _record(plan, tested, load, limits, described, pieces, complete=not interruption.asked)
    times_after = calibration.cpu_times()
    stolen = times_after.stolen_percent_since(times_before) if times_before and times_after else None
    record = dataclasses.replace(record, calibration=Calibration(before, calibration.calibrate(), stolen))
    compress(directory)
    (directory / "report.json").write_bytes(record.to_json())
    return record, directory


class _Load:
    """Locust under way, and what it wrote down so far."""

    def __init__(
        self,
        plan: Plan,
        tested: target.Target,
        sampler: MetricsSampler | PrometheusSampler,
        directory: Path,
    ) -> None:
        self.plan = plan
        self.sampler = sampler
        self.directory = directory
        self.run_id = uuid.uuid4().hex[:12]
        self.orders = OrderSamples()
        self.generator = GeneratorSamples()
        self.window = Window(0.0, 0.0)
        self.trouble = ""
        self._url = tested.url
        self._order_lines = JsonLines(directory, "orders-*.jsonl")
        self._generator_lines = JsonLines(directory, "generator-*.jsonl")
        self._errors = 0
        self._recent: list[tuple[float, int]] = []  # when, and how many rows there were

    def run(self, live: LiveLine, interruption: Interruption) -> None:
        """Start Locust, warm up, measure, stop it.

        Raises:
            CouldNotRun: it ended before it sent an order.
        """
        log_path = self.directory / "locust.log"
        with (
            log_path.open("wb") as log,
            processes.child(self._command(), env=self._environment(), stdout=log, stderr=log) as locust,
            live,
        ):
            started_at = time.time()
            self.window = Window(*self._planned(started_at))
            while not interruption.asked and time.time() < self.window.end:
                time.sleep(min(_TICK_SECONDS, max(0.0, self.window.end - time.time())))
                self._take()
                if locust.poll() is not None:
                    break
                self._place_window(started_at)
                live.show(self._moment(started_at))
            ended_at = time.time()
            if locust.poll() is not None:
                self.trouble = f"Locust ended by itself: {processes.tail(log_path)}"
            self.window = Window(
                *(round(min(at, ended_at), 3) for at in (self.window.start, self.window.end))
            )
            self._stop(locust)
        self._take()
        self._order_lines.close()
        self._generator_lines.close()
        if self.trouble and not len(self.orders):
            raise CouldNotRun(self.trouble)

    def _command(self) -> list[str]:
        plan = self.plan
        file = "locustfile.py" if plan.rate_per_second is None else "open_model.py"
        longest = plan.ramp_seconds + plan.settle_seconds + plan.duration_seconds + 2 * _LOCUST_START_SECONDS
        command = [
            sys.executable,
            "-m",
            "locust",
            "-f",
            f"{FOLDER / file},{FOLDER / 'users' / 'recording.py'}",
        ]
        command += ["--headless", "--only-summary", "--exit-code-on-error", "0", "--host", self._url]
        command += ["-u", str(plan.users), "-r", f"{plan.spawn_rate:g}", "--run-id", self.run_id]
        command += ["--run-time", f"{round(longest)}s", "--csv", str(self.directory / "locust")]
        if plan.processes > 1:
            port = str(processes.free_port())
            command += ["--processes", str(plan.processes), "--master-port", port, "--master-bind-port", port]
            command += ["--master-bind-host", "127.0.0.1", "--master-host", "127.0.0.1"]
        if plan.rate_per_second is not None:
            command += ["--rate", f"{plan.rate_per_second:g}"]
        return command

    def _environment(self) -> dict[str, str]:
        given = {
            "PYTHONPATH": str(processes.ROOT),
            "LOADTEST_PROFILE": self.plan.profile.name,
            "LOADTEST_RECORD_DIR": str(self.directory),
        }
        if self.plan.api_key:
            given["LOADTEST_API_KEY"] = self.plan.api_key
        if certificates := os.environ.get("SSL_CERT_FILE"):
            given["SSL_CERT_FILE"] = certificates
        return {**processes.plain_environment(), **given}

    def _planned(self, started_at: float) -> tuple[float, float]:
        """The latest that the measured time may be: Locust may be slow to start its users, but not for ever."""
        start = started_at + self.plan.ramp_seconds + self.plan.settle_seconds + _LOCUST_START_SECONDS
        return start, start + self.plan.duration_seconds

    def _place_window(self, started_at: float) -> None:
        """As soon as all users are there, the measured time begins `settle_seconds` later."""
        latest = self._planned(started_at)[0]
        if self.window.start == latest and self.generator.users >= self.plan.users:
            start = min(latest, time.time() + self.plan.settle_seconds)
            self.window = Window(start, start + self.plan.duration_seconds)

    def _take(self) -> None:
        for _, values in self._order_lines.new():
            self.orders.add(Sample(*values))
        for name, values in self._generator_lines.new():
            self.generator.add(name, values)

    def _moment(self, started_at: float) -> Moment:
        now = time.time()
        expected = started_at + self.plan.ramp_seconds + self.plan.settle_seconds + self.plan.duration_seconds
        self._recent.append((now, len(self.orders)))
        while now - self._recent[0][0] > _RECENT_SECONDS and len(self._recent) > 1:
            self._recent.pop(0)
        since, first = self._recent[0]
        outcomes = self.orders.outcome[first:]
        latencies = sorted(
            latency
            for latency, outcome in zip(self.orders.latency_seconds[first:], outcomes, strict=True)
            if outcome == ACKNOWLEDGED
        )
        last = self._recent[-2][1] if len(self._recent) > 1 else 0
        self._errors += sum(outcome != ACKNOWLEDGED for outcome in self.orders.outcome[last:])
        cpu, in_use, pool_max = self.sampler.now()
        warm = now < self.window.start
        return Moment(
            phase="warm-up" if warm else "measured",
            seconds_left=min(self.window.end, max(expected, now)) - now if warm else self.window.end - now,
            users=self.generator.users,
            orders_per_second=len(latencies) / (now - since) if now > since else 0.0,
            p95_ms=percentile_of(latencies, 95),
            errors=self._errors,
            cpu_percent=cpu,
            pool_in_use=in_use,
            pool_max=pool_max,
        )

    def _stop(self, locust: subprocess.Popen[bytes]) -> None:
        """Ask it to let every request in flight finish, and wait until it has."""
        locust.terminate()
        try:
            locust.wait(_LOCUST_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.trouble = f"Locust did not end within {_LOCUST_STOP_SECONDS:g} s"


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
            started = stack.enter_context(target.own_service(folder))
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


def _load(plan: Plan) -> str:
    if plan.rate_per_second is not None:
        return f"{plan.rate_per_second:g} orders/s offered for {plan.duration_seconds:g} s"
    least, most = plan.profile.wait_seconds
    return f"{plan.users} users, {least:g} to {most:g} s between two orders, {plan.duration_seconds:g} s"


def _record(
    plan: Plan,
    tested: target.Target,
    load: _Load,
    limits: acceptance.Acceptance,
    described: Environment,
    pieces: dict[str, int] | None,
    *,
    complete: bool,
) -> RunRecord:
    window, orders = load.window, load.orders
    counts = orders.counts(window)
    acknowledged = orders.latency(ACKNOWLEDGED, window)
    compared, ledger_trouble = _ledger(plan, tested, load, pieces)
    server = load.sampler.server(window, memory_limit_bytes=tested.memory_limit_bytes)
    generator = _generator(plan, load)
    judged = criteria.judge(
        limits,
        plan.profile.name,
        criteria.measure(counts, acknowledged, compared, server, window.seconds),
    )
    checks = Validity(
        counts=counts,
        ledger=compared,
        ledger_trouble=ledger_trouble,
        metrics_trouble="; ".join(load.sampler.trouble.values()),
        generator=generator,
        generator_trouble=load.trouble,
        users=load.generator.mean_users(window),
        planned_users=plan.users,
        target_trouble=tested.trouble,
    ).checks(limits.validity)
    verdict, reasons = decide(judged, checks, strict=plan.strict)
    if not complete:
        reasons = ("ended before its time: the figures are of the part that ran", *reasons)
    first = min(orders.started_at, default=window.start)
    seconds = range(int(first - window.start) - 1, max(1, -int(-window.seconds // 1)))
    columns, errors = orders.per_second(window.start, seconds)
    series = {
        **columns,
        **load.generator.per_second(window.start, seconds),
        **load.sampler.per_second(window.start, seconds),
    }
    return RunRecord(
        profile=plan.profile.name,
        run_id=load.run_id,
        model="closed" if plan.rate_per_second is None else "open",
        target=tested.url,
        started_at=_iso(first),
        measured_from=_iso(window.start),
        measured_until=_iso(window.end),
        duration_seconds=window.seconds,
        planned_seconds=plan.duration_seconds,
        warm_up_seconds=window.start - first,
        users=plan.users,
        spawn_rate=plan.spawn_rate,
        wait_seconds=plan.profile.wait_seconds,
        offered_per_second=plan.rate_per_second,
        orders_per_second=counts.acknowledged / window.seconds if window.seconds > 0 else 0.0,
        complete=complete,
        strict=plan.strict,
        verdict=verdict,
        reasons=reasons,
        counts=counts,
        acknowledged=acknowledged,
        refused=orders.latency(REFUSED, window),
        unknown=orders.latency(UNKNOWN, window),
        seconds=tuple(float(second) for second in seconds),
        series={name: tuple(column) for name, column in series.items()},
        errors={name: tuple(column) for name, column in errors.items()},
        server=server,
        generator=generator,
        ledger=compared,
        criteria=judged,
        checks=checks,
        environment=described,
        quantiles=quantiles.compare(acknowledged, server),
    )


def _ledger(
    plan: Plan, tested: target.Target, load: _Load, pieces: dict[str, int] | None
) -> tuple[Ledger, str]:
    """The ledger of the whole run, and why what is stored could not be read (empty: it was)."""
    customer_id = f"loadtest-{load.run_id}"
    counts = load.orders.counts()
    rise = load.sampler.success_rise()
    try:
        stored = (
            ledger.stored_in_database(tested.dsn, customer_id)
            if tested.dsn
            else ledger.stored_by_api(tested.url, customer_id, plan.api_key)
        )
        compared = ledger.compare(read_samples(load.directory), stored)
        changed = None
        if tested.dsn and pieces is not None:
            after = ledger.pieces_in_database(tested.dsn)
            changed = tuple(sorted(name for name in pieces if after.get(name) != pieces[name]))
    except ledger.LedgerError as exc:
        return Ledger(counts=counts, success_rise=rise), str(exc)
    return (
        dataclasses.replace(
            compared,
            counts=counts,
            source="database" if tested.dsn else "api",
            success_rise=rise,
            stock_not_conserved=changed,
        ),
        "",
    )


def _generator(plan: Plan, load: _Load) -> Generator:
    window, samples = load.window, load.generator
    lateness = samples.lateness_ms(window)
    little = share = None
    if plan.rate_per_second is None:
        latency = load.orders.mean_latency_seconds(window)
        if latency is not None and window.seconds > 0 and plan.profile.name != "mixed":
            sent = load.orders.counts(window).sent
            wait = sum(plan.profile.wait_seconds) / 2
            little = sent / window.seconds * (latency + wait)
    else:
        due, sent = samples.arrivals(window)
        share = sent / due if due else None
    return Generator(
        processes=samples.processes,
        cpu_percent=samples.cpu_percent(window),
        lag_p95_ms=lateness[int(len(lateness) * 0.95)] if lateness else None,
        lag_max_ms=lateness[-1] if lateness else None,
        little_users=little,
        achieved_share=share,
    )


def _new_directory(results: Path, profile: str) -> Path:
    name = f"{profile}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        with contextlib.suppress(FileExistsError):
            (results / f"{name}{suffix}").mkdir(parents=True)
            return results / f"{name}{suffix}"
    raise CouldNotRun(f"{results / name} is there already")


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds")
