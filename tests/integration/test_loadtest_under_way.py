"""A run under way: its page and figures on loopback, and an early end where all is lost."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadtests import __main__ as command
from loadtests.machine import processes
from loadtests.run_record import RunRecord
from tests.support.loadtest_environment import clear_options
from tests.support.patient_acceptance import patient_acceptance

pytestmark = [pytest.mark.slow]

OWN = """
[[own]]
name = "slowest"
title = "Slowest order"
measure = "max"
comparison = "<"
limit = 0.001
unit = "ms"
definition = "no order is as fast as this"
source = "this test"

[[own]]
name = "orders_p999"
title = "99.9th percentile"
measure = "p99.9"
route = "/orders"
comparison = "<"
limit = 60000
unit = "ms"
samples = 30
definition = "every order is faster than this"
source = "this test"
"""


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_options(monkeypatch)


@contextlib.contextmanager
def serving(fault: str, dsn: str, folder: Path) -> Iterator[str]:
    call = (sys.executable, "-m", "tests.support.faulty_services", fault)
    with processes.service(dsn, folder, command=call) as service:
        yield service.url


def drive(folder: Path, url: str, *arguments: str, acceptance: Path) -> tuple[int, RunRecord, Path]:
    results = folder / "results"
    common = ("--host", url, "--results", str(results), "--acceptance", str(acceptance))
    load = ("--users", "60", "--spawn-rate", "60", "--warm-up", "1")
    exit_code = command.main(["peak", *common, *load, *arguments])
    [directory] = results.iterdir()
    return exit_code, RunRecord.from_json((directory / "report.json").read_bytes()), directory


def test_an_early_end(tmp_path: Path, database_url: str) -> None:
    """A service that fails one order in twenty is not driven for ten minutes: FAIL, after the grace, and why."""
    began = time.monotonic()
    with serving("failing", database_url, tmp_path) as url:
        code, record, _ = drive(
            tmp_path,
            url,
            "--duration",
            "10m",
            "--abort-on-fail",
            "4s",
            acceptance=patient_acceptance(tmp_path),
        )
    assert time.monotonic() - began < 60
    assert (code, record.verdict, record.complete) == (1, "FAIL", False)
    assert 4 <= record.duration_seconds < 20
    assert record.reasons[0].startswith("ended early: ")
    assert record.aborted
    assert "error_rate" in {criterion.name for criterion in record.criteria if criterion.verdict == "FAIL"}


def test_the_live_page(tmp_path: Path, database_url: str) -> None:
    """The report's charts grow while it runs, and the client's own figures are there to be scraped."""
    port = processes.free_port()
    seen: list[tuple[int, float]] = []

    def look() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            give_up_at = time.monotonic() + 30
            while len(seen) < 2 and time.monotonic() < give_up_at:
                time.sleep(2)
                with contextlib.suppress(httpx.TransportError):
                    page, figures = client.get("/").raise_for_status().text, client.get("/metrics").text
                    orders = sum(
                        sample.value
                        for family in text_string_to_metric_families(figures)
                        for sample in family.samples
                        if sample.name == "loadtest_requests_total"
                        and sample.labels["outcome"] == "acknowledged"
                    )
                    if orders:
                        seen.append((page.count('<path class="curve'), orders))

    looking = threading.Thread(target=look)
    looking.start()
    path = patient_acceptance(tmp_path)
    path.write_text(path.read_text() + OWN)
    with serving("none", database_url, tmp_path) as url:
        code, record, directory = drive(
            tmp_path, url, "--duration", "9", "--live", str(port), acceptance=path
        )
    looking.join()
    (first_lines, first_orders), (lines, orders) = seen
    assert lines >= first_lines > 5
    assert orders > first_orders
    assert (directory / "locust.html").read_text().startswith("<!")
    own = {
        criterion.name: criterion
        for criterion in record.criteria
        if criterion.name in ("slowest", "orders_p999")
    }
    assert own["slowest"].verdict == "FAIL"
    assert own["slowest"].value == pytest.approx(record.acknowledged.max_ms, rel=0.01)
    assert own["orders_p999"].verdict == "PASS"
    assert (code, record.verdict) == (1, "FAIL")


def test_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str], database_url: str) -> None:
    with serving("none", database_url, tmp_path) as url:
        port = url.rpartition(":")[2]
        arguments = ["peak", "--host", url, "--results", str(tmp_path / "results"), "--live", port]
        assert command.main(arguments) == 2
    assert f"port {port} (LIVE)" in capsys.readouterr().err
