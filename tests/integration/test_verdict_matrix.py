"""The verdicts of planted defects and of healthy services: each is the right one, and a sentence says why.

`make verdict-matrix` runs all of it and writes what it found into loadtests/README.md.
"""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from loadtests import __main__ as command
from loadtests import marked_block
from loadtests.judging import acceptance
from loadtests.machine import processes
from loadtests.run_record import RunRecord
from loadtests.running import locust_process
from tests.support.balancer import balancer
from tests.support.fake_prometheus import fake_prometheus
from tests.support.loadtest_environment import clear_options

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(120)]

MEASURED_SECONDS = 5
PEAK = ("--users", "110", "--spawn-rate", "110", "--warm-up", "0.5", "--duration", str(MEASURED_SECONDS))
OPEN = ("--warm-up", "0.5", "--duration", str(MEASURED_SECONDS))
TOO_FEW = ("--rate", "100", "--users", "10", *OPEN)  # for answers that take 0.25 s
RATE = ("--rate", "200", "--users", "200", "--spawn-rate", "200", *OPEN)
MIXED = ("--users", "220", "--spawn-rate", "220", "--warm-up", "0.5", "--duration", "5")
# The shipped criteria; windows and the gap are of a run of seconds, and what is beside us on the machine may be busy.
SCALED = {
    "window_seconds = 60": "window_seconds = 3",
    'limit = 10\nunit = "s"': 'limit = 3\nunit = "s"',
    "generator_lag_p95_ms = 50.0": "generator_lag_p95_ms = 500.0",
    "little_tolerance = 0.05": "little_tolerance = 0.2",
}


@dataclass
class Stage:
    """The services, the database and the way to a run of one case."""

    folder: Path
    dsn: str
    stack: contextlib.ExitStack
    monkeypatch: pytest.MonkeyPatch
    services: list[processes.Server] = field(default_factory=list)

    def serve(self, fault: str = "none", **settings: str) -> str:
        """Start a service; its URL."""
        call = (sys.executable, "-m", "tests.support.faulty_services", fault)
        name = f"service-{len(self.services)}"
        self.services.append(
            self.stack.enter_context(
                processes.service(self.dsn, self.folder, name=name, command=call, settings=settings)
            )
        )
        return self.services[-1].url

    def later(self, seconds: float, action: Callable[[], object]) -> None:
        """Do something while the load is on: Locust needs a while until it is."""
        timer = threading.Timer(seconds, action)
        timer.start()
        self.stack.callback(timer.join)

    def drive(self, profile: str, url: str, *arguments: str, dsn: bool = True) -> RunRecord:
        """Run the command in this process."""
        path = self.folder / "acceptance.toml"
        text = acceptance.PATH.read_text()
        for shipped, scaled in SCALED.items():
            assert shipped in text
            text = text.replace(shipped, scaled)
        path.write_text(text)
        results = self.folder / "results"
        common = ["--results", str(results), "--acceptance", str(path), "--host", url]
        common += ["--dsn", self.dsn] if dsn else []
        exit_code = command.main([profile, *common, *arguments])
        [directory] = results.iterdir()
        record = RunRecord.from_json((directory / "report.json").read_bytes())
        assert exit_code == record.exit_code
        return record


@dataclass(frozen=True)
class Case:
    """What is planted, the verdict that it deserves, and what the sentence must say."""

    name: str
    run: Callable[[Stage], RunRecord]
    verdict: str
    said: str = ""  # in one of the reasons; of a PASS: nothing
    busy: bool = False  # other work on every core

    def __str__(self) -> str:
        return self.name


def faulty(
    fault: str, *arguments: str, profile: str = "peak", load: Sequence[str] = PEAK
) -> Callable[[Stage], RunRecord]:
    return lambda stage: stage.drive(profile, stage.serve(fault), *load, *arguments)


def mixed(fault: str) -> Callable[[Stage], RunRecord]:
    return faulty(fault, profile="mixed", load=MIXED)


def through_the_api(fault: str) -> Callable[[Stage], RunRecord]:
    return lambda stage: stage.drive("peak", stage.serve(fault), *PEAK, dsn=False)


def warnings_of_six_pods() -> Callable[[Stage], RunRecord]:
    return with_alerts(*(("Near", "warning", {"job": "orders", "pod": f"p{n}"}) for n in range(6)))


def a_restart(stage: Stage) -> RunRecord:
    url = stage.serve()
    first = stage.services[0]
    port = url.rpartition(":")[2]

    def restart() -> None:
        first.process.kill()
        first.process.wait()
        _serve_on(stage, port)

    stage.later(6, restart)
    return stage.drive("peak", url, *PEAK)


def _serve_on(stage: Stage, port: str) -> None:
    environment = {**processes.plain_environment(), "PORT": port, "DATABASE_URL": stage.dsn}
    log = stage.stack.enter_context((stage.folder / "restarted.log").open("wb"))
    stage.stack.enter_context(processes.child(processes.SERVICE, env=environment, stdout=log, stderr=log))


def a_lost_replica(stage: Stage) -> RunRecord:
    urls = [stage.serve(), stage.serve()]
    address = stage.stack.enter_context(balancer(urls))
    stage.later(6, stage.services[1].process.kill)
    return stage.drive("peak", address, *PEAK, "--metrics-urls", ",".join(urls))


def a_death(stage: Stage) -> RunRecord:
    url = stage.serve()
    stage.later(6, stage.services[0].process.kill)
    return stage.drive("peak", url, *PEAK)


def with_alerts(
    *alerts: tuple[object, ...], dies: bool = False, loaded: bool = True
) -> Callable[[Stage], RunRecord]:
    def run(stage: Stage) -> RunRecord:
        url = stage.serve()
        prometheus = stage.stack.enter_context(fake_prometheus([f"{url}/metrics"], alerts))
        prometheus.rules_loaded = loaded
        prometheus.ahead_seconds = 90.0  # its clock is not ours
        if dies:
            stage.later(5, lambda: setattr(prometheus, "died", True))
        return stage.drive("peak", url, *PEAK, "--prometheus-url", prometheus.url)

    return run


def an_earlier_alert(stage: Stage) -> RunRecord:
    return with_alerts(
        ("Near", "critical", {"job": "orders"}, 60.0), ("Down", "critical", {"job": "billing"})
    )(stage)


def sold_out(stage: Stage) -> RunRecord:
    return stage.drive("peak", stage.serve(CATALOG_STOCK="8"), *PEAK)


def two_replicas(stage: Stage) -> RunRecord:
    urls = [stage.serve(), stage.serve()]
    address = stage.stack.enter_context(balancer(urls))
    return stage.drive("peak", address, *PEAK, "--metrics-urls", ",".join(urls))


def behind_a_proxy(stage: Stage) -> RunRecord:
    stage.monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    return stage.drive("peak", stage.serve(), *PEAK)


def a_busy_generator(stage: Stage) -> RunRecord:
    spin = "import time, gevent\nfrom locust import events\n"
    spin += (
        "def spin():\n while True:\n  end = time.monotonic() + 0.9\n  while time.monotonic() < end: pass\n"
    )
    spin += "  gevent.sleep(0.001)\nevents.init.add_listener(lambda **_: gevent.spawn(spin))\n"
    folder = stage.folder / "generator"
    (folder / "users").mkdir(parents=True)
    (folder / "locustfile.py").write_text(
        f"from loadtests.locustfile import *\nimport loadtests.locustfile\n{spin}"
    )
    (folder / "users" / "recording.py").write_text("from loadtests.users.recording import *\n")
    stage.monkeypatch.setattr(locust_process, "FOLDER", folder)
    return stage.drive("peak", stage.serve(), *PEAK)


DEFECTS = (
    Case("a page (200) instead of every second answer", faulty("maintained"), "FAIL", "Error rate: 50 %"),
    Case("a redirect (302) instead of every second answer", faulty("redirects"), "FAIL", "Error rate: 50 %"),
    Case("one order in twenty called the client's fault (422)", faulty("picky"), "FAIL", "unknown_product"),
    Case("one order in ten falsely called sold out", faulty("falsely_sold_out"), "FAIL", "out_of_stock"),
    Case("one order in two hundred an internal error", faulty("crashing"), "FAIL", "500, or another 5xx"),
    Case(
        "one order in three hundred a gateway's page (502)",
        faulty("bad_gateway"),
        "FAIL",
        "5xx without an error_type",
    ),
    Case("ids given to other clients", faulty("swaps"), "FAIL", "given to another client"),
    Case("ids given to other clients, asked through the API", through_the_api("swaps"), "FAIL", "orders"),
    Case("one id for two orders", faulty("tells_twice"), "FAIL", "stand for two requests"),
    Case("answers with another total", faulty("overcharges"), "FAIL", "not what was asked for"),
    Case("orders stored with another quantity", faulty("alters"), "FAIL", "stored with other lines"),
    Case(
        "acknowledged orders not stored",
        faulty("stores_nothing"),
        "FAIL",
        "acknowledged orders are not stored",
    ),
    Case(
        "the same, asked through the API",
        through_the_api("stores_nothing"),
        "FAIL",
        "acknowledged orders are not stored",
    ),
    Case("orders stored twice", faulty("stores_twice"), "FAIL", "neither acknowledged nor left unknown"),
    Case(
        "keys forgotten: a repeat orders again", faulty("forgets_keys"), "FAIL", "keys that were sent again"
    ),
    Case("a service that stands still for 3.6 s", faulty("stands_still"), "FAIL", "Longest time without"),
    Case(
        "15 failures within a moment, fewer than 1 % of all",
        faulty("fails_for_a_moment"),
        "FAIL",
        "worst minute",
    ),
    Case("0.7 % late and 0.7 % failed", faulty("late_and_failing"), "FAIL", "99th percentile"),
    Case("each order 250 ms late", faulty("slow"), "FAIL", "Average response time"),
    Case("an open model kept waiting by the service", faulty("slow", load=TOO_FEW), "FAIL", "Throughput"),
    Case("lookups of orders fail (mixed)", mixed("failing_reads"), "FAIL", "/orders/{id}"),
    Case(
        "reads of products 1.2 s late (mixed)",
        mixed("slow_reads"),
        "FAIL",
        "percentile of the other requests",
    ),
    Case(
        "every product's page is one product's (mixed)",
        mixed("mixes_up_reads"),
        "FAIL",
        "/products/{id} that were not",
    ),
    Case(
        "cancellations acknowledged and not done (mixed)",
        mixed("forgets_cancellations"),
        "FAIL",
        "acknowledged",
    ),
    Case(
        "cancellations refused without reason (mixed)",
        mixed("refuses_cancellations"),
        "FAIL",
        "cancellations were refused",
    ),
    Case("the service restarted during the load", a_restart, "FAIL", "restarted: "),
    Case("one of two replicas gone", a_lost_replica, "FAIL", "gone: "),
    Case(
        "more memory than its limit leaves", faulty("none", "--memory-limit", "80Mi"), "FAIL", "Memory usage"
    ),
    Case(
        "a critical alert between two looks",
        with_alerts(("Down", "critical", {"job": "orders"})),
        "FAIL",
        "Critical alerts: 1",
    ),
    Case("a generator that is busy with itself", a_busy_generator, "INVALID", "generator"),
)
HEALTHY = (
    Case("closed model", faulty("none"), "PASS"),
    Case("closed model, asked through the API", through_the_api("none"), "PASS"),
    Case("mixed: reads, orders, cancellations", mixed("none"), "PASS"),
    Case(
        "open model at the limit, RATE=10",
        faulty("none", "--rate", "10", profile="normal", load=OPEN),
        "PASS",
    ),
    Case("two replicas behind a balancer", two_replicas, "PASS"),
    Case("a shop that sells out", sold_out, "PASS"),
    Case("HTTP_PROXY set", behind_a_proxy, "PASS"),
    Case("six replicas with one warning each", warnings_of_six_pods(), "PASS"),
    Case("alerts of before the run, and of another job", an_earlier_alert, "PASS"),
    Case("a Prometheus without our rules", with_alerts(loaded=False), "PASS"),
    Case("a Prometheus that died", with_alerts(dies=True), "PASS"),
    Case("closed model on a busy machine", faulty("none"), "PASS", busy=True),
    Case("open model on a busy machine", faulty("none", load=RATE), "PASS", busy=True),
    Case("mixed on a busy machine", mixed("none"), "PASS", busy=True),
)
NOT_MEASURED = {"a Prometheus without our rules", "a Prometheus that died"}
FOUND: dict[str, tuple[str, str, str]] = {}


@pytest.fixture(scope="module", autouse=True)
def published() -> Iterator[None]:
    """The block of the README, where all of it ran, was right and is wanted (PUBLISH=1)."""
    yield
    if os.environ.get("PUBLISH") != "1" or FOUND.keys() != {case.name for case in (*DEFECTS, *HEALTHY)}:
        return
    lines = ["| planted | verdict | why |", "| --- | --- | --- |"]
    lines += ["| " + " | ".join(FOUND[case.name]) + " |" for case in (*DEFECTS, *HEALTHY)]
    planted, well = len(DEFECTS), len(HEALTHY)
    total = f"{planted} planted defects: 0 passed. {well} healthy runs: 0 failed, 0 INVALID."
    marked_block.write("verdict-matrix", "\n".join(lines) + f"\n\n{total}")


@pytest.fixture
def stage(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    clear_options(monkeypatch)
    with contextlib.ExitStack() as stack:
        yield Stage(tmp_path, database_url, stack, monkeypatch)


@pytest.mark.parametrize("case", [*DEFECTS, *HEALTHY], ids=str)
def test_verdict(case: Case, stage: Stage) -> None:
    """The verdict is the right one, and a sentence says why."""
    with _busy_machine() if case.busy else contextlib.nullcontext():
        record = case.run(stage)
    assert record.verdict == case.verdict, record.reasons
    why = (
        [record.headline] if record.verdict == "PASS" else [one for one in record.reasons if case.said in one]
    )
    assert why, record.reasons
    first = why[0]
    alerts = [c for c in record.criteria if c.name.endswith("_alerts")]
    if case.name in NOT_MEASURED:
        assert {criterion.verdict for criterion in alerts} == {"NOT MEASURED"}
        first += f": {alerts[0].title} NOT MEASURED, {alerts[0].reason.partition(': ')[0]}"
    FOUND[case.name] = (case.name, record.verdict, first.replace("|", "\\|")[:160])


@contextlib.contextmanager
def _busy_machine() -> Iterator[None]:
    """Work beside us on every core."""
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for each in others:
            each.kill()
            each.wait()
