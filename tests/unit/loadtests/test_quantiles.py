"""The client's percentiles beside the service's: how many buckets lie between them, and what the difference is."""

from pathlib import Path

import pytest

from loadtests.judging import quantiles
from loadtests.reports import report
from loadtests.run_record import Latency, ServiceFigures
from tests.support.run_records import record_of, samples, store

EDGES = (50.0, 100.0, 200.0, 300.0)


def compared(client_ms: float, service_ms: float) -> tuple[int, str]:
    service = ServiceFigures(
        processing_p95_ms=service_ms, processing_p99_ms=service_ms, processing_edges_ms=EDGES
    )
    p95, p99 = quantiles.gaps(Latency(1000, p95_ms=client_ms, p99_ms=client_ms), service)
    assert (p95.percentile, p99.percentile) == (95, 99)
    return p95.buckets_apart, quantiles.conclusion(p95)


@pytest.mark.parametrize(
    ("client_ms", "service_ms", "apart", "said"),
    [
        pytest.param(60, 100, 0, "the same bucket, 50 to 100 ms", id="an edge belongs to its bucket"),
        pytest.param(101, 100, 1, "neighbouring buckets, 50 to 100 ms and 100 to 200 ms", id="neighbours"),
        pytest.param(99, 100.1, 1, "neighbouring buckets, 100 to 200 ms and 50 to 100 ms", id="the other way"),
        pytest.param(
            425, 50, 4, "4 buckets apart, 0 to 50 ms and above 300 ms: 375 ms before the order was read", id="gap"
        ),
        pytest.param(
            40, 250, 3,
            "3 buckets apart, 200 to 300 ms and 0 to 50 ms: refused orders took longer than acknowledged ones",
            id="refusals",
        ),
    ],
)  # fmt: skip
def test_buckets(client_ms: float, service_ms: float, apart: int, said: str) -> None:
    assert compared(client_ms, service_ms) == (apart, said)


def test_nothing_to_compare() -> None:
    """Without the service's figures, or without orders, there is no gap, not one of zero."""
    service = ServiceFigures(processing_p95_ms=1, processing_p99_ms=1, processing_edges_ms=EDGES)
    assert quantiles.gaps(Latency(10, p95_ms=1.0, p99_ms=1.0), ServiceFigures()) == ()
    assert quantiles.gaps(Latency(0), service) == ()


def test_the_report_names_the_gap(tmp_path: Path) -> None:
    """In every form, from /metrics as from Prometheus."""
    made = samples(seconds=10, mean_ms=120)
    record = record_of(made, seconds=10)
    directory = store(tmp_path / "peak-1", record)
    report.write(record, directory)
    gap = next(gap for gap in record.quantiles if gap.percentile == 99)
    assert gap.buckets_apart > 1
    for name in ("report.md", "report.html"):
        text = (directory / name).read_text()
        assert quantiles.conclusion(gap) in text
        assert quantiles.explanation(record.acknowledged, record.server).replace(
            "'", "&#39;"
        ) in text.replace("'", "&#39;")
        assert f"{gap.client_ms - gap.service_ms:.0f} ms" in text
    assert b'"buckets_apart": ' in (directory / "report.json").read_bytes()
