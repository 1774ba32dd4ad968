import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loadtests import marked_block
from loadtests.__main__ import is_the_plans
from loadtests.bench import growth, measurement, order_cost, scrape_cost
from loadtests.bench.scraper import Scrape
from loadtests.comparing import sensitivity
from loadtests.comparing.comparison import compare
from loadtests.comparing.stored_runs import Run
from loadtests.machine import processes
from loadtests.reports.summary import HEADINGS, row
from loadtests.run_record import RunRecord
from loadtests.running.plan import Plan
from loadtests.users.profiles import MIXED, NORMAL, STRESS
from tests.support.run_records import START, record_of, samples

BEFORE = "\n# Head\r\n\r\n\u00b5 <!-- bench: begin --> in a line\n\n<!-- bench: begin (written by `make bench`) -->\n"
AFTER = "<!-- bench: end -->\n\n  tail without an end of line "
TEXT = f"{BEFORE}\nold\n\n{AFTER}"


@pytest.fixture
def readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README with the block `bench` alone."""
    path = tmp_path / "README.md"
    path.write_bytes(TEXT.encode())
    monkeypatch.setattr(marked_block, "README", path)
    return path


def test_only_the_block_changes(readme: Path) -> None:
    """What stands outside of the markers, and the markers, stay byte for byte; writing twice is writing once."""
    for _ in range(2):
        assert marked_block.write("bench", "\nnew \\1 text\n\n")
        assert readme.read_bytes() == f"{BEFORE}\nnew \\1 text\n\n{AFTER}".encode()
    assert marked_block.content_of(readme.read_bytes().decode(), "bench") == "new \\1 text"


def test_without_the_block_nothing_is_written(readme: Path) -> None:
    """A README without the block, and a place without a README, are left as they are."""
    assert not marked_block.write("bench-growth", "new")
    assert not marked_block.write_row("loadtests", HEADINGS, ["new"])
    assert readme.read_bytes() == TEXT.encode()
    readme.unlink()
    assert not marked_block.write("bench", "new")
    assert not readme.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("nothing\n", "'bench' needs one begin.*found: none", id="missing"),
        pytest.param(TEXT + "\n" + TEXT, "begin in line 6, end in line 10, begin in line 18", id="twice"),
        pytest.param(BEFORE, "found: begin in line 6", id="not closed"),
        pytest.param(AFTER, "found: end in line 1", id="not opened"),
        pytest.param(AFTER + "\n" + BEFORE, "found: end in line 1, begin in line", id="the wrong way round"),
        pytest.param(
            f"{BEFORE}<!-- other: begin -->\n{AFTER}", "marker of 'other' inside, in line 7", id="nested"
        ),
    ],
)
def test_markers_that_do_not_fit_are_refused(text: str, message: str, readme: Path) -> None:
    """Which block it is, and in which lines its markers stand, is told; the file is not touched."""
    with pytest.raises(marked_block.MarkerError, match=message):
        marked_block.replaced(text, "bench", "new")
    readme.write_bytes(text.encode())
    if "bench" in text:
        with pytest.raises(marked_block.MarkerError, match=message):
            marked_block.write("bench", "new")
    assert readme.read_bytes() == text.encode()


def test_a_row_takes_the_place_of_its_like(readme: Path) -> None:
    """A load test's row replaces the one of the same load, and leaves those of the others."""
    for cells in (["normal", "1"], ["peak", "2"], ["normal", "3"]):
        assert marked_block.write_row("bench", ["", "orders/s"], cells)
    assert marked_block.content_of(readme.read_bytes().decode(), "bench").splitlines() == [
        "|  | orders/s |",
        "| --- | ---: |",
        "| normal | 3 |",
        "| peak | 2 |",
    ]


def cost() -> measurement.Cost:
    names = [field.name for field in dataclasses.fields(measurement.Cost)]
    return measurement.Cost(**dict.fromkeys(names, 1))


def phases() -> list[scrape_cost.Phase]:
    common: dict[str, Any] = {"per_second": 9.0, "p50_ms": 1.0, "p99_ms": 2.0, "refused": 0, "missing": 0}
    return [
        scrape_cost.Phase(
            connections=connections,
            scraped=scraped,
            scrapes_ms=[7.7] if scraped else [],
            p99_at_scrapes_ms=2.0 if scraped else None,
            p99_between_ms=2.0 if scraped else None,
            **common,
        )
        for connections in (64, 500)
        for scraped in (False, True)
    ]


Measured = Callable[..., Any]
BENCHMARKS = [
    pytest.param(
        "bench",
        order_cost,
        lambda *_: [order_cost.Round("service", 64, cost(), 0)],
        "| service | 1 |",
        id="bench",
    ),
    pytest.param(
        "bench-growth",
        growth,
        lambda *_: ([growth.Round("POST", 10, cost())], [growth.Round("POST", 1, cost())], growth.Soak()),
        "| POST | 10 |",
        id="bench-growth",
    ),
    pytest.param(
        "bench-scrape",
        scrape_cost,
        lambda *_: ([Scrape(0.0, 0.004, 9)], phases()),
        "- 64 connections: a scrape took 7.7 ms, at most 7.7",
        id="bench-scrape",
    ),
]


@pytest.mark.parametrize(("name", "benchmark", "measured", "line"), BENCHMARKS)
def test_a_full_run_writes_its_block(
    name: str, benchmark: Any, measured: Measured, line: str, readme: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an option a benchmark writes its figures, the machine and its command; QUICK and all others keep out."""
    monkeypatch.setattr(processes, "ROOT", readme.parent)  # where reports go
    monkeypatch.setattr(benchmark, "_run", measured)
    empty = f"<!-- {name}: begin -->\n\nold\n\n<!-- {name}: end -->\n"
    readme.write_text(empty)
    for arguments in (["--quick"], ["--rounds", "1"], ["--output", str(readme.parent / "elsewhere")]):
        assert benchmark.main(arguments) == 0
        assert readme.read_text() == empty
    assert benchmark.main([]) == 0
    written = marked_block.content_of(readme.read_text(), name)
    assert line in written
    assert written.endswith(f"; `make {name}`.")


def test_sensitivity_as_a_table() -> None:
    """A row a build, with the changes and what is claimed to differ."""
    first, slower = (
        [
            Run(
                f"{mean}-{turn}",
                record_of(samples(mean_ms=mean, seed=turn), started_at=START + 100 * turn + mean),
            )
            for turn in range(5)
        ]
        for mean in (12.0, 24.0)
    )
    text = sensitivity.changes({sensitivity.BUILDS[3]: compare(first, slower)})
    headings, _, cells = (line.split(" | ") for line in text.splitlines()[:3])
    assert headings == ["| against A", *sensitivity.HEADINGS[1:-1], "said to differ |"]
    assert cells[0] == "| 30 % slower"
    assert cells[2].startswith("+")
    assert "mean, p50, p95, p99" in cells[-1]


def planned(**changed: Any) -> Plan:
    given = {
        "profile": NORMAL,
        "users": 100,
        "spawn_rate": 10,
        "duration_seconds": 1800,
        "settle_seconds": 5,
        "command": "",
    }
    return Plan(**{**given, **changed})


@pytest.mark.parametrize(
    ("plan", "changed", "written"),
    [
        pytest.param({}, {}, True, id="as planned"),
        pytest.param({}, {"verdict": "FAIL"}, True, id="failed"),
        pytest.param({}, {"verdict": "INVALID"}, False, id="invalid"),
        pytest.param({}, {"complete": False}, False, id="ended by Ctrl-C"),
        pytest.param({}, {"planned_seconds": 120.0}, False, id="shorter"),
        pytest.param({}, {"users": 10}, False, id="fewer users"),
        pytest.param({}, {"model": "open"}, False, id="open model"),
        pytest.param({"replicas": 1}, {}, False, id="fewer replicas"),
        pytest.param({"host": "http://shop"}, {}, False, id="a deployment"),
        pytest.param({"prometheus_url": "http://p"}, {}, False, id="what Prometheus scrapes"),
        pytest.param({"profile": STRESS}, {}, False, id="another load's length"),
        pytest.param({"profile": MIXED}, {}, False, id="not of the plan"),
    ],
)
def test_which_load_tests_are_written_down(
    plan: dict[str, Any], changed: dict[str, Any], *, written: bool
) -> None:
    """Only the plan's loads, whole, on a service of their own, and only where the figures mean something."""
    record = dataclasses.replace(
        record_of(samples()),
        **{
            "verdict": "PASS",
            "complete": True,
            "planned_seconds": 1800.0,
            "users": 100,
            "model": "closed",
            **changed,
        },
    )
    assert is_the_plans(planned(**plan), record) is written


def test_a_load_test_as_a_row() -> None:
    """A cell for every heading, the figures as in the report."""
    record: RunRecord = record_of(samples())
    cells = row(record)
    assert len(cells) == len(HEADINGS)
    assert cells[0] == f"`make loadtest-{record.profile}`"
    assert cells[HEADINGS.index("verdict")] == record.verdict
    assert cells[HEADINGS.index("p95")].endswith(" ms")
