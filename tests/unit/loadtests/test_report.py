import dataclasses
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from loadtests.reports import report
from loadtests.reports.percentile_chart import percentile_chart
from loadtests.reports.time_charts import TimeAxis, time_charts
from loadtests.run_record import Check, Criterion, RunRecord
from loadtests.samples import Sample
from tests.support.run_records import START, outage, record_of, samples, store

SECONDS = 30


@pytest.fixture(scope="module")
def made() -> list[Sample]:
    return samples(seconds=SECONDS, trouble=outage)


@pytest.fixture(scope="module")
def written(made: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    record = record_of(made, seconds=SECONDS, cpu_percent=98.0)
    directory = store(tmp_path_factory.mktemp("results") / "peak-1", record)
    report.write(record, directory)
    return directory


def field(text: str, name: str) -> str:
    summary = text.partition("## Test Summary")[2].partition("## Acceptance Criteria")[0]
    (value,) = re.findall(rf"^- {name}: (.*)$", summary, re.MULTILINE)
    return str(value)


def test_plans_template_is_filled_from_the_raw_samples(made: list[Sample], written: Path) -> None:
    """Every field of the plan's template stands in report.md, in its order, and equals a count made here by hand."""
    text = (written / "report.md").read_text()
    sent = [s for s in made if START <= s.started_at < START + SECONDS]
    acknowledged = sorted(s.latency_seconds * 1000 for s in sent if s.outcome == "acknowledged")
    failed = [s for s in sent if s.status >= 500 or (s.status == 0 and s.error_type != "cut_off")]

    def nearest_rank(percent: int) -> float:
        return acknowledged[-(-len(acknowledged) * percent // 100) - 1]

    assert field(text, "Duration") == "30 s"
    assert field(text, "Total Requests") == f"{len(sent):,}"
    assert float(field(text, "Error Rate").removesuffix("%")) == pytest.approx(
        len(failed) / len(sent) * 100, rel=0.01
    )
    average = float(field(text, "Avg Response Time").removesuffix("ms"))
    assert average == pytest.approx(sum(acknowledged) / len(acknowledged), rel=0.005)
    assert float(field(text, "Throughput").removesuffix(" orders/s")) == pytest.approx(
        len(acknowledged) / SECONDS, rel=0.005
    )
    for name, percent in (("P50", 50), ("P95", 95), ("P99", 99)):
        shown = float(field(text, name).removesuffix("ms"))
        assert shown == pytest.approx(
            nearest_rank(percent), rel=0.007
        )  # 0.1 % of the histogram, 0.5 % of the digits
    assert field(text, "Max CPU") == "98%"
    assert field(text, "Max Memory") == "4.39%"
    assert field(text, "Peak Connections") == "4 of 50"
    headings = [
        "# Performance Test Results",
        "## Test Summary",
        "## Percentiles",
        "## Resource Usage",
        "## Recommendations",
    ]
    assert [line for line in text.splitlines() if line.startswith("#")][:5] == headings
    assert re.search(r"^3\. ", text, re.MULTILINE)


def test_all_forms_say_the_same(written: Path) -> None:
    """Verdict and reasons are those of the record, in Markdown, in HTML, and in JSON."""
    record = RunRecord.from_json((written / "report.json").read_bytes())
    assert record.verdict == "FAIL"
    for name in ("report.md", "report.html"):
        text = (written / name).read_text()
        assert text.index("FAIL") < text.index("CPU usage")
        assert "98 % is not &lt; 70" in text or "98 % is not < 70" in text
        assert record.environment.command in text
        assert record.environment.commit in text


def test_page_is_one_small_file(written: Path) -> None:
    """The page names no other address to load from, and stays below 2 MB."""
    page = (written / "report.html").read_text()
    assert len(page) < 2_000_000
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|url\(|@import|\bimport\b[^;]*from""", page)


def test_half_an_hour_stays_below_two_megabytes(tmp_path: Path) -> None:
    """Also two hours: there are no more points than a screen has columns, and the worst of each step is kept."""
    record = record_of([], seconds=10)
    seconds = tuple(float(n) for n in range(-10, 7200))
    series = {name: tuple(10_000 + n / 7 for n in range(len(seconds))) for name in record.series}
    series["p99_ms"] = tuple(99_999.0 if n == 4321 else 1.0 for n in range(len(seconds)))
    record = dataclasses.replace(record, seconds=seconds, series=series, errors={})
    directory = store(tmp_path / "peak-1", record)
    report.write(record, directory)
    assert (directory / "report.html").stat().st_size < 2_000_000
    latency = time_charts(record)[0]
    assert max(value or 0 for value in latency.values["p99"]) == pytest.approx(99_999, rel=1e-3)
    assert len(TimeAxis(seconds).seconds) <= 2000


def test_what_was_not_measured_is_not_zero(tmp_path: Path) -> None:
    """Without the server's figures and without orders every field says NOT MEASURED."""
    record = record_of([], seconds=10)
    record = dataclasses.replace(record, server=dataclasses.replace(record.server, replicas=()), criteria=())
    directory = store(tmp_path / "peak-1", record)
    report.write(record, directory)
    text = (directory / "report.md").read_text()
    for name in (
        "Error Rate",
        "Avg Response Time",
        "P50",
        "P95",
        "P99",
        "Max CPU",
        "Max Memory",
        "Peak Connections",
    ):
        assert field(text, name) == "NOT MEASURED"


def test_one_replica_without_figures_leaves_cpu_not_measured(tmp_path: Path) -> None:
    """The one that did not tell could be the busiest."""
    record = record_of(samples(seconds=10), seconds=10)
    silent = dataclasses.replace(record.server.replicas[0], cpu_percent=None)
    server = dataclasses.replace(record.server, replicas=(*record.server.replicas, silent))
    record = dataclasses.replace(record, server=server)
    directory = store(tmp_path / "peak-1", record)
    report.write(record, directory)
    assert field((directory / "report.md").read_text(), "Max CPU") == "NOT MEASURED"


def test_incomplete_run_is_marked(tmp_path: Path) -> None:
    made = samples(seconds=10)
    record = record_of(made, seconds=10, complete=False)
    directory = store(tmp_path / "peak-1", record)
    report.write(record, directory)
    assert "INCOMPLETE" in (directory / "report.md").read_text()
    assert "INCOMPLETE" in (directory / "report.html").read_text()


def test_ids_of_a_breach_are_in_the_report(tmp_path: Path) -> None:
    """Some in Markdown, more in HTML, all in junit.xml and report.json."""
    made = samples(seconds=10)
    ids = tuple(f"order-{n:04d}" for n in range(700))
    breach = Check("acknowledged_stored", "BREACH", "700 acknowledged orders are not stored", ids)
    record = record_of(made, seconds=10, checks=(breach,), verdict="INVALID", reasons=(breach.reason,))
    directory = store(tmp_path / "peak-1", record)
    report.write(record, directory)
    for name, count in (("report.md", 20), ("report.html", 500), ("junit.xml", 700), ("report.json", 700)):
        assert len(set(re.findall(r"order-\d{4}", (directory / name).read_text()))) == count, name


def test_a_percentile_without_end_survives(tmp_path: Path) -> None:
    """Half of the orders failed: report.json holds the infinite percentile, and every form shows it."""
    half = samples(
        seconds=30,
        trouble=lambda _second, chance: ("unknown", 200, "http_200") if chance.random() < 0.5 else None,
    )
    record = record_of(half)
    assert RunRecord.from_json(record.to_json()) == record
    assert record.all_sent.p99_ms == math.inf
    assert record.verdict == "FAIL"
    directory = store(tmp_path / "peak-1", record)
    report.write(record, directory)
    for name in ("report.md", "report.html"):
        assert "infinite" in (directory / name).read_text()


def junit_outcomes(record: RunRecord) -> dict[str, str | None]:
    """Test case -> failure, error, skipped or None; the suites' totals are held against them."""
    outcomes: dict[str, str | None] = {}
    for suite in ET.fromstring(report.junit(record)).iter("testsuite"):  # noqa: S314 - our own
        cases = {
            str(case.get("name")): (case[0].tag if len(case) else None) for case in suite.iter("testcase")
        }
        for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.get(attribute, "-1")) == list(cases.values()).count(tag)
        assert int(suite.get("tests", "-1")) == len(cases)
        outcomes |= cases
    return outcomes


def criterion(name: str, verdict: str) -> Criterion:
    return Criterion(
        name=name, title=name, verdict=verdict, value=None, limit=1.0, comparison="<", unit="", samples=None,  # type: ignore[arg-type]
        definition="", source="", reason="a reason with \x00 and <&>",
    )  # fmt: skip


def test_junit_has_a_case_for_everything_that_was_judged() -> None:
    """PASS passes, FAIL fails, a breach is an error, what was not measured is skipped; any text can be in it."""
    record = record_of(
        [],
        criteria=tuple(criterion(verdict, verdict) for verdict in ("PASS", "FAIL", "NOT MEASURED")),
        checks=(
            Check("good", "OK", ""),
            Check("bad", "BREACH", "", ("id",)),
            Check("lost", "BREACH", "", ("id",), about="service"),
            Check("open", "NOT CHECKED", ""),
        ),
    )
    expected = {
        "PASS": None, "FAIL": "failure", "NOT MEASURED": "skipped", "good": None, "bad": "error", "lost": "failure",
        "open": "skipped",
    }  # fmt: skip
    assert junit_outcomes(record) == expected
    strict = dataclasses.replace(record, strict=True)
    assert junit_outcomes(strict) == expected | {"NOT MEASURED": "failure", "open": "error"}


def test_percentile_curve_ends_where_the_samples_do() -> None:
    """1,000 orders say nothing about the 99.99th percentile, 50 nothing about the 99th; none draw nothing."""
    for orders, last in ((1000, 99.9), (50, 98.0)):
        latency = record_of(samples(seconds=orders // 50, rate=50), seconds=orders // 50).acknowledged
        line = percentile_chart(latency, None, {}).lines[0].path
        drawn = len(re.findall(r"[ML]", line))
        assert drawn == sum(percentile <= last for percentile, _ in latency.curve)
    assert percentile_chart(record_of([]).acknowledged, None, {}).lines == []


def test_comparison_stands_in_the_report(tmp_path: Path) -> None:
    """With one run a side and no noise floor the report says that it cannot tell, and shows both sides."""
    for number, mean_ms in ((1, 10.0), (2, 30.0)):
        made = samples(seconds=10, mean_ms=mean_ms)
        record = record_of(made, seconds=10, started_at=START + number)
        directory = store(tmp_path / f"peak-{number}", record)
        report.write(record, directory)
    for name in ("report.md", "report.html"):
        text = (directory / name).read_text()
        assert "Cannot tell: 1 run against 1" in text
        assert "Baseline: peak-1" in text
    assert json.loads((directory / "comparison.json").read_bytes())["baseline"] == ["peak-1"]


def test_report_can_be_written_anew(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m loadtests.reports.report DIRECTORY` makes the same report from report.json alone, and leaves that."""
    forms = ("report.md", "report.html", "junit.xml")
    before = {name: (written / name).read_bytes() for name in forms}
    for name in forms:
        (written / name).unlink()
    stamp = (written / "report.json").stat().st_mtime_ns
    assert report.main([str(written)]) == 0
    assert {name: (written / name).read_bytes() for name in forms} == before
    assert (written / "report.json").stat().st_mtime_ns == stamp
    assert report.main([str(written.parent / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err
