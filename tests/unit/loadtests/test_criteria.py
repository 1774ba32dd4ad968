"""A criterion is PASS, FAIL or NOT MEASURED; a verdict follows from all of them."""

import dataclasses
import math
from typing import Literal

import pytest

from loadtests.judging import acceptance
from loadtests.judging.criteria import Facts, judge, measure
from loadtests.judging.verdict import decide
from loadtests.run_record import (
    AllSent,
    Check,
    Counts,
    Criterion,
    Latency,
    Ledger,
    Replica,
    RouteFigures,
    ServiceFigures,
)

ACCEPTANCE = acceptance.load()

COUNTS = Counts(sent=2000, acknowledged=2000)
LATENCY = Latency(2000, mean_ms=50, p95_ms=100, p99_ms=200)
SENT = AllSent(
    2000,
    p95_ms=100,
    p99_ms=200,
    worst_p99_ms=300,
    worst_p99_count=1500,
    worst_error_percent=0,
    worst_error_count=1500,
    longest_gap_seconds=0.5,
)
LEDGER = Ledger(COUNTS, "database")
REPLICA = Replica(
    "http://a/metrics",
    cpu_percent=30,
    rss_max_bytes=2**28,
    memory_limit_bytes=2**31,
    pool_in_use_max=5,
    pool_max=50,
)
SERVER = ServiceFigures("metrics", (REPLICA,), critical_alerts=(), warning_alerts=())


FACTS = Facts(COUNTS, LATENCY, SENT, LEDGER, SERVER, 100.0)


def judged(profile: str = "normal", **changes: object) -> dict[str, Criterion]:
    facts = dataclasses.replace(FACTS, **changes)  # type: ignore[arg-type]
    return {criterion.name: criterion for criterion in judge(ACCEPTANCE, profile, measure(facts))}


def sent(**changes: float) -> AllSent:
    return dataclasses.replace(SENT, **changes)  # type: ignore[arg-type]


BOOKS = (
    "lost", "unexpected", "doubled", "swapped", "altered", "cancellations", "unjust_refusals", "not_replayed",
    "stock_not_conserved",
)  # fmt: skip


def with_books(name: str) -> Ledger:
    return dataclasses.replace(LEDGER, **{name: ("o1",)})  # type: ignore[arg-type]


def with_replica(**figures: float | None) -> ServiceFigures:
    worse = dataclasses.replace(REPLICA, url="http://b/metrics", **figures)  # type: ignore[arg-type]
    return dataclasses.replace(SERVER, replicas=(REPLICA, worse))


def test_all_pass() -> None:
    assert {criterion.verdict for criterion in judged().values()} == {"PASS"}


@pytest.mark.parametrize(
    ("changes", "failed", "value"),
    [
        pytest.param({"counts": Counts(sent=999, acknowledged=999)}, "throughput", 9.99, id="throughput"),
        pytest.param({"sent": sent(p95_ms=500.0)}, "latency_p95", 500, id="p95"),
        pytest.param({"sent": sent(p99_ms=1000.0)}, "latency_p99", 1000, id="p99"),
        pytest.param(
            {"latency": dataclasses.replace(LATENCY, mean_ms=200.0)}, "latency_mean", 200, id="mean"
        ),
        pytest.param(
            {"counts": Counts(sent=2000, acknowledged=1900, cut_off=50, agreed=30)},
            "error_rate",
            20 / 1950 * 100,
            id="errors",
        ),
        pytest.param(
            {"unsound": {"500 from /orders": 1}},
            "critical_errors",
            1,
            id="internal",
        ),
        pytest.param(
            {"ledger": dataclasses.replace(LEDGER, lost=("o1",), doubled=("o2",))},
            "critical_errors",
            2,
            id="lost-and-doubled",
        ),
        pytest.param(
            {"server": dataclasses.replace(SERVER, critical_alerts=("Down",))},
            "critical_alerts",
            1,
            id="critical",
        ),
        pytest.param(
            {"server": dataclasses.replace(SERVER, warning_alerts=tuple("abcdef"))},
            "warning_alerts",
            6,
            id="warnings",
        ),
        *(pytest.param({"ledger": with_books(name)}, "critical_errors", 1, id=name) for name in BOOKS),
        pytest.param({"sent": sent(longest_gap_seconds=10)}, "longest_gap", 10, id="gap"),
        pytest.param({"sent": sent(worst_p99_ms=1000)}, "worst_window_p99", 1000, id="worst-p99"),
        pytest.param({"sent": sent(worst_error_percent=1.0)}, "worst_window_errors", 1, id="worst-errors"),
        pytest.param({"server": with_replica(restarted=True)}, "restarts", 1, id="restarted"),
        pytest.param({"server": with_replica(gone=True)}, "restarts", 1, id="gone"),
        pytest.param({"server": with_replica(cpu_percent=70)}, "cpu", 70, id="cpu"),
        pytest.param(
            {"server": with_replica(cpu_percent=36, cpu_limit_cores=0.5)}, "cpu", 72, id="cpu-of-its-limit"
        ),
        pytest.param({"server": with_replica(rss_max_bytes=0.8 * 2**31)}, "memory", 80, id="memory"),
        pytest.param({"server": with_replica(pool_in_use_max=37.5)}, "pool", 75, id="pool"),
    ],
)
def test_each_limit(changes: dict[str, object], failed: str, value: float) -> None:
    """At its limit, a criterion fails, alone, and says by how much; the worst replica counts."""
    found = judged(**changes)  # type: ignore[arg-type]
    assert {name for name, criterion in found.items() if criterion.verdict == "FAIL"} == {failed}
    assert found[failed].value == pytest.approx(value)
    assert f"{found[failed].limit:g}" in found[failed].reason


def test_five_warnings_are_allowed() -> None:
    server = dataclasses.replace(SERVER, warning_alerts=tuple("abcde"))
    assert judged(server=server)["warning_alerts"].verdict == "PASS"


def test_fast_refusals_do_not_count_as_throughput() -> None:
    counts = Counts(sent=100_000, acknowledged=500, refused=99_500)
    assert judged(counts=counts)["throughput"].verdict == "FAIL"


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (199, {"latency_p95": "NOT MEASURED", "latency_p99": "NOT MEASURED"}),
        (200, {"latency_p95": "PASS", "latency_p99": "NOT MEASURED"}),
        (999, {"latency_p95": "PASS", "latency_p99": "NOT MEASURED"}),
        (1000, {"latency_p95": "PASS", "latency_p99": "PASS"}),
    ],
)
def test_a_percentile_of_too_few_orders(count: int, expected: dict[str, str]) -> None:
    """A percentile of too few orders is neither passed nor failed, however good or bad it looks."""
    for p95, p99 in ((100.0, 200.0), (5000.0, 9000.0)):
        found = judged(sent=sent(count=count, p95_ms=p95, p99_ms=p99))
        measured = {name for name, verdict in expected.items() if verdict == "PASS"}
        for name in expected:
            assert (found[name].verdict != "NOT MEASURED") == (name in measured)


@pytest.mark.parametrize(
    ("failed", "of", "expected"),
    [
        pytest.param(0, 295, "NOT MEASURED", id="rule-of-three"),
        pytest.param(0, 298, "NOT MEASURED", id="one-too-few"),
        pytest.param(0, 299, "PASS", id="just-enough"),
        pytest.param(1, 50, "NOT MEASURED", id="one-of-few"),
        pytest.param(10, 100, "FAIL", id="surely-more"),
        pytest.param(5, 600, "NOT MEASURED", id="close-to-the-limit"),
        pytest.param(9, 2000, "PASS", id="surely-less"),
        pytest.param(20, 2000, "FAIL", id="at-the-limit"),
        pytest.param(9_000, 1_000_000, "PASS", id="many"),
    ],
)
def test_what_an_error_rate_shows(failed: int, of: int, expected: str) -> None:
    """Less than 1 % is passed where so many orders show it at 95 % confidence, and failed where it was not so."""
    found = judged(counts=Counts(sent=of, acknowledged=of - failed))["error_rate"]
    assert found.verdict == expected, found.reason


def test_percentiles_that_failures_make_infinite() -> None:
    """A figure that is infinite fails, says why, and survives the report."""
    found = judged(sent=sent(p99_ms=math.inf))["latency_p99"]
    assert found.verdict == "FAIL"
    assert found.reason == "so many failed that it is infinite: it is not < 1000"


def test_a_run_shorter_than_the_limit_of_a_gap_shows_nothing() -> None:
    assert judged(seconds=10.0)["longest_gap"].verdict == "NOT MEASURED"
    assert judged(seconds=10.5)["longest_gap"].verdict == "PASS"


@pytest.mark.parametrize(
    ("rate", "due", "acknowledged", "expected"),
    [(10, 580, 580, "PASS"), (10, 580, 560, "FAIL"), (9, 620, 620, "FAIL")],
)
def test_the_rate_of_an_open_model_is_not_held_to_its_chance(
    rate: float, due: float, acknowledged: int, expected: str
) -> None:
    """Of 580 arrivals in a minute at 10/s all were acknowledged: nobody can do more."""
    counts = Counts(sent=acknowledged, acknowledged=acknowledged)
    found = judged(counts=counts, seconds=60.0, offered_per_second=rate, due=due)
    assert found["throughput"].verdict == expected


def routes(*figures: tuple[str, int, int]) -> dict[str, object]:
    others = tuple(
        RouteFigures(route, Counts(sent=count, acknowledged=count - failed), 5, 10, 20)
        for route, count, failed in figures
    )
    count, failed = sum(figure[1] for figure in figures), sum(figure[2] for figure in figures)
    together = RouteFigures("", Counts(sent=count, acknowledged=count - failed), 5, 10, 20)
    return {"others": others, "others_together": together}


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        pytest.param((("/products", 900, 0), ("/cancel", 90, 0)), "PASS", id="all-well"),
        pytest.param((("/products", 900, 900), ("/cancel", 90, 0)), "FAIL", id="every-read"),
        pytest.param((("/products", 9000, 0), ("/cancel", 90, 8)), "FAIL", id="a-route-that-few-use"),
        pytest.param((("/products", 900, 0), ("/cancel", 90, 1)), "PASS", id="one-failure-of-a-rare-route"),
    ],
)
def test_every_kind_of_request(figures: tuple[tuple[str, int, int], ...], expected: str) -> None:
    """Reads and cancellations fail a mixed run, and so does one route that only few requests go to."""
    assert judged("mixed", **routes(*figures))["other_errors"].verdict == expected


def test_without_requests_nothing_passes() -> None:
    """But what the server says about itself."""
    found = judged(counts=Counts(), latency=Latency(0), sent=AllSent(), ledger=Ledger(Counts(), "database"))
    from_server = {"cpu", "memory", "pool", "critical_alerts", "warning_alerts", "restarts"}
    assert {name for name, criterion in found.items() if criterion.verdict == "PASS"} == from_server
    assert {criterion.verdict for name, criterion in found.items() if name not in from_server} == {
        "NOT MEASURED"
    }


def test_without_metrics_and_prometheus() -> None:
    found = judged(server=ServiceFigures())
    names = ("cpu", "memory", "pool", "critical_alerts", "warning_alerts", "restarts")
    assert [found[name].verdict for name in names] == ["NOT MEASURED"] * 6


def test_a_replica_that_does_not_tell_could_be_the_worst() -> None:
    assert judged(server=with_replica(cpu_percent=None))["cpu"].verdict == "NOT MEASURED"


OK = Check("requests", "OK", "")
BREACH = Check("generator_lag", "BREACH", "the generator was late")
WRONG = Check("stored_once", "BREACH", "o1 is there twice", ("o1",), about="service")
UNREAD = Check("ledger", "BREACH", "what is stored could not be read", about="books")
NOT_CHECKED = Check("stock", "NOT CHECKED", "no database to ask")


def criterion(verdict: Literal["PASS", "FAIL", "NOT MEASURED"]) -> Criterion:
    return dataclasses.replace(judged()["cpu"], title=verdict.lower(), verdict=verdict, reason="so it is")


PASS, FAIL, NOT_MEASURED = criterion("PASS"), criterion("FAIL"), criterion("NOT MEASURED")
DIED = dataclasses.replace(FAIL, name="restarts")


@pytest.mark.parametrize(
    ("criteria", "checks", "strict", "expected"),
    [
        pytest.param([PASS], [OK], False, "PASS", id="pass"),
        pytest.param([PASS, FAIL], [OK], False, "FAIL", id="fail"),
        pytest.param([PASS, FAIL], [OK, BREACH], False, "INVALID", id="invalid-goes-before-fail"),
        pytest.param([PASS], [OK, WRONG, BREACH], False, "FAIL", id="what-became-of-orders-goes-before-all"),
        pytest.param([PASS, DIED], [OK, BREACH], False, "FAIL", id="so-does-a-death"),
        pytest.param([PASS, FAIL], [OK, UNREAD], False, "FAIL", id="unread-books-hide-no-failure"),
        pytest.param([PASS], [OK, UNREAD], False, "INVALID", id="unread-books-pass-nothing"),
        pytest.param([PASS, NOT_MEASURED], [OK, NOT_CHECKED], False, "PASS", id="not-measured"),
        pytest.param([PASS, NOT_MEASURED], [OK], True, "FAIL", id="strict-not-measured"),
        pytest.param([PASS], [OK, NOT_CHECKED], True, "INVALID", id="strict-not-checked"),
        pytest.param([NOT_MEASURED], [OK], False, "FAIL", id="nothing-measured-is-no-pass"),
        pytest.param([], [OK], False, "FAIL", id="no-criteria-are-no-pass"),
    ],
)
def test_the_verdict(criteria: list[Criterion], checks: list[Check], strict: bool, expected: str) -> None:  # noqa: FBT001
    assert decide(criteria, checks, strict=strict)[0] == expected


def test_the_reasons_begin_with_the_gravest() -> None:
    reasons = decide([NOT_MEASURED, FAIL, PASS], [NOT_CHECKED, UNREAD, BREACH, WRONG], strict=False)[1]
    assert reasons == (
        "o1 is there twice",
        "the generator was late",
        "fail: so it is",
        "what is stored could not be read",
        "not measured: NOT MEASURED: so it is",
        "NOT CHECKED: no database to ask",
    )
