"""`python -m loadtests` from end to end: a real Locust against real services, honest, faulty and lying ones."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from loadtests import __main__ as command
from loadtests.judging import acceptance
from loadtests.judging.ledger import REPEATED
from loadtests.machine import processes
from loadtests.run_record import RunRecord
from loadtests.running import locust_process
from tests.support import performance_test_plan
from tests.support.balancer import balancer
from tests.support.fake_prometheus import fake_prometheus
from tests.support.loadtest_environment import clear_options
from tests.support.patient_acceptance import patient_acceptance
from tests.support.run_records import read_samples

SHORT = ("--users", "20", "--spawn-rate", "20", "--warm-up", "1", "--duration", "4")
# Enough for the throughput of the normal load, and for a thousand orders.
LONG = ("--users", "100", "--spawn-rate", "50", "--warm-up", "2", "--duration", "20")

Serve = Callable[..., processes.Server]


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the developer has set is not what is tested."""
    clear_options(monkeypatch)


@pytest.fixture
def serve(tmp_path: Path, database_url: str) -> Iterator[Serve]:
    """Start a service with a fault: `serve("slow")`; all share a database."""
    with contextlib.ExitStack() as stack:

        def start(fault: str = "none", name: str = "service") -> processes.Server:
            call = (sys.executable, "-m", "tests.support.faulty_services", fault)
            return stack.enter_context(processes.service(database_url, tmp_path, name=name, command=call))

        yield start


@pytest.fixture
def patient(tmp_path: Path) -> Path:
    return patient_acceptance(tmp_path)


@dataclasses.dataclass(frozen=True)
class Ended:
    """A run that has ended."""

    exit_code: int
    record: RunRecord
    directory: Path

    @property
    def failed(self) -> set[str]:
        return {criterion.name for criterion in self.record.criteria if criterion.verdict == "FAIL"}

    @property
    def breached(self) -> set[str]:
        return {check.name for check in self.record.checks if check.verdict == "BREACH"}

    def verdict_of(self, name: str) -> str:
        verdicts = {criterion.name: str(criterion.verdict) for criterion in self.record.criteria}
        verdicts |= {check.name: str(check.verdict) for check in self.record.checks}
        return verdicts[name]

    def ids_of(self, check: str) -> tuple[str, ...]:
        [ids] = [one.ids for one in self.record.checks if one.name == check]
        return ids


def drive(patient: Path, host: str, *arguments: str, profile: str = "normal") -> Ended:
    """Run the command in this process."""
    results = patient.parent / "results"
    common = ("--results", str(results), "--acceptance", str(patient), "--host", host)
    exit_code = command.main([profile, *common, *arguments])
    [directory] = results.iterdir()
    return Ended(exit_code, RunRecord.from_json((directory / "report.json").read_bytes()), directory)


def stored_ids(dsn: str) -> set[str]:
    with contextlib.closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT id::text FROM orders")
        return {order_id for (order_id,) in cursor.fetchall()}


def seconds_since_epoch(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def test_an_honest_run(patient: Path, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """The ledger is clean, and every figure of the client's side is what the raw samples say."""
    service = serve()
    ended = drive(patient, service.url, *SHORT)
    record = ended.record
    assert ended.breached == set(), record.reasons
    assert ended.failed <= {"latency_mean", "cpu"}  # how fast is not what is tested here
    samples = list(read_samples(ended.directory))
    assert {sample.order_id for sample in samples if sample.outcome == "acknowledged"} == stored_ids(
        service.dsn
    )
    start, end = map(seconds_since_epoch, (record.measured_from, record.measured_until))
    measured = [sample for sample in samples if start <= sample.started_at < end]
    assert record.counts.sent == pytest.approx(len(measured), abs=2)
    latencies = sorted(sample.latency_seconds * 1000 for sample in measured)
    assert record.acknowledged.count == len(latencies)
    assert record.acknowledged.p95_ms == pytest.approx(
        latencies[int(len(latencies) * 0.95 + 0.5) - 1],  # the nearest rank, as HdrHistogram rounds it
        rel=0.001,
    )
    assert record.acknowledged.mean_ms == pytest.approx(sum(latencies) / len(latencies), rel=0.001)
    assert record.ledger.source == "api"
    assert (
        record.ledger.counts.sent == len(samples) > record.counts.sent
    )  # the warm-up is in the ledger alone
    assert record.ledger.success_rise == len(samples)
    assert ended.verdict_of("stock") == "NOT CHECKED"
    assert ended.verdict_of("critical_alerts") == "NOT MEASURED"
    assert ended.verdict_of("latency_p99") == "NOT MEASURED"  # fewer than a thousand orders
    assert RunRecord.from_json(record.to_json()) == record
    assert {len(column) for column in record.series.values()} == {len(record.seconds)}
    assert {"users", "orders_per_second", "p95_ms", "cpu_percent", "pool_in_use"} <= record.series.keys()
    said = capsys.readouterr().out
    assert "measured" in said
    assert f"VERDICT: {record.verdict}" in said
    assert ended.exit_code == record.exit_code == {"PASS": 0, "FAIL": 1, "INVALID": 3}[record.verdict]


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("stores_nothing", "acknowledged_stored"),
        pytest.param("stores_twice", "stored_explained", marks=pytest.mark.slow),
        pytest.param("drops", "acknowledged_stored", marks=pytest.mark.slow),
    ],
)
def test_a_lying_service(patient: Path, serve: Serve, fault: str, check: str) -> None:
    """The run fails, and names the orders that were lied about; keys that were sent again, later, add a few."""
    service = serve(fault)
    ended = drive(patient, service.url, *SHORT, "--dsn", service.dsn)
    assert (ended.exit_code, ended.record.verdict) == (1, "FAIL")
    acknowledged = {s.order_id for s in read_samples(ended.directory) if s.outcome == "acknowledged"}
    stored = stored_ids(service.dsn)
    wrong = acknowledged - stored if check == "acknowledged_stored" else stored - acknowledged
    assert wrong
    named = set(ended.ids_of(check))
    assert named <= wrong
    assert len(wrong - named) <= REPEATED
    assert any(order_id in reason for order_id in named for reason in ended.record.reasons)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stores_nothing", "stores_twice", "drops"])
def test_a_lying_service_without_its_database(patient: Path, serve: Serve, fault: str) -> None:
    """What is stored is asked through the API; the verdict is the same."""
    ended = drive(patient, serve(fault).url, *SHORT)
    assert ended.record.verdict == "FAIL"
    assert ended.record.ledger.source == "api"
    assert ended.breached & {"acknowledged_stored", "stored_explained"}


def test_ctrl_c(patient: Path, serve: Serve) -> None:
    """It ends with the report of what ran, marked incomplete, with 130, and leaves no generator behind."""
    results = patient.parent / "results"
    call = [
        sys.executable,
        "-u",
        "-m",
        "loadtests",
        "normal",
        "--host",
        serve().url,
        "--results",
        str(results),
    ]
    call += ["--users", "10", "--spawn-rate", "10", "--warm-up", "0.5", "--duration", "10m"]
    with subprocess.Popen(
        call, cwd=processes.ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("measured"):
                os.kill(process.pid, signal.SIGINT)
                break
        said = process.stdout.read()
    assert process.returncode == 130
    assert "(INCOMPLETE)" in said
    [directory] = results.iterdir()
    record = RunRecord.from_json((directory / "report.json").read_bytes())
    assert not record.complete
    assert record.ledger.counts.sent > 0  # users order as soon as they are there
    assert record.duration_seconds < record.planned_seconds
    assert not record.ledger.lost
    assert not _commands_with(record.run_id)


def _commands_with(text: str) -> list[bytes]:
    """The command lines of all processes that contain *text*."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes())
    return [line for line in found if text.encode() in line]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param((), "does not answer", id="nothing-there"),
        pytest.param(("--prometheus-url", "http://127.0.0.1:9"), "PROMETHEUS_URL", id="no-prometheus"),
        pytest.param(("--acceptance", "/nowhere"), "No such file", id="no-criteria"),
    ],
)
def test_what_cannot_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], said: str
) -> None:
    """Exit code 2 and a line that says why."""
    host = f"http://127.0.0.1:{processes.free_port()}"
    assert command.main(["normal", "--host", host, "--results", str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err


# What such a fault does beside the criterion that it is for: an order that fails is late for ever, a run shorter than a
# minute is its own worst minute, and whoever burns the cores of this machine slows down everything on it.
ALSO = {
    "slow_fortieth": {"worst_window_p99"},
    "failing": {"latency_p95", "latency_p99", "worst_window_p99", "worst_window_errors"},
    "burns_cpu": {"latency_p95", "latency_p99", "latency_mean", "worst_window_p99"},
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("fault", "arguments", "failed"),
    [
        ("none", ("--users", "4", "--duration", "10"), "throughput"),
        ("slow_twelfth", (), "latency_p95"),
        ("slow_fortieth", (), "latency_p99"),
        ("slow", (), "latency_mean"),
        ("failing", (), "error_rate"),
        ("crashing", (), "critical_errors"),
        ("burns_cpu", (), "cpu"),
        ("bloated", (), "memory"),
        ("holds_the_pool", (), "pool"),
    ],
)
def test_each_criterion_over_its_limit(
    patient: Path, serve: Serve, fault: str, arguments: Sequence[str], failed: str
) -> None:
    """The verdict is FAIL, by that criterion, and by none that has nothing to do with it."""
    service = serve(fault)
    ended = drive(patient, service.url, "--dsn", service.dsn, *LONG, *arguments)
    assert ended.breached == ({"answers"} if fault == "crashing" else set()), ended.record.reasons
    assert ended.failed - ALSO.get(fault, set()) == {failed}, ended.record.reasons
    assert (ended.exit_code, ended.record.verdict) == (1, "FAIL")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alerts", "failed"),
    [
        pytest.param([("Down", "critical", {"job": "orders"})], {"critical_alerts"}, id="critical"),
        pytest.param(
            [(f"Near{n}", "warning", {"job": "orders"}) for n in range(6)],
            {"warning_alerts"},
            id="six-warnings",
        ),
        pytest.param(
            [(f"Near{n}", "warning", {"job": "orders"}) for n in range(5)], set(), id="five-warnings"
        ),
        pytest.param(
            [("Near", "warning", {"job": "orders", "pod": f"{n}"}) for n in range(6)],
            set(),
            id="one-of-six-pods",
        ),
        pytest.param([("Near", "critical", {"job": "another"})], set(), id="of-another-job"),
        pytest.param([("Near", "critical", {"job": "orders"}, 60.0)], set(), id="of-before-the-run"),
    ],
)
def test_alerts(patient: Path, serve: Serve, alerts: Sequence[tuple[Any, ...]], failed: set[str]) -> None:
    """Alerts that fire in the run are criteria; the plan's own queries read the server's side."""
    service = serve()
    with fake_prometheus([f"{service.url}/metrics"], alerts) as prometheus:
        ended = drive(patient, service.url, *SHORT, "--dsn", service.dsn, "--prometheus-url", prometheus.url)
    assert ended.failed & {"critical_alerts", "warning_alerts"} == failed, ended.record.reasons
    assert ended.verdict_of("orders_total") == "OK"
    assert ended.record.server.source == "prometheus"
    assert prometheus.requests[0] == "/-/reload"
    plans = {
        query.replace("[1m]", "[4s]") for query in performance_test_plan.QUERIES
    }  # all that was measured
    assert plans <= set(prometheus.requests)


@pytest.mark.slow
def test_refusals_that_are_called_the_clients_fault(patient: Path, serve: Serve) -> None:
    """They are failures like any other: what the generator sends is right."""
    service = serve("picky")
    ended = drive(patient, service.url, *LONG, "--dsn", service.dsn)
    assert ended.exit_code == 1
    assert ended.breached <= {"replays"}  # a key that is sent again is one order in twenty, too
    assert "error_rate" in ended.failed
    assert "unknown_product" in str(ended.record.reasons)


@pytest.mark.slow
def test_strict(patient: Path, serve: Serve) -> None:
    """What could not be measured fails, and says so."""
    service = serve()
    ended = drive(patient, service.url, *SHORT, "--dsn", service.dsn, "--strict")
    assert ended.record.verdict == "FAIL"
    assert any("Critical alerts: NOT MEASURED" in reason for reason in ended.record.reasons)


@pytest.mark.slow
def test_a_run_without_requests(patient: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not a PASS: users that wait for longer than the run send nothing."""
    folder = _locustfile(patient.parent, "NormalLoadTest.wait_time = lambda self: 60")
    monkeypatch.setattr(locust_process, "FOLDER", folder)
    ended = drive(patient, serve().url, "--users", "5", "--warm-up", "2", "--duration", "2")
    assert (ended.exit_code, ended.record.verdict) == (3, "INVALID")
    assert "requests" in ended.breached


@pytest.mark.slow
def test_a_saturated_generator(patient: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator that is busy with itself makes the run INVALID: it may be what was measured."""
    spin = "def spin():\n while True:\n  end = time.monotonic() + 0.3\n  while time.monotonic() < end: pass\n"
    spin += "  gevent.sleep(0.001)\nevents.init.add_listener(lambda **_: gevent.spawn(spin))"
    monkeypatch.setattr(locust_process, "FOLDER", _locustfile(patient.parent, f"import time, gevent\n{spin}"))
    ended = drive(patient, serve().url, *SHORT, "--acceptance", str(acceptance.PATH))
    assert (ended.exit_code, ended.record.verdict) == (3, "INVALID")
    assert ended.breached & {"generator_cpu", "generator_lag"}


@pytest.mark.slow
def test_an_open_model_that_falls_behind(patient: Path, serve: Serve) -> None:
    """Fewer orders sent than were due, and the service was quick: INVALID."""
    ended = drive(patient, serve().url, "--rate", "2000", "--users", "2", "--warm-up", "1", "--duration", "4")
    assert ended.exit_code == 3
    assert "offered" in ended.breached


@pytest.mark.slow
def test_an_open_model_that_keeps_up(patient: Path, serve: Serve) -> None:
    """What was due was sent, and the ledger is clean."""
    service = serve()
    ended = drive(
        patient, service.url, "--rate", "20", "--warm-up", "1", "--duration", "5", "--dsn", service.dsn
    )
    assert ended.record.model == "open"
    assert ended.breached == set(), ended.record.reasons
    assert ended.verdict_of("offered") == "OK"


@pytest.mark.slow
def test_worker_processes(patient: Path, serve: Serve) -> None:
    """Several generator processes give the same report: one ledger, one histogram."""
    service = serve()
    ended = drive(patient, service.url, *SHORT, "--processes", "2", "--dsn", service.dsn)
    assert ended.breached == set(), ended.record.reasons
    assert ended.record.generator.processes == 2
    samples = list(read_samples(ended.directory))
    assert ended.record.ledger.counts.sent == len(samples)
    assert {s.order_id for s in samples if s.outcome == "acknowledged"} == stored_ids(service.dsn)


@pytest.mark.slow
def test_workers_elsewhere(patient: Path, serve: Serve) -> None:
    """Workers that somebody else starts, and that know no run by its name, give the same report, too."""
    service = serve()
    results = patient.parent / "results"
    folder = Path(locust_process.__file__).parents[1]
    worker = [sys.executable, "-m", "locust", "-f", f"{folder}/locustfile.py,{folder}/users/recording.py"]
    worker += ["--worker", "--master-host", "127.0.0.1", "--exit-code-on-error", "0"]
    surroundings = {**processes.plain_environment(), "LOADTEST_RECORD_DIR": str(results / "current")}
    workers = [subprocess.Popen(worker, env=surroundings, stderr=subprocess.DEVNULL) for _ in range(2)]
    try:
        common = ("--results", str(results), "--acceptance", str(patient), "--host", service.url)
        exit_code = command.main(["normal", *common, *SHORT, "--workers", "2", "--dsn", service.dsn])
        ended_with = [process.wait(30) for process in workers]
    finally:
        for process in workers:
            process.kill()
            process.wait()
    record = RunRecord.from_json((results / "current" / "report.json").read_bytes())
    assert ended_with == [0, 0]
    assert exit_code == record.exit_code
    assert {check.name for check in record.checks if check.verdict == "BREACH"} == set(), record.reasons
    assert record.generator.processes == 2
    samples = list(read_samples(results / "current"))
    assert record.ledger.counts.sent == len(samples)
    assert {s.order_id for s in samples if s.outcome == "acknowledged"} == stored_ids(service.dsn)


@pytest.mark.slow
def test_two_replicas_behind_a_balancer(patient: Path, serve: Serve) -> None:
    """Both take orders, their counters are added up, and the ledger is clean."""
    replicas = [serve(name="one"), serve(name="two")]
    pages = ",".join(replica.url for replica in replicas)
    with balancer([replica.url for replica in replicas]) as url:
        ended = drive(patient, url, *SHORT, "--metrics-urls", pages, "--dsn", replicas[0].dsn)
    assert ended.breached == set(), ended.record.reasons
    assert len(ended.record.server.replicas) == 2
    assert ended.record.ledger.success_rise == ended.record.ledger.counts.acknowledged
    assert all((replica.cpu_percent or 0) > 0 for replica in ended.record.server.replicas)


@pytest.mark.slow
def test_a_replica_that_is_not_listed(patient: Path, serve: Serve) -> None:
    """Its orders are acknowledged and not counted: INVALID, and the reason says where to look."""
    replicas = [serve(name="one"), serve(name="two")]
    with balancer([replica.url for replica in replicas]) as url:
        ended = drive(patient, url, *SHORT, "--metrics-urls", replicas[0].url, "--dsn", replicas[0].dsn)
    assert ended.breached == {"orders_total"}
    assert "METRICS_URLS" in ended.record.reasons[0]


@pytest.mark.slow
def test_a_service_of_its_own(patient: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without HOST a service on a fresh Postgres is started, tested against its database, and stopped.

    Its replicas are all read, the busiest is judged, and every form of the report names each.
    """
    results = patient.parent / "results"
    arguments = ["normal", "--results", str(results), "--acceptance", str(patient), *SHORT, "--replicas", "2"]
    exit_code = command.main(arguments)
    [directory] = results.iterdir()
    record = RunRecord.from_json((directory / "report.json").read_bytes())
    assert exit_code == record.exit_code
    assert record.ledger.source == "database"
    assert record.ledger.stock_not_conserved == ()
    assert record.environment.database["fsync"] == "on"
    assert record.environment.dataset["orders_before"] == 0
    assert record.ledger.success_rise == record.ledger.counts.acknowledged
    shares = [replica.cpu_percent or 0.0 for replica in record.server.replicas]
    assert len(shares) == 2
    assert min(shares) > 0
    [cpu] = [criterion.value for criterion in record.criteria if criterion.name == "cpu"]
    assert cpu == max(shares)
    assert "METRICS_URLS" not in " ".join(record.reasons)
    said = capsys.readouterr().out
    assert f"{record.target} (2 replicas)" in said
    for replica in record.server.replicas:
        assert not replica.url.startswith(record.target)
        assert replica.url in said
        for form in ("report.md", "report.html", "report.json", "summary.txt"):
            assert replica.url in (directory / form).read_text()
    assert not _commands_with("order-bench-") or record.target not in str(_commands_with("order-bench-"))


def _locustfile(folder: Path, more: str) -> Path:
    """A folder with the locustfile and *more* code at its end, and the recorder."""
    (folder / "locustfile.py").write_text(
        f"from locust import events\nfrom loadtests.locustfile import *\nimport loadtests.locustfile\n{more}\n"
    )
    (folder / "users").mkdir()
    (folder / "users" / "recording.py").write_text("from loadtests.users.recording import *\n")
    return folder
