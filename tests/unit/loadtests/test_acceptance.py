"""The acceptance file holds the plan's numbers, and a file that cannot be used says where."""

from pathlib import Path

import pytest

from loadtests.judging import acceptance
from loadtests.judging.acceptance import AcceptanceError
from loadtests.judging.criteria import Facts, measure
from loadtests.run_record import AllSent, Counts, Latency, Ledger, ServiceFigures

# Sections 1 and 3 of the performance test plan.
PLAN = {
    "throughput": (">=", {"normal": 10, "peak": 50, "stress": 100}),
    "latency_p95": ("<", 500),
    "latency_p99": ("<", 1000),
    "latency_mean": ("<", 200),
    "error_rate": ("<", 1),
    "critical_errors": ("<=", 0),
    "critical_alerts": ("<=", 0),
    "warning_alerts": ("<=", 5),
    "cpu": ("<", 70),
    "memory": ("<", 80),
    "pool": ("<", 75),
}


def test_the_plans_numbers() -> None:
    """Every criterion of the plan is there, with its limit and its comparison; no other is called the plan's."""
    criteria = acceptance.load().criteria
    assert {c.name: (c.comparison, c.limit) for c in criteria} == PLAN


def test_every_criterion_says_what_it_is_and_where_it_comes_from() -> None:
    assert all(c.definition and c.source.startswith("plan, section") for c in acceptance.load().criteria)


def test_every_criterion_is_measured() -> None:
    """A criterion whose name nothing measures could never fail; a measurement that none names is idle."""
    measured = measure(Facts(Counts(), Latency(0), AllSent(), Ledger(Counts()), ServiceFigures(), 0.0))
    assert set(measured) == acceptance.MEASURED
    assert {each.name for each in acceptance.load().requirements} == acceptance.MEASURED


def test_the_guards_hold_the_plans_limits() -> None:
    """The guards of other requests and of the worst minute have the limits of the criteria that they repeat."""
    limits = {each.name: each.limit for each in acceptance.load().guards}
    assert limits["worst_window_p99"] == PLAN["latency_p99"][1]
    assert limits["worst_window_errors"] == PLAN["error_rate"][1]
    assert limits["other_errors"] == {"mixed": PLAN["error_rate"][1]}
    assert limits["other_p95"] == {"mixed": PLAN["latency_p95"][1]}
    assert limits["other_p99"] == {"mixed": PLAN["latency_p99"][1]}


def test_a_percentile_needs_samples() -> None:
    samples = {c.name: c.samples for c in acceptance.load().criteria}
    assert (samples["latency_p95"], samples["latency_p99"]) == (200, 1000)


def test_a_profile_without_a_limit_is_not_judged_by_it() -> None:
    throughput = acceptance.load().criteria[0]
    assert throughput.limit_for("stress") == 100
    assert throughput.limit_for("mixed") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("criteria = [", "Invalid", id="not-toml"),
        pytest.param("[validity]", "criteria", id="nothing-to-judge"),
        pytest.param('[[criteria]]\nname = "cpu"', "criteria.0.title", id="half-a-criterion"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "acceptance.toml"
    path.write_text(text)
    with pytest.raises(AcceptanceError, match=said):
        acceptance.load(path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        pytest.param('name = "memory"', 'name = "memroy"', "nothing measures: memroy", id="criterion"),
        pytest.param("normal = 10", "norml = 10", "no such profile: norml", id="profile"),
        pytest.param("mixed = 500", "mixt = 500", "no such profile: mixt", id="profile-of-a-guard"),
        pytest.param("confidence = 0.95", "confidence = 95", "judging.confidence", id="confidence"),
        pytest.param("little_tolerance", "littel_tolerance", "validity", id="limit-of-validity"),
    ],
)
def test_a_misspelt_name_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    """A misspelt name would judge nothing, and nobody would know."""
    path = tmp_path / "acceptance.toml"
    path.write_text(acceptance.PATH.read_text().replace(old, new, 1))
    with pytest.raises(AcceptanceError, match=said):
        acceptance.load(path)


OWN = """
[[own]]
name = "{name}"
title = "Mine"
measure = "{measure}"
tag = "read"
comparison = "<"
limit = 800
unit = "ms"
definition = "mine"
source = "mine"
"""


def test_a_criterion_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "acceptance.toml"
    path.write_text(acceptance.PATH.read_text() + OWN.format(name="mine", measure="p99.9"))
    (own,) = acceptance.load(path).own
    assert (own.name, own.measure, own.tag, own.route) == ("mine", "p99.9", "read", None)


@pytest.mark.parametrize(
    ("name", "measure", "said"), [("mine", "p100", "no such measure"), ("cpu", "max", "named twice: cpu")]
)
def test_a_criterion_of_ones_own_that_cannot_be(tmp_path: Path, name: str, measure: str, said: str) -> None:
    path = tmp_path / "acceptance.toml"
    path.write_text(acceptance.PATH.read_text() + OWN.format(name=name, measure=measure))
    with pytest.raises(AcceptanceError, match=said):
        acceptance.load(path)


def test_a_criterion_named_twice(tmp_path: Path) -> None:
    path = tmp_path / "acceptance.toml"
    path.write_text(acceptance.PATH.read_text().replace('"memory"', '"cpu"'))
    with pytest.raises(AcceptanceError, match="named twice: cpu"):
        acceptance.load(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(AcceptanceError, match="No such file"):
        acceptance.load(tmp_path / "acceptance.toml")
