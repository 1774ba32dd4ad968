"""A load test that reads the service's side from a real Prometheus: all that it reads from `/metrics`, and the same."""

import shutil
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import pytest

from loadtests import __main__ as command
from loadtests.machine import processes
from loadtests.run_record import RunRecord
from loadtests.samples import Window
from loadtests.service_side.metrics_pages import MetricsSampler
from loadtests.service_side.plan_queries import PLAN_QUERIES
from loadtests.service_side.readings import Limits
from monitoring.local import Monitor
from tests.support.loadtest_environment import clear_options
from tests.support.patient_acceptance import patient_acceptance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        not (shutil.which("prometheus") and shutil.which("prometheus-alertmanager")),
        reason="not installed here: prometheus and alertmanager (Debian: prometheus prometheus-alertmanager)",
    ),
]

MEASURED_SECONDS = 20
SCRAPE_SECONDS = 2


@pytest.fixture
def service(tmp_path: Path, database_url: str) -> Iterator[processes.Server]:
    with processes.service(database_url, tmp_path) as running:
        yield running


def monitor_of(directory: Path, pages: Sequence[str]) -> Monitor:
    """As `make monitor` starts it, with scrapes less far apart."""
    monitor = Monitor(
        directory / "monitor",
        [page.removeprefix("http://").removesuffix("/metrics") for page in pages],
        prometheus_port=processes.free_port(),
        alertmanager_port=processes.free_port(),
    )
    path = monitor.directory / "prometheus.yml"
    text = path.read_text().replace("scrape_interval: 5s", f"scrape_interval: {SCRAPE_SECONDS}s")
    path.write_text(text.replace("scrape_timeout: 4s", f"scrape_timeout: {SCRAPE_SECONDS}s"))
    return monitor


@pytest.fixture
def monitor(tmp_path: Path, service: processes.Server) -> Iterator[Monitor]:
    with monitor_of(tmp_path, service.metrics_urls) as monitor:
        yield monitor


def test_every_figure(
    tmp_path: Path, service: processes.Server, monitor: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PROMETHEUS_URL alone: what it scrapes is tested, every criterion measured, every figure that of `/metrics`."""
    clear_options(monkeypatch)
    results = tmp_path / "results"
    arguments = ["--users", "30", "--spawn-rate", "30", "--warm-up", "5", "--results", str(results)]
    arguments += ["--duration", str(MEASURED_SECONDS), "--acceptance", str(patient_acceptance(tmp_path))]
    with MetricsSampler([f"{service.url}/metrics"]) as pages:
        exit_code = command.main(["peak", *arguments, "--prometheus-url", monitor.url])
        pages.finish()
    [directory] = results.iterdir()
    record = RunRecord.from_json((directory / "report.json").read_bytes())
    assert exit_code == record.exit_code
    assert record.target == service.url
    assert not [check for check in record.checks if check.verdict == "BREACH"], record.reasons
    assert {c.name: c.verdict for c in record.criteria if c.verdict == "NOT MEASURED"} == {}

    asked = [query.over(MEASURED_SECONDS) for query in PLAN_QUERIES]
    assert [query.promql for query in record.server.queries] == asked
    assert [query for query in record.server.queries if query.highest is None] == []
    [cpu] = [criterion for criterion in record.criteria if criterion.name == "cpu"]
    assert cpu.source == f"Prometheus: rate(process_cpu_seconds_total[{MEASURED_SECONDS}s])"

    server, [replica] = record.server, record.server.replicas
    window = Window(
        *(datetime.fromisoformat(at).timestamp() for at in (record.measured_from, record.measured_until))
    )
    read = pages.server(window, limits=Limits(2.0**31))
    assert replica.cpu_percent == pytest.approx(read.replicas[0].cpu_percent, rel=0.5)
    assert server.cpu_us_per_order == pytest.approx(read.cpu_us_per_order, rel=0.5)
    assert server.batch_size_mean == pytest.approx(read.batch_size_mean, rel=0.5)
    assert (
        server.stage_mean_ms.keys()
        == read.stage_mean_ms.keys()
        == {"parse", "price", "queue", "store", "respond"}
    )
    assert sum(server.stage_mean_ms.values()) == pytest.approx(sum(read.stage_mean_ms.values()), rel=0.5)
    assert server.processing_edges_ms == read.processing_edges_ms
    assert (server.retries, server.shed) == (read.retries, read.shed) == (0, 0)
    assert server.breaker_transitions == read.breaker_transitions
    assert server.connections_opened is not None
    assert (server.critical_alerts, server.warning_alerts) != (None, None)

    assert [gap.percentile for gap in record.quantiles] == [95, 99]
    assert server.processing_source.endswith(f"(order_processing_seconds_bucket[{MEASURED_SECONDS}s])))")
    columns = pages.per_second(window.start, range(2, MEASURED_SECONDS - 2))
    for name, column in columns.items():
        measured = record.series[name][
            record.seconds.index(2.0) : record.seconds.index(MEASURED_SECONDS - 2.0)
        ]
        if name != "batch_size":  # a scrape may find no new batch
            assert None not in measured, name
        assert len(measured) == len(column)
    text = (directory / "report.md").read_text()
    assert "rate(db_connections_total" in text
    assert "## Client and Service" in text
    assert "order was read" in text


def test_several_replicas(
    tmp_path: Path,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """HOST says where to order, since metrics are elsewhere; each replica is read, and the busiest judged."""
    clear_options(monkeypatch)
    results = tmp_path / "results"
    arguments = ["--users", "30", "--spawn-rate", "30", "--warm-up", "5", "--results", str(results)]
    arguments += ["--duration", "10", "--acceptance", str(patient_acceptance(tmp_path))]
    with (
        processes.service(database_url, tmp_path, replicas=2) as service,
        monitor_of(tmp_path, service.metrics_urls) as monitor,
    ):
        arguments += ["--prometheus-url", monitor.url]
        assert command.main(["peak", *arguments]) == 2
        assert "HOST must say" in capsys.readouterr().err
        exit_code = command.main(["peak", *arguments, "--host", service.url, "--dsn", database_url])
        pages = {url.removeprefix("http://").removesuffix("/metrics") for url in service.metrics_urls}
    [directory] = results.glob("*/report.json")
    record = RunRecord.from_json(directory.read_bytes())
    assert exit_code == record.exit_code
    assert not [check for check in record.checks if check.verdict == "BREACH"], record.reasons
    assert {replica.url for replica in record.server.replicas} == pages
    assert record.ledger.success_rise == record.ledger.counts.acknowledged
    [cpu] = [criterion.value for criterion in record.criteria if criterion.name == "cpu"]
    assert cpu == max(replica.cpu_percent or 0.0 for replica in record.server.replicas) > 0
