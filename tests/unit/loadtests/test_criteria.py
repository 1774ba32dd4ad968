"""A criterion is PASS, FAIL or NOT MEASURED; a verdict follows from all of them."""

import dataclasses
from typing import Literal

import pytest

from loadtests.judging import acceptance
from loadtests.judging.criteria import judge, measure
from loadtests.judging.verdict import decide
from loadtests.run_record import Check, Counts, Criterion, Latency, Ledger, Replica, ServiceFigures

ACCEPTANCE = acceptance.load()

COUNTS = Counts(sent=2000, acknowledged=2000)
LATENCY = Latency(2000, mean_ms=50, p95_ms=100, p99_ms=200)
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


def judged(
    counts: Counts = COUNTS,
    latency: Latency = LATENCY,
    ledger: Ledger = LEDGER,
    server: ServiceFigures = SERVER,
) -> dict[str, Criterion]:
    found = judge(ACCEPTANCE, "normal", measure(counts, latency, ledger, server, 100.0))
    return {criterion.name: criterion for criterion in found}


def with_replica(**figures: float | None) -> ServiceFigures:
    worse = dataclasses.replace(REPLICA, url="http://b/metrics", **figures)  # type: ignore[arg-type]
    return dataclasses.replace(SERVER, replicas=(REPLICA, worse))


def test_all_pass() -> None:
    assert {criterion.verdict for criterion in judged().values()} == {"PASS"}


@pytest.mark.parametrize(
    ("changes", "failed", "value"),
    [
        pytest.param({"counts": Counts(sent=999, acknowledged=999)}, "throughput", 9.99, id="throughput"),
        pytest.param({"latency": dataclasses.replace(LATENCY, p95_ms=500.0)}, "latency_p95", 500, id="p95"),
        pytest.param({"latency": dataclasses.replace(LATENCY, p99_ms=1000.0)}, "latency_p99", 1000, id="p99"),
        pytest.param(
            {"latency": dataclasses.replace(LATENCY, mean_ms=200.0)}, "latency_mean", 200, id="mean"
        ),
        pytest.param(
            {"counts": Counts(sent=2000, acknowledged=1980, server_errors=15, transport_errors=5)},
            "error_rate",
            1.0,
            id="errors",
        ),
        pytest.param(
            {"ledger": Ledger(Counts(sent=2000, by_type={"internal": 1}), "database")},
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
        pytest.param({"server": with_replica(cpu_percent=70)}, "cpu", 70, id="cpu"),
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
        found = judged(latency=Latency(count, mean_ms=50, p95_ms=p95, p99_ms=p99))
        measured = {name for name, verdict in expected.items() if verdict == "PASS"}
        for name in expected:
            assert (found[name].verdict != "NOT MEASURED") == (name in measured)


def test_without_requests_nothing_passes() -> None:
    """But what the server says about itself."""
    found = judged(counts=Counts(), latency=Latency(0), ledger=Ledger(Counts(), "database"))
    from_server = {"cpu", "memory", "pool", "critical_alerts", "warning_alerts"}
    assert {name for name, criterion in found.items() if criterion.verdict == "PASS"} == from_server
    assert {criterion.verdict for name, criterion in found.items() if name not in from_server} == {
        "NOT MEASURED"
    }


def test_without_metrics_and_prometheus() -> None:
    found = judged(server=ServiceFigures())
    names = ("cpu", "memory", "pool", "critical_alerts", "warning_alerts")
    assert [found[name].verdict for name in names] == ["NOT MEASURED"] * 5


def test_a_replica_that_does_not_tell_could_be_the_worst() -> None:
    assert judged(server=with_replica(cpu_percent=None))["cpu"].verdict == "NOT MEASURED"


OK = Check("requests", "OK", "")
BREACH = Check("stored_once", "BREACH", "o1 is there twice", ("o1",))
NOT_CHECKED = Check("stock", "NOT CHECKED", "no database to ask")


def criterion(verdict: Literal["PASS", "FAIL", "NOT MEASURED"]) -> Criterion:
    return dataclasses.replace(judged()["cpu"], title=verdict.lower(), verdict=verdict, reason="so it is")


PASS, FAIL, NOT_MEASURED = criterion("PASS"), criterion("FAIL"), criterion("NOT MEASURED")


@pytest.mark.parametrize(
    ("criteria", "checks", "strict", "expected"),
    [
        pytest.param([PASS], [OK], False, "PASS", id="pass"),
        pytest.param([PASS, FAIL], [OK], False, "FAIL", id="fail"),
        pytest.param([PASS, FAIL], [OK, BREACH], False, "INVALID", id="invalid-goes-before-fail"),
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
    reasons = decide([NOT_MEASURED, FAIL, PASS], [NOT_CHECKED, BREACH], strict=False)[1]
    assert reasons == (
        "o1 is there twice",
        "fail: so it is",
        "not measured: NOT MEASURED: so it is",
        "NOT CHECKED: no database to ask",
    )
